"""A device that is much faster than this machine's: does the path around it keep it busy?

The device takes the time of one that does 15,000 documents a second and computes nothing, so all that these
cores do is the path: poll, parse, validate, prepare, batch, finish, serialise, publish, commit.  Preparing is
that of builtin:hash (a digest of the text; four characters count as a token), because tokenising 15,000 real
documents a second alone would take more cores than this is meant to run on.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.arena import SETTLE_S, Arena, Round, Watched
from benchmarks.report import Goal, Section, Spread, number, table
from benchmarks.scale import Scale
from benchmarks.search import Crossing, first_reaching
from inferstream.tasks.hash import CHARACTERS_PER_TOKEN

DOCUMENTS_PER_S = 15_000
MAX_LENGTH = 256
WIDTH = 8
GOAL = 0.01
SATURATED = 0.03  # of the device's time without a batch: from here on the path holds it back
STEP = 1_000  # documents/s
SLOWEST, FASTEST = 5_000, 31_000  # where the search begins; it leaves the range if it has to
SEARCH_SHARE = 0.4  # of the documents, for each run of the search

# What the settings would be on the GPU that is stood in for.
AS_ON_A_GPU = {
    "model": {"id": "builtin:hash", "max_length": MAX_LENGTH},
    "batch": {"max_tokens": 32_768},
    "buffer": {"max_documents": 16_384, "max_bytes": 256 * 2**20},
}


def mean_tokens(texts: Sequence[str]) -> float:
    """Tokens per document as builtin:hash counts them, cut at MAX_LENGTH."""
    return statistics.fmean(min(MAX_LENGTH, len(text) // CHARACTERS_PER_TOKEN + 1) for text in texts)


class Paced:
    """A worker in front of a paced device; :meth:`run` may be called again and again."""

    def __init__(self, arena: Arena, worker: Watched) -> None:
        self._arena = arena
        self._worker = worker

    @classmethod
    async def start(cls, arena: Arena, texts: Sequence[str]) -> Paced:
        """Up, and warm by ``texts``."""
        pace = {"paced": {"tokens_per_s": DOCUMENTS_PER_S * mean_tokens(texts), "width": WIDTH}}
        paced = cls(arena, Watched(arena, "paced", await arena.topics("paced"), AS_ON_A_GPU, pace))
        try:
            await paced._worker.ready(arena)
            await asyncio.sleep(SETTLE_S)
            await arena.round(paced._worker, texts)
        except BaseException:
            paced.stop()
            raise
        return paced

    async def run(
        self, texts: Sequence[str], documents_per_s: int, **dials: float
    ) -> tuple[Round, dict[str, Any]]:
        """A backlog in front of a device of that rate, and what was seen inside the worker; ``dials`` as of Watched."""
        await self._worker.mark(tokens_per_s=documents_per_s * mean_tokens(texts), **dials)
        done = await self._arena.round(self._worker, texts)
        return done, await self._worker.mark()

    def stop(self) -> None:
        self._worker.stop()


async def run(arena: Arena, scale: Scale) -> Section:
    texts = arena.corpus.take(scale.paced_documents)
    paced = await Paced.start(arena, texts[: len(texts) // 10])
    try:
        runs = [await paced.run(texts, DOCUMENTS_PER_S) for _ in range(scale.rounds)]
        fewer = texts[: int(len(texts) * SEARCH_SHARE)]

        async def idle_at(rate: int) -> float:
            _, seen = await paced.run(fewer, rate)
            return float(seen["idle_ratio"])

        slow = statistics.median(seen["idle_ratio"] for _, seen in runs) >= SATURATED
        crossing = await first_reaching(
            idle_at,
            SATURATED,
            SLOWEST if slow else DOCUMENTS_PER_S,
            DOCUMENTS_PER_S if slow else FASTEST,
            step=STEP,
            rounds=scale.rounds,
            most=scale.search_runs,
        )
    finally:
        paced.stop()
    return _section(runs, mean_tokens(texts), crossing, len(fewer))


def _section(
    runs: Sequence[tuple[Round, dict[str, Any]]], tokens: float, crossing: Crossing, fewer: int
) -> Section:
    idle = [seen["idle_ratio"] for _, seen in runs]
    name = f"idle at {DOCUMENTS_PER_S:,} documents/s"
    percent = [100 * ratio for ratio in idle]
    section = Section("A paced device", [Goal.of_rounds(name, percent, 100 * GOAL, False, "%")])
    done, seen = sorted(runs, key=lambda run: float(run[1]["idle_ratio"]))[len(runs) // 2]
    count = done.documents
    rows = [[name, number(seconds * 1e6 / count)] for name, seconds in stage_seconds(seen, done).items()]
    section.text += [
        f"A device that takes the time of one at {DOCUMENTS_PER_S:,} documents/s ({number(tokens)} tokens each on "
        "average) and computes nothing; preparing as for builtin:hash, vectors of 8 numbers. Idle is the share of the "
        "device's own time without a batch, between the first and last 5 % of the documents; median of "
        f"{len(runs)} runs of {count:,} documents. The one of the median went through at {number(done.rate)} "
        "documents/s; its costs:",
        table(["CPU µs/document", ""], rows),
        crossing_text(crossing, fewer),
    ]
    section.data = {
        "rounds": [done_of(done) | {"idle_ratio": seen["idle_ratio"]} for done, seen in runs],
        "seen": seen | {"batches": len(seen["batches"])},
        "crossing": {"below": crossing.below, "reached": crossing.reached},
        "idle_by_rate": crossing.runs,
    }
    return section


def crossing_text(crossing: Crossing, documents: int) -> str:
    """At what rate the device first idles for SATURATED of its time, and all that was measured to find it."""
    counted = sum(map(len, crossing.runs.values()))
    if crossing.reached is None:
        found = f"{counted} runs did not settle at what rate it first waits for {SATURATED:.0%} of its time"
    else:
        found = (
            f"It first waits for {SATURATED:.0%} of its time at {crossing.reached:,} documents/s (at "
            f"{crossing.below:,} it does not)"
        )
    rows = []
    for rate, idle in sorted(crossing.runs.items()):
        spread = Spread.of([100 * ratio for ratio in idle])
        median = f"{spread.median:.2f} %"
        rows.append(
            [
                f"{rate:,}",
                f"**{median}**" if rate in (crossing.below, crossing.reached) else median,
                f"{spread.range} %" if len(idle) > 1 else "",
                f"{len(idle)}",
            ]
        )
    return (
        f"{found}; by bisection in steps of {STEP:,}, and medians at the two rates that remain. Runs of "
        f"{documents:,} documents:\n\n"
        + table(["device, documents/s", "idle", "lowest – highest", "runs"], rows)
    )


def stage_seconds(seen: dict[str, Any], done: Round) -> dict[str, float]:
    """CPU seconds by stage: prepare and finish share the worker threads; the rest is whole threads."""
    stages = dict(seen["stages"])
    worker_threads = seen["threads"].get("worker", 0.0)
    stages["handing over (worker threads)"] = max(0.0, worker_threads - stages["prepare"] - stages["finish"])
    counted = {"event loop", "worker"}
    stages["device threads"] = sum(s for name, s in seen["threads"].items() if name not in counted)
    stages["worker in all"] = done.worker_cpu_s
    stages["broker"] = done.broker_cpu_s
    return stages


def done_of(done: Round) -> dict[str, float]:
    return {"documents": done.documents, "seconds": done.seconds, "rate": done.rate}
