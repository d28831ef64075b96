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
from benchmarks.report import Goal, Section, number, table
from benchmarks.scale import Scale
from inferstream.tasks.hash import CHARACTERS_PER_TOKEN

DOCUMENTS_PER_S = 15_000
MAX_LENGTH = 256
WIDTH = 8
GOAL = 0.01
SATURATED = 0.03  # of the device's time without a batch: from here on the path holds it back
RATES = (20_000, 25_000, 30_000, 35_000, 40_000, 50_000)
SEARCH_SHARE = 0.4  # of the documents, for each of the higher rates

# What the settings would be on the GPU that is stood in for.
AS_ON_A_GPU = {
    "model": {"id": "builtin:hash", "max_length": MAX_LENGTH},
    "batch": {"max_tokens": 32_768},
    "buffer": {"max_documents": 16_384, "max_bytes": 256 * 2**20},
}


def mean_tokens(texts: Sequence[str]) -> float:
    """Tokens per document as builtin:hash counts them, cut at MAX_LENGTH."""
    return statistics.fmean(min(MAX_LENGTH, len(text) // CHARACTERS_PER_TOKEN + 1) for text in texts)


async def run(arena: Arena, scale: Scale) -> Section:
    texts = arena.corpus.take(scale.paced_documents)
    done, seen = await _at(arena, texts, DOCUMENTS_PER_S)
    section = _section(done, seen, mean_tokens(texts))
    fewer = texts[: int(len(texts) * SEARCH_SHARE)]
    idle: dict[int, float] = {}
    for rate in RATES:
        _, faster = await _at(arena, fewer, rate)
        idle[rate] = faster["idle_ratio"]
        if idle[rate] >= SATURATED:
            break
    rows = [[f"{rate:,}", f"{100 * ratio:.2f} %"] for rate, ratio in idle.items()]
    section.text.append(
        "How fast a device may be on these cores until it waits for 3 % of its time:\n\n"
        + table(["device, documents/s", "idle"], rows)
    )
    section.data["idle_by_rate"] = idle
    return section


async def _at(arena: Arena, texts: Sequence[str], documents_per_s: int) -> tuple[Round, dict[str, Any]]:
    """A backlog in front of a device of that rate, and what was seen inside the worker."""
    tokens = mean_tokens(texts)
    topics = await arena.topics("paced")
    pace = {"paced": {"tokens_per_s": documents_per_s * tokens, "width": WIDTH}}
    worker = Watched(arena, "paced", topics, AS_ON_A_GPU, pace)
    try:
        await worker.ready(arena)
        await asyncio.sleep(SETTLE_S)
        await arena.round(worker, texts[: len(texts) // 10])  # what is paid once
        await worker.mark()
        done = await arena.round(worker, texts)
        seen = await worker.seen()
    finally:
        worker.stop()
    return done, seen


def _section(done: Round, seen: dict[str, Any], tokens: float) -> Section:
    count = done.documents
    goal = Goal(f"idle at {DOCUMENTS_PER_S:,} documents/s", 100 * seen["idle_ratio"], 100 * GOAL, False, "%")
    section = Section("A paced device", [goal])
    rows = [[name, number(seconds * 1e6 / count)] for name, seconds in stage_seconds(seen, done).items()]
    section.text += [
        f"A device that takes the time of one at {DOCUMENTS_PER_S:,} documents/s ({number(tokens)} tokens each on "
        "average) and computes nothing; preparing as for builtin:hash, vectors of 8 numbers. "
        f"{count:,} documents went through at {number(done.rate)} documents/s; idle is the share of the device's own "
        "time without a batch, between the first and last 5 % of the documents.",
        table(["CPU µs/document", ""], rows),
    ]
    section.data = {"round": done_of(done), "seen": seen | {"batches": len(seen["batches"])}}
    return section


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
