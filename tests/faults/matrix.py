"""The matrix: one row for each fault and guarantee, as text and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from tests.faults.catalogue import FAULTS, GUARANTEES
from tests.faults.run import BACK_S, Report

HEAD = (
    "fault",
    "guarantee",
    "faults",
    "documents",
    "lost",
    "duplicated",
    "longest pause",
    "for readers",
    "back",
    "back after",
    "verdict",
)


def rows(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """HEAD's columns, a tuple for each row.

    Only faults are counted that found results before them and input left.  ``duplicated`` shows, where any are
    allowed, the most of one fault and what one may have.  ``back`` is after how many of them every input had an answer
    again within BACK_S.  Times are medians over the faults.
    """
    grouped: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for report in reports:
        grouped[report.name, report.guarantee].append(report)
    made = []
    for (name, guarantee), runs in grouped.items():
        counted = [injection for report in runs for injection in report.counted]
        most = max((injection.repeated for injection in counted), default=0)
        allowed = max((injection.allowed for injection in counted), default=0)
        duplicated = sum(report.duplicated for report in runs)
        back = sum(injection.back_s <= BACK_S for injection in counted)
        failed = sum(bool(report.problems) for report in runs)
        made.append(
            (
                FAULTS[name].title if name in FAULTS else name,
                guarantee,
                str(len(counted)),
                str(sum(report.documents for report in runs)),
                str(sum(report.lost for report in runs)),
                f"{duplicated} (most {most} of {allowed})" if allowed else str(duplicated),
                f"{median(injection.pause_s for injection in counted):.1f} s" if counted else "–",
                f"{median(injection.readers_s for injection in counted):.1f} s" if counted else "–",
                f"{back} of {len(counted)}",
                f"{median(injection.back_s for injection in counted):.1f} s" if counted else "–",
                _verdict(len(counted), failed, len(runs)),
            )
        )
    return made


def _verdict(counted: int, failed: int, runs: int) -> str:
    if failed:
        return f"{failed} of {runs} runs FAILED"
    return "kept" if counted else "NOT COUNTED"


def shortfall(reports: Sequence[Report], wanted: Sequence[tuple[str, str]], least: int) -> list[str]:
    """Why these runs are not the matrix that was asked for: ``wanted`` are its rows, name and guarantee."""
    counted: dict[tuple[str, str], int] = dict.fromkeys(wanted, 0)
    for report in reports:
        counted[report.name, report.guarantee] = counted.get((report.name, report.guarantee), 0) + len(
            report.counted
        )
    lines = [
        f"no fault was counted: {name}, {guarantee}" for (name, guarantee), n in counted.items() if not n
    ]
    if (total := sum(counted.values())) < least:
        lines.append(f"{total} faults were counted, and {least} asked for")
    return lines


def table(reports: Sequence[Report]) -> str:
    lines = [HEAD, *rows(reports)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def markdown(reports: Sequence[Report]) -> str:
    return _markdown(HEAD, rows(reports)) + "\n"


def summary(reports: Sequence[Report]) -> str:
    """As Markdown, one row for each fault; of the medians of the pause under either guarantee, the longer one."""
    faults: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows(reports):
        named = dict(zip(HEAD, row, strict=True))
        faults[named["fault"]][named["guarantee"]] = named
    lines = []
    for name, found in faults.items():
        pauses = [row["longest pause"] for row in found.values() if row["longest pause"] != "–"]
        repeated = [found[guarantee]["duplicated"] if guarantee in found else "–" for guarantee in GUARANTEES]
        injected, documents, lost = (
            sum(int(row[column]) for row in found.values()) for column in ("faults", "documents", "lost")
        )
        longest = max(pauses, key=lambda pause: float(pause.split()[0]), default="–")
        lines.append((name, str(injected), f"{documents:,}", str(lost), *repeated, longest))
    repeats = [f"repeated, {guarantee}" for guarantee in GUARANTEES]
    return _markdown(("fault", "injected", "documents", "lost", *repeats, "longest pause"), lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
