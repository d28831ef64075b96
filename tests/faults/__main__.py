"""``python -m tests.faults``: the fault matrix, on Apache Kafkas of its own.

Each row of the matrix is one fault under one guarantee; its injections are spread over runs of at most
PER_RUN on one scene.  Everything drawn comes from the seed, which is printed; a run with findings says how it is
run again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.catalogue import FAULTS, GUARANTEES, SLICES, Fault
from tests.faults.matrix import markdown, table
from tests.faults.run import Report, refusal, run
from tests.support.broker import BrokerUnavailable
from tests.support.cluster import Cluster

PER_RUN = 5
WEIGHTS = {"random": 4, "kill": 2, "zombie": 2, "broker-killed-3": 2, "topic-gone": 0.2}


@dataclass(frozen=True, slots=True)
class Planned:
    name: str
    guarantee: str
    faults: tuple[Fault, ...]
    seed: int

    @property
    def brokers(self) -> int:
        return max(entry.brokers for entry in self.faults)


def plan(names: Sequence[str], guarantees: Sequence[str], count: int, seed: int) -> Iterator[Planned]:
    """Runs that together inject ``count`` faults or a few more, those of one broker first.

    The n-th run of a row has the seed ``seed + n``, so that the first one of a single row has the one that was given.
    """
    for name in names:
        sequence = tuple(FAULTS[entry] for entry in SLICES.get(name, ()))
        for guarantee in guarantees if sequence else ():
            if all(guarantee in entry.guarantees for entry in sequence):
                yield Planned(name, guarantee, sequence, seed)
    rows = [
        (FAULTS[name], guarantee)
        for name in names
        if name in FAULTS
        for guarantee in guarantees
        if guarantee in FAULTS[name].guarantees
    ]
    total = sum(WEIGHTS.get(entry.name, 1) for entry, _ in rows)
    for entry, guarantee in sorted(rows, key=lambda row: row[0].brokers):
        share = max(1, round(count * WEIGHTS.get(entry.name, 1) / total + 0.49))
        for n, first in enumerate(range(0, share, PER_RUN)):
            many = min(PER_RUN, share - first)
            yield Planned(entry.name, guarantee, (entry,) * many, (seed + n) % (1 << 32))


async def perform(planned: Sequence[Planned], folder: Path, until: float) -> list[Report]:
    """Run them one after the other, on one cluster for each number of brokers; stop at ``until`` (monotonic)."""
    reports: list[Report] = []
    for brokers in sorted({entry.brokers for entry in planned}):
        print(
            f"starting Apache Kafka with {brokers} broker{'s' * (brokers > 1)} …", file=sys.stderr, flush=True
        )
        cluster = await Cluster(folder / f"kafka-{brokers}", brokers).start()
        try:
            for n, entry in enumerate(planned):
                if entry.brokers != brokers:
                    continue
                if time.monotonic() > until:
                    return reports
                where = folder / f"{n:03d}-{entry.name}-{entry.guarantee}"
                report = await run(cluster, entry.name, entry.faults, entry.guarantee, entry.seed, where)
                reports.append(report)
                _tell(report, n + 1, len(planned))
        finally:
            await cluster.remove()
    return reports


def _tell(report: Report, number: int, of: int) -> None:
    pauses = ", ".join(f"{injection.pause_s:.1f}" for injection in report.injections)
    print(
        f"[{number}/{of}] {report.name} {report.guarantee}: {len(report.counted)} of {report.faults} faults counted, "
        f"{report.documents} documents, {report.lost} lost, {report.duplicated} duplicated "
        f"(at most {report.duplicates_allowed}), pauses {pauses} s, {report.seconds:.0f} s: "
        f"{'FAILED' if report.problems else 'ok'}",
        file=sys.stderr,
        flush=True,
    )
    for problem in report.problems:
        print(f"    {problem}", file=sys.stderr)
    if report.problems:
        print(f"    logs: {report.folder}\n    replay: {report.replay}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seed", type=int, help="everything is drawn from it; a new one unless given")
    parser.add_argument("--faults", type=int, default=200, help="how many to inject (default 200)")
    parser.add_argument(
        "--only",
        help=f"names of rows, with commas between: {', '.join([*FAULTS, *SLICES])} (default: all rows)",
    )
    parser.add_argument("--guarantee", choices=GUARANTEES, help="only under this one (default: both)")
    parser.add_argument("--minutes", type=float, default=90, help="start no run after that time (default 90)")
    parser.add_argument("--json", type=Path, help="write every run and injection to this file")
    parser.add_argument("--markdown", type=Path, help="write the matrix to this file")
    given = parser.parse_args()
    given.names = given.only.split(",") if given.only else list(FAULTS)
    if unknown := sorted({*given.names} - {*FAULTS, *SLICES}):
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join([*FAULTS, *SLICES])}")
    return given


def main() -> int:
    given = arguments()
    # The harness's own clients say at length what the faults do to them.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 32)
    guarantees = []
    skipped = []
    for guarantee in [given.guarantee] if given.guarantee else GUARANTEES:
        if (why := refusal(guarantee)) is None:
            guarantees.append(guarantee)
        else:
            skipped.append(f"SKIPPED: {guarantee}, which this version of the service refuses: {why}")
    for line in skipped:
        print(line, file=sys.stderr)
    planned = list(plan(given.names, guarantees, given.faults, seed))
    print(
        f"seed {seed}: {sum(len(p.faults) for p in planned)} faults in {len(planned)} runs", file=sys.stderr
    )
    if not planned:
        print("error: nothing to run", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="inferstream-faults-"))
    began = time.monotonic()
    try:
        reports = asyncio.run(perform(planned, folder, began + given.minutes * 60))
    except BrokerUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - began) / 60
    counted = sum(len(report.counted) for report in reports)
    text = markdown(reports)
    print(table(reports))
    complete = len(reports) == len(planned)
    print(
        f"\n{counted} faults in {minutes:.1f} minutes, seed {seed}"
        + ("" if complete else f"; {len(planned) - len(reports)} of {len(planned)} runs were not started")
    )
    for line in skipped:
        print(line)
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        tree = {
            "seed": seed,
            "minutes": minutes,
            "complete": complete,
            "skipped": skipped,
            "runs": [asdict(report) | {"replay": report.replay} for report in reports],
        }
        given.json.write_text(json.dumps(tree, indent=1) + "\n")
    failed = [report for report in reports if report.problems]
    if failed:
        print(f"logs of what failed: {folder}", file=sys.stderr)
        for report in failed:
            print(f"replay: {report.replay}", file=sys.stderr)
    return 1 if failed or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
