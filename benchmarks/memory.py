"""Does a longer backlog cost memory?  The worker's peak with 10,000 and with 100,000 documents waiting.

The bounds are small enough that the buffer, and what the Kafka client fetches ahead, are full in both.
"""

from __future__ import annotations

import asyncio
import statistics

from benchmarks.arena import SETTLE_S, Arena, Ours
from benchmarks.machine import peak_rss
from benchmarks.report import Goal, Section, number, table
from benchmarks.scale import Scale

BACKLOGS = (10_000, 100_000)
GOAL = 50  # bytes
SMALL_BOUNDS = {
    "model": {"id": "builtin:hash"},
    "buffer": {"max_documents": 2048},
    "kafka": {"max_partition_fetch_bytes": 128 * 1024, "fetch_max_bytes": 1024 * 1024},
}


async def run(arena: Arena, scale: Scale) -> Section:
    peaks: dict[int, list[int]] = {size: [] for size in BACKLOGS}
    for _ in range(scale.rounds):
        for size in BACKLOGS:
            peaks[size].append(await peak(arena, size))
    few, many = BACKLOGS
    low, high = statistics.median(peaks[few]), statistics.median(peaks[many])
    each = (high - low) / (many - few)
    section = Section("Memory", [Goal("memory per additional document", each, GOAL, False, "bytes")])
    rows = [[f"{size:,}", *(number(peak / 2**20) for peak in found)] for size, found in peaks.items()]
    section.text += [
        table(["backlog", *(f"round {n + 1}, MiB" for n in range(scale.rounds))], rows),
        "Peak resident memory of an `inferstream run` with `builtin:hash`, buffer.max_documents 2048: a new process "
        "for each number. A goal on the difference of the medians, by the difference of the backlogs.",
    ]
    section.data = {"peaks": {str(size): found for size, found in peaks.items()}, "bytes_per_document": each}
    return section


async def peak(arena: Arena, documents: int) -> int:
    """The most memory a fresh worker held while it answered a backlog, in bytes."""
    worker = Ours(arena, f"memory-{documents}", await arena.topics("memory"), SMALL_BOUNDS)
    try:
        await worker.ready(arena)
        await asyncio.sleep(SETTLE_S)
        await arena.round(worker, arena.corpus.take(documents))
        return peak_rss(worker.pid)
    finally:
        worker.stop()
