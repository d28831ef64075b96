"""How long a document takes when there is room: Poisson arrivals at 30 % of the peak.

Both topics have the broker's append time, so end to end is result appended minus document appended, on one
clock, from the records themselves.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiokafka import AIOKafkaProducer

from benchmarks.arena import PARTITIONS, ROUND_S, SETTLE_S, Arena, Watched
from benchmarks.documents import records
from benchmarks.machine import cpu_seconds
from benchmarks.pipe import HASH
from benchmarks.report import Goal, Section, number, percentile, table
from benchmarks.scale import MODEL, Scale
from inferstream.settings import Settings

OURS = {"model": {"id": MODEL, "dtype": "float32"}}  # as under backlog
LOAD = 0.3  # of the peak
SEED = 7
WARM_UP = 50  # documents before those that count
LINGER_MS = Settings().batch.linger_ms


@dataclass(frozen=True, slots=True)
class Stream:
    """What a stream of arrivals saw; milliseconds.

    ``batches`` are times on the device; ``batch_max_tokens`` is how large they might be.
    """

    latencies: list[float]
    batches: list[float]
    batch_max_tokens: int
    worker_cpu_s: float
    broker_cpu_s: float
    publisher_cpu_s: float

    def row(self, name: str) -> list[str]:
        shares = (0.5, 0.9, 0.99, 1.0)
        count = len(self.latencies)
        costs = (self.worker_cpu_s, self.broker_cpu_s, self.publisher_cpu_s)
        return [
            name,
            f"{count:,}",
            *(number(percentile(self.latencies, share)) for share in shares),
            number(percentile(self.batches, 0.99)),
            *(number(seconds * 1e3 / count) for seconds in costs),
        ]


async def run(arena: Arena, scale: Scale, peak: float, batch_max_tokens: int) -> Section:
    """``peak`` in documents per second under backlog, reached with batches of so many tokens.

    Raises ValueError if latency is measured with others: large batches for one and small ones for the other would be
    two workers.
    """
    rate = LOAD * peak
    model = await stream(arena, "latency", OURS, rate, scale.latency_documents)
    if model.batch_max_tokens != batch_max_tokens:
        raise ValueError(
            f"batch.max_tokens is {model.batch_max_tokens} here and {batch_max_tokens} where the peak is from"
        )
    pipe = await stream(arena, "latency-pipe", HASH, rate, scale.latency_pipe_documents)
    batch_ms, pipe_ms = percentile(model.batches, 0.99), percentile(pipe.latencies, 0.99)
    bound = LINGER_MS + 2 * batch_ms + pipe_ms
    goal = Goal("p99, end to end", percentile(model.latencies, 0.99), bound, False, "ms")
    section = Section("Latency", [goal])
    times = ["p50 ms", "p90 ms", "p99 ms", "highest", "p99 of a batch"]
    head = ["", "documents", *times, "worker's CPU ms/document", "broker's", "publisher's"]
    section.text += [
        table(head, [model.row("all-MiniLM-L6-v2, float32"), pipe.row("builtin:hash")]),
        f"Poisson arrivals at {number(rate)} documents/s, {LOAD:.0%} of the peak of {number(peak)}. The bound is "
        f"linger ({LINGER_MS:g} ms) + 2 × p99 of a batch on the device ({number(batch_ms)} ms) + p99 of builtin:hash "
        f"under the same arrivals ({number(pipe_ms)} ms): a document that finds the device busy waits for one batch "
        f"and then is in one. batch.max_tokens is {batch_max_tokens:,} here as under backlog.",
    ]
    section.data = {
        "rate": rate,
        "peak": peak,
        "batch_max_tokens": batch_max_tokens,
        "p50_ms": percentile(model.latencies, 0.5),
        "p99_ms": percentile(model.latencies, 0.99),
        "batch_p99_ms": batch_ms,
        "pipe_p50_ms": percentile(pipe.latencies, 0.5),
        "pipe_p99_ms": pipe_ms,
    }
    return section


async def stream(arena: Arena, name: str, changes: Mapping[str, Any], rate: float, count: int) -> Stream:
    """Send ``count`` documents at Poisson times and read what became of them."""
    topics = await arena.topics(name)
    worker = Watched(arena, name, topics, changes)
    texts = arena.corpus.take(WARM_UP + count)
    producer = AIOKafkaProducer(bootstrap_servers=arena.bootstrap, linger_ms=0)
    await producer.start()
    try:
        await worker.ready(arena)
        await asyncio.sleep(SETTLE_S)
        await send(producer, topics.source, texts[:WARM_UP], rate)
        await _answered(arena, topics.target, WARM_UP, worker)
        await worker.mark()
        worker_cpu, broker_cpu, own_cpu = cpu_seconds(worker.pid), arena.broker_cpu_s(), time.process_time()
        await send(producer, topics.source, texts[WARM_UP:], rate)
        own_cpu = time.process_time() - own_cpu
        await _answered(arena, topics.target, WARM_UP + count, worker)
        worker_cpu, broker_cpu = cpu_seconds(worker.pid) - worker_cpu, arena.broker_cpu_s() - broker_cpu
        seen = await worker.seen()
    finally:
        await producer.stop()
        worker.stop()
    answered = await arena.broker.read_all(topics.target)
    results = sorted(
        (orjson.loads(record.value)["source"]["timestamp_ms"], record.timestamp) for record in answered
    )
    latencies = [float(appended - arrived) for arrived, appended in results[WARM_UP:]]
    batches = [seconds * 1e3 for seconds in seen["batch_s"]]
    return Stream(latencies, batches, seen["batch_max_tokens"], worker_cpu, broker_cpu, own_cpu)


def arrivals(count: int, rate: float) -> list[float]:
    """Times of Poisson arrivals in seconds; the same on every run."""
    chance = random.Random(SEED)
    at, times = 0.0, []
    for _ in range(count):
        at += chance.expovariate(rate)
        times.append(at)
    return times


async def send(producer: AIOKafkaProducer, topic: str, texts: Sequence[str], rate: float) -> None:
    """Send each text at its time, whatever became of those before."""
    started = time.perf_counter()
    sent = []
    for n, (at, (key, value)) in enumerate(
        zip(arrivals(len(texts), rate), records(list(texts)), strict=True)
    ):
        if (early := at - (time.perf_counter() - started)) > 0:
            await asyncio.sleep(early)
        sent.append(await producer.send(topic, value, key=key, partition=n % PARTITIONS))
    await asyncio.gather(*sent)


async def _answered(arena: Arena, topic: str, count: int, worker: Watched) -> None:
    deadline = time.monotonic() + ROUND_S
    while sum((await arena.broker.end_offsets(topic)).values()) < count:
        worker.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{worker.name} has not answered {count} documents after {ROUND_S:.0f} s")
        await asyncio.sleep(0.2)
