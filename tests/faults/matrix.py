"""The matrix: one row for each fault and guarantee, as text and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from tests.faults.catalogue import FAULTS
from tests.faults.run import Report

HEAD = (
    "fault",
    "guarantee",
    "faults",
    "documents",
    "lost",
    "duplicated",
    "longest pause",
    "back after",
    "verdict",
)


def rows(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """HEAD's columns, a tuple for each row.

    Only faults are counted that found results before them and input left.  ``duplicated`` shows, where any are
    allowed, at most how many.  Times are medians over the faults.
    """
    grouped: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for report in reports:
        grouped[report.name, report.guarantee].append(report)
    made = []
    for (name, guarantee), runs in grouped.items():
        counted = [injection for report in runs for injection in report.counted]
        allowed = sum(report.duplicates_allowed for report in runs)
        duplicated = sum(report.duplicated for report in runs)
        failed = sum(bool(report.problems) for report in runs)
        made.append(
            (
                FAULTS[name].title if name in FAULTS else name,
                guarantee,
                str(len(counted)),
                str(sum(report.documents for report in runs)),
                str(sum(report.lost for report in runs)),
                f"{duplicated} (≤ {allowed})" if allowed else str(duplicated),
                f"{median(injection.pause_s for injection in counted):.1f} s" if counted else "–",
                f"{median(injection.back_s for injection in counted):.1f} s" if counted else "–",
                "kept" if not failed else f"{failed} of {len(runs)} runs FAILED",
            )
        )
    return made


def table(reports: Sequence[Report]) -> str:
    lines = [HEAD, *rows(reports)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def markdown(reports: Sequence[Report]) -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *rows(reports)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
