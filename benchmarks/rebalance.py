"""What a rebalance costs: time without progress and documents repeated when a member joins, leaves and dies.

    python -m benchmarks.rebalance                # three minutes at most on two cores

Documents arrive evenly, far fewer than a worker can do, so what is measured is the group and not a backlog.  Two
workers with `builtin:hash` on one real broker; the second joins, is drained, joins again and is killed.  The first
result of each document counts; its time is its record's, when it was handed to the producer.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import orjson
from aiokafka import AIOKafkaProducer, ConsumerRecord

from benchmarks.machine import hardware
from benchmarks.report import number, table
from tests.support.broker import create_broker
from tests.support.client import Kafka
from tests.support.worker import Worker, merged, settings

PARTITIONS = 8
ROUNDS = 3
RATE = 400  # documents/s, over all partitions
TURN_S = 0.02
STEADY_S = 2.0
SESSION_S = 6
WAIT_S = 60.0
# A transaction that a dead worker leaves is swept away once a second, not every ten.
BROKER = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000"}
GUARANTEES = {
    "at-least-once": {"delivery": {"commit_interval_ms": 100}},
    "exactly-once": {
        "delivery": {"guarantee": "exactly-once", "commit_interval_ms": 100, "transaction_timeout_ms": 3000}
    },
}
EVENTS = ("joins", "leaves", "dies")


@dataclass(frozen=True, slots=True)
class Result:
    """One record of the output: which input record it answers, and when it was produced (Unix seconds)."""

    partition: int
    offset: int
    at: float


@dataclass(frozen=True, slots=True)
class Window:
    """An event and the time until the next one (Unix seconds)."""

    event: str
    start: float
    end: float


@dataclass(slots=True)
class Found:
    """What one guarantee's run found; per event, a number for each time that it happened."""

    pauses_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    repeats: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    documents: int = 0
    missing: int = 0


def longest_pause(results: Sequence[Result], window: Window) -> float:
    """The longest time, in seconds, for which some partition had no first result, if its middle is in the window.

    It begins before the event that is its cause: with the last result.
    """
    times: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for result in results:
        times[result.partition].setdefault(result.offset, result.at)
    return max(
        later - earlier
        for first in times.values()
        for earlier, later in pairwise(sorted(first.values()))
        if window.start <= (earlier + later) / 2 < window.end
    )


def repeats(results: Sequence[Result], window: Window) -> int:
    """How many results came in the window that answer what was answered before."""
    seen: set[tuple[int, int]] = set()
    count = 0
    for result in results:
        if (result.partition, result.offset) in seen:
            count += window.start <= result.at < window.end
        seen.add((result.partition, result.offset))
    return count


def as_result(record: ConsumerRecord) -> Result:
    source = orjson.loads(record.value)["source"]
    return Result(source["partition"], source["offset"], record.timestamp / 1000)


class Feed:
    """Documents at an even rate, until it is stopped."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._kafka = kafka
        self._topic = topic
        self._stop = asyncio.Event()

    async def run(self) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self._kafka.bootstrap)
        await producer.start()
        try:
            start = time.monotonic()
            for n, due in enumerate(itertools.count(start, 1 / RATE)):
                if self._stop.is_set():
                    return
                if due - time.monotonic() > TURN_S:
                    await asyncio.sleep(TURN_S)
                value = orjson.dumps({"id": n, "text": f"document {n}"})
                await producer.send(self._topic, value, partition=n % PARTITIONS)
        finally:
            await producer.stop()

    def stop(self) -> None:
        self._stop.set()


async def assigned(worker: Worker, times: int = 1) -> None:
    """Wait until the worker has been given partitions so often."""
    deadline = time.monotonic() + WAIT_S
    while worker.stderr_text().count('"message":"assigned"') < times:
        if worker.returncode is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the worker was not assigned anything:\n{worker.stderr_text()[-2000:]}")
        await asyncio.sleep(TURN_S)


async def measure(kafka: Kafka, guarantee: str, folder: Path) -> Found:
    source = await kafka.create_topic(kafka.unique("rebalance-in"), PARTITIONS)
    target = await kafka.create_topic(kafka.unique("rebalance-out"), PARTITIONS)
    await kafka.create_topic(f"{target}.dead-letters", configs={"max.message.bytes": str(2 << 20)})
    changes = {
        "kafka": {"session_timeout_ms": SESSION_S * 1000, "heartbeat_interval_ms": 1000},
        "telemetry": {"log_format": "json"},
    }
    tree = settings(
        kafka.bootstrap, source, target, kafka.unique("group"), merged(changes, GUARANTEES[guarantee])
    )
    feed = Feed(kafka, source)
    feeding = asyncio.create_task(feed.run())
    workers: list[Worker] = []

    def launch() -> Worker:
        workers.append(Worker(folder / f"{guarantee}-{len(workers)}", tree).start())
        return workers[-1]

    events: list[tuple[str, float]] = []
    try:
        first, seen = launch(), 1
        await assigned(first)
        await asyncio.sleep(STEADY_S)
        for _ in range(ROUNDS):
            for end in ("leaves", "dies"):
                events.append(("joins", time.time()))
                second = launch()
                await assigned(second)
                await asyncio.sleep(STEADY_S)
                events.append((end, time.time()))
                if end == "leaves":
                    second.terminate()
                    await second.ended()
                else:
                    second.kill9()
                    await second.ended()
                seen += 2
                await assigned(first, seen)
                await asyncio.sleep(STEADY_S)
        feed.stop()
        await feeding
        ends = await kafka.end_offsets(source)
        found, results = Found(documents=sum(ends.values())), list[Result]()
        deadline = time.monotonic() + WAIT_S
        while True:  # until the last documents are answered
            results = [as_result(record) for record in await kafka.read_all(target)]
            found.missing = found.documents - len({(result.partition, result.offset) for result in results})
            if not found.missing or time.monotonic() > deadline:
                break
            await asyncio.sleep(STEADY_S)
    finally:
        feed.stop()
        await asyncio.gather(feeding, return_exceptions=True)
        for worker in workers:
            worker.kill9()
    for (event, start), (_, end_at) in pairwise([*events, ("end", time.time())]):
        window = Window(event, start, end_at)
        found.pauses_s[event].append(longest_pause(results, window))
        found.repeats[event].append(repeats(results, window))
    return found


def rows(guarantee: str, found: Found) -> list[list[str]]:
    return [
        [
            guarantee,
            event,
            number(statistics.median(found.pauses_s[event])),
            f"{number(min(found.pauses_s[event]))} – {number(max(found.pauses_s[event]))}",
            number(statistics.median(found.repeats[event])),
            str(max(found.repeats[event])),
            str(found.missing),
        ]
        for event in EVENTS
    ]


async def run(folder: Path) -> list[list[str]]:
    broker = create_broker(folder / "kafka", BROKER)
    try:
        return [
            row
            for guarantee in GUARANTEES
            for row in rows(guarantee, await measure(broker, guarantee, folder))
        ]
    finally:
        broker.remove()


def main() -> int:
    head = [
        "delivery",
        "a member",
        "s without progress, median",
        "lowest – highest",
        "documents repeated, median",
        "most",
        "missing",
    ]
    with tempfile.TemporaryDirectory(prefix="inferstream-rebalance-") as folder:
        found = asyncio.run(run(Path(folder)))
    machine = hardware()
    print(table(head, found))
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores, {machine['memory']}; {RATE} documents/s on {PARTITIONS} "
        f"partitions; heartbeats every second, sessions of {SESSION_S} s; {ROUNDS} of each, joins twice that."
    )
    return 1 if any(row[-1] != "0" for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
