"""What a shorter switch interval is worth: how long a thread waits for the interpreter's lock before it is given it.

    python -m benchmarks.switching [--short] [--docs] [--interval-ms MS]

The device of :mod:`benchmarks.paced` at 20,000 documents/s in one worker, run by run in turns with Python's default and
with what the service sets at its start.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.arena import Arena, Round
from benchmarks.documents import Corpus
from benchmarks.machine import hardware
from benchmarks.paced import Paced
from benchmarks.publish import replace_marked
from benchmarks.report import Section, Spread, number, table
from benchmarks.scale import FULL, SHORT

DOCUMENTS_PER_S = 20_000
DEFAULT_S = 0.005  # Python's own (sys.setswitchinterval)
ROUNDS = 4


async def measure(
    arena: Arena, documents: int, interval_s: float | None
) -> dict[float, list[tuple[Round, float]]]:
    """The runs with each interval (seconds), and the share of its time in which the device idled.

    Raises ValueError where the service leaves Python's default and no other interval is given.
    """
    texts = arena.corpus.take(documents)
    paced = await Paced.start(arena, texts[: len(texts) // 4])
    try:
        _, seen = await paced.run(texts[: len(texts) // 10], DOCUMENTS_PER_S)
        ours = interval_s or float(seen["switch_interval_s"])
        if ours == DEFAULT_S:
            raise ValueError(
                "the service leaves Python's switch interval: give another one with --interval-ms"
            )
        found: dict[float, list[tuple[Round, float]]] = {DEFAULT_S: [], ours: []}
        order = list(found)
        for _ in range(ROUNDS):
            for interval in order:
                done, seen = await paced.run(texts, DOCUMENTS_PER_S, switch_interval_s=interval)
                assert math.isclose(seen["switch_interval_s"], interval, rel_tol=0.01)
                found[interval].append((done, float(seen["idle_ratio"])))
            order.reverse()
    finally:
        paced.stop()
    return found


def section_of(found: Mapping[float, Sequence[tuple[Round, float]]]) -> Section:
    section = Section("The interpreter's lock")
    idle = {interval: [100 * ratio for _, ratio in runs] for interval, runs in found.items()}
    rows = []
    for interval, runs in found.items():
        spread, rate = Spread.of(idle[interval]), Spread.of([done.rate for done, _ in runs])
        cpu_us = statistics.median(done.worker_cpu_s / done.documents for done, _ in runs) * 1e6
        rows.append(
            [
                f"{number(interval * 1e3)} ms" + (" (Python's default)" if interval == DEFAULT_S else ""),
                f"{number(spread.median)} %",
                f"{spread.range} %",
                f"{number(rate.median)}",
                rate.range,
                number(cpu_us),
            ]
        )
    [ours] = [interval for interval in found if interval != DEFAULT_S]
    gap = Spread.of([a - b for a, b in zip(idle[DEFAULT_S], idle[ours], strict=True)])
    told = "which does not tell the two apart" if gap.covers(0.0) else "every round on the same side"
    head = [
        "switch interval",
        "idle",
        "lowest – highest",
        "documents/s",
        "lowest – highest",
        "its CPU µs/document",
    ]
    [(first, _), *_] = found[ours]
    section.text += [
        table(head, rows),
        f"A device paced at {DOCUMENTS_PER_S:,} documents/s on {hardware()['cores']} cores, {first.documents:,} "
        f"documents a run, medians of {len(found[ours])} runs of each in turns. Within a round the device idled "
        f"{number(gap.median)} percentage points more with Python's default ({gap.range}), {told}.",
    ]
    return section


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.switching", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--short", action="store_true", help="few documents: does it still run?")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/cpu.md, too")
    parser.add_argument(
        "--interval-ms", type=float, help="compare Python's default with this, not with what the service sets"
    )
    options = parser.parse_args()
    documents = (SHORT if options.short else FULL).paced_documents
    interval_s = options.interval_ms / 1e3 if options.interval_ms else None
    with tempfile.TemporaryDirectory(prefix="inferstream-switching-") as folder:
        arena = Arena(Path(folder), Corpus.load())
        arena.start()
        try:
            section = section_of(asyncio.run(measure(arena, documents, interval_s)))
        except ValueError as error:
            print(f"benchmarks.switching: {error}", file=sys.stderr)
            return 2
        finally:
            arena.stop()
    print(section.markdown())
    if options.docs:
        replace_marked("docs/cpu.md", "SWITCHING", section.body())
    return 0


if __name__ == "__main__":
    sys.exit(main())
