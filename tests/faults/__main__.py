"""``python -m tests.faults``: the fault matrix, on Apache Kafkas of its own.

Each row of the matrix is one fault under one guarantee; its injections are spread over runs of at most
PER_RUN on one scene.  Everything drawn comes from the seed, which is printed; a run with findings says how it is
run again.  Two are run at a time, each with brokers, topics and workers of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.catalogue import FAULTS, GUARANTEES, SLICES, Fault
from tests.faults.matrix import markdown, shortfall, table
from tests.faults.pages import publish
from tests.faults.record import NotOneMatrix, merged, written
from tests.faults.run import Report, refusal, run
from tests.support.broker import BrokerUnavailable
from tests.support.cluster import Cluster

PER_RUN = 5
ABREAST = 2  # two cores are enough for two runs, which wait most of the time: for sessions to end, for brokers to start
WEIGHTS = {
    "random": 4,
    "kill": 2,
    "zombie": 2,
    "broker-killed-3": 2,
    "topic-gone": 0.2,
    "partition-added": 0.2,
}


@dataclass(frozen=True, slots=True)
class Planned:
    name: str
    guarantee: str
    faults: tuple[Fault, ...]
    seed: int

    @property
    def brokers(self) -> int:
        return max(entry.brokers for entry in self.faults)


Waiting = deque[tuple[int, Planned]]
"""Runs that no lane has taken yet, each with its number."""


def plan(names: Sequence[str], guarantees: Sequence[str], count: int, seed: int) -> Iterator[Planned]:
    """Runs that together inject ``count`` faults or a few more, those of one broker first.

    The n-th run of a row has the seed ``seed + n``, so that the first one of a single row has the one that was given.
    """
    for name in names:
        sequence = tuple(FAULTS[entry] for entry in SLICES.get(name, ()))
        for guarantee in guarantees if sequence else ():
            if all(guarantee in entry.guarantees for entry in sequence):
                yield Planned(name, guarantee, sequence, seed)
    rows = [(FAULTS[name], guarantee) for name, guarantee in _rows(names, guarantees)]
    total = sum(WEIGHTS.get(entry.name, 1) for entry, _ in rows)
    for entry, guarantee in sorted(rows, key=lambda row: row[0].brokers):
        share = max(1, round(count * WEIGHTS.get(entry.name, 1) / total + 0.49))
        for n, first in enumerate(range(0, share, PER_RUN)):
            many = min(PER_RUN, share - first)
            yield Planned(entry.name, guarantee, (entry,) * many, (seed + n) % (1 << 32))


def _rows(names: Sequence[str], guarantees: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (name, guarantee)
        for name in names
        if name in FAULTS
        for guarantee in guarantees
        if guarantee in FAULTS[name].guarantees
    ]


async def perform(planned: Sequence[Planned], folder: Path, until: float, abreast: int) -> list[Report]:
    """Run them, ``abreast`` at a time, each lane on a cluster of its own; start none after ``until`` (monotonic).

    Those on the same number of brokers come together, in their order.
    """
    reports: list[Report] = []
    for brokers in sorted({entry.brokers for entry in planned}):
        waiting = deque((n, entry) for n, entry in enumerate(planned) if entry.brokers == brokers)
        print(
            f"starting Apache Kafka with {brokers} broker{'s' * (brokers > 1)} …", file=sys.stderr, flush=True
        )

        async def lane(number: int, brokers: int = brokers, waiting: Waiting = waiting) -> None:
            cluster: Cluster | None = None
            try:
                while waiting and time.monotonic() < until:
                    n, entry = waiting.popleft()
                    where = folder / f"{n:03d}-{entry.name}-{entry.guarantee}"
                    if cluster is None:
                        place = folder / f"kafka-{brokers}-{number}-from-{n:03d}"
                        cluster = await Cluster(place, brokers).start()
                    report = await run(cluster, entry.name, entry.faults, entry.guarantee, entry.seed, where)
                    reports.append(report)
                    _tell(report, len(reports), len(planned))
                    if report.problems:  # the next one shall not suffer from what is left of it
                        await cluster.remove()
                        cluster = None
            finally:
                if cluster is not None:
                    await cluster.remove()

        try:
            async with asyncio.TaskGroup() as lanes:
                for number in range(min(abreast, len(waiting))):
                    lanes.create_task(lane(number + 1))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
    return reports


def _tell(report: Report, number: int, of: int) -> None:
    pauses = ", ".join(f"{injection.pause_s:.1f}" for injection in report.injections)
    print(
        f"[{number}/{of}] {report.name} {report.guarantee}: {len(report.counted)} of {report.faults} faults counted, "
        f"{report.documents} documents, {report.lost} lost, {report.duplicated} duplicated "
        f"({', '.join(f'{entry.repeated} of {entry.allowed}' for entry in report.injections)}), "
        f"pauses {pauses} s, {report.seconds:.0f} s: "
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
    parser.add_argument("--faults", type=int, default=200, help="how many to inject and count (default 200)")
    parser.add_argument(
        "--only",
        help=f"names of rows, with commas between: {', '.join([*FAULTS, *SLICES])} (default: all rows)",
    )
    parser.add_argument("--guarantee", choices=GUARANTEES, help="only under this one (default: both)")
    parser.add_argument("--minutes", type=float, default=90, help="start no run after that time (default 90)")
    parser.add_argument(
        "--abreast",
        type=int,
        default=ABREAST,
        help=f"so many runs at a time, on brokers of their own (default {ABREAST})",
    )
    parser.add_argument("--json", type=Path, help="write every run and injection to this file")
    parser.add_argument("--markdown", type=Path, help="write the matrix to this file")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="if all was kept, write the matrix into docs/faults.md and README.md, too",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        help="run nothing: print the matrix of what these files of --json hold",
    )
    given = parser.parse_args()
    given.names = given.only.split(",") if given.only else list(FAULTS)
    if unknown := sorted({*given.names} - {*FAULTS, *SLICES}):
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join([*FAULTS, *SLICES])}")
    return given


def merge(files: Sequence[Path], into: Path | None, docs: bool) -> int:
    try:
        reports = merged(files)
        runs = [json.loads(file.read_text()) for file in files]
    except (NotOneMatrix, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(reports))
    if into:
        into.write_text(markdown(reports))
    missing = shortfall(reports, [], 0)
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    found = bool(missing) or any(report.problems for report in reports)
    if docs and not found:
        publish(reports, sum(run["minutes"] for run in runs), [run["seed"] for run in runs])
    return 1 if found else 0


def main() -> int:
    given = arguments()
    if given.merge:
        return merge(given.merge, given.markdown, given.docs)
    # The harness's own clients say at length what the faults do to them, and asyncio what became of their futures.
    for chatty in ("aiokafka", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 32)
    guarantees = []
    skipped = []
    asked = [given.guarantee] if given.guarantee else GUARANTEES
    for guarantee in asked:
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
        reports = asyncio.run(perform(planned, folder, began + given.minutes * 60, given.abreast))
    except BrokerUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reports.sort(key=lambda report: report.folder)  # in the order of the plan
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
    least = given.faults if any(name in FAULTS for name in given.names) else 0
    missing = shortfall(
        reports, [*_rows(given.names, asked), *((p.name, p.guarantee) for p in planned)], least
    )
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        facts = {"seed": seed, "minutes": minutes, "complete": complete, "skipped": skipped}
        given.json.write_text(written(reports, facts))
    failed = [report for report in reports if report.problems]
    if failed:
        print(f"logs of what failed: {folder}", file=sys.stderr)
        for report in failed:
            print(f"replay: {report.replay}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    found = bool(failed or missing) or not complete
    if given.docs and not found:
        publish(reports, minutes, [seed])
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
