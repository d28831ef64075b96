"""What a running worker rarely meets and must survive: rebalances at bad moments, logs that go back, long stops."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.partitioner import murmur2

from inferstream.kafka.source import Source
from inferstream.lanes import Lane
from inferstream.settings import load_settings, resolve
from inferstream.telemetry.timeline import Timeline
from tests.kafka.test_killed_in_the_middle import (
    SLOW,
    caught_up,
    documents,
    has_results,
    make_topics,
    until,
)
from tests.support.client import Kafka
from tests.support.judge import judge
from tests.support.worker import Worker, settings


class Devourer:
    """An intake that has credit without end, and forgets each record at once but for its offset."""

    def __init__(self) -> None:
        self.closing_s = 0.05  # long enough for a fetch to come back meanwhile
        self.admitted: dict[int, set[int]] = defaultdict(set)

    def open_lane(self, lane: Lane) -> None: ...

    def poll_limit(self, lanes: Sequence[Lane]) -> tuple[Sequence[Lane], int]:
        return lanes, 500

    def admit(self, lane: Lane, records: Sequence[Any]) -> None:
        for record in records:
            lane.admit(record, 1)
            self.admitted[lane.partition].add(record.offset)

    async def wait_for_credit(self, timeout_s: float) -> None:
        await asyncio.sleep(0.001)

    async def close_lanes(self, lanes: Sequence[Lane], timeout_s: float) -> bool:
        await asyncio.sleep(self.closing_s)
        for lane in lanes:
            for slot in list(lane):
                lane.complete(slot, None)  # type: ignore[arg-type]  # nobody looks at it
            for slot in lane.release():
                lane.acknowledge(slot)
        return True

    def drop_lanes(self, lanes: Sequence[Lane]) -> None: ...

    def committed(self, lane: Lane, settled: int) -> None: ...

    # as the source's listener

    def assigned(self, lanes: Sequence[Lane]) -> None: ...

    def revoked(self, lanes: Sequence[Lane]) -> None: ...

    def commit_ended(self, outcome: str) -> None: ...


@pytest.fixture
async def devouring(kafka: Kafka) -> AsyncIterator[tuple[Source, Devourer, str, str]]:
    """A source that runs in this process, its intake, its topic and its group."""
    topic, target, group = await make_topics(kafka, "devoured", 0)
    flags = {
        "kafka.bootstrap_servers": [kafka.bootstrap],
        "kafka.group_id": group,
        "kafka.heartbeat_interval_ms": 200,
        "input.topics": [topic],
        "output.topic": target,
        "model.id": "builtin:hash",
    }
    intake = Devourer()
    source = Source(resolve(load_settings((), {}, flags).settings, "hash", 2), intake, intake, Timeline())
    await source.start()
    source.subscribe()
    polling = asyncio.create_task(source.run())
    yield source, intake, topic, group
    polling.cancel()
    await source.stop(5)


Devouring = tuple[Source, Devourer, str, str]


async def read_to_the_end(kafka: Kafka, source: Source, topic: str) -> dict[int, int]:
    ends = await kafka.end_offsets(topic)

    async def read() -> bool:
        return bool(source.lanes) and all(lane.position == ends[lane.partition] for lane in source.lanes)

    await until(read, 60, "the source to read to the end")
    return ends


@pytest.mark.timeout(120)
async def test_poll_when_it_waits_over_a_rebalance_then_no_record_is_passed_over(
    kafka: Kafka, devouring: Devouring
) -> None:
    source, intake, topic, _ = devouring
    rebalances = 0
    while rebalances < 15:
        await kafka.produce(topic, documents(500))
        if not source.rebalancing and source.lanes:
            source.consumer._coordinator.request_rejoin()
            rebalances += 1
    ends = await read_to_the_end(kafka, source, topic)
    for partition, end in ends.items():
        assert set(range(end)) - intake.admitted[partition] == set()


@pytest.mark.parametrize("first", ["drain", "rebalance"])
async def test_drain_when_it_meets_a_rebalance_then_all_that_was_finished_is_committed(
    kafka: Kafka, devouring: Devouring, first: str
) -> None:
    source, intake, topic, group = devouring
    await kafka.produce(topic, documents(200))
    ends = await read_to_the_end(kafka, source, topic)
    intake.closing_s = 1.0
    if first == "drain":
        drain = asyncio.create_task(source.drain(10))
        await asyncio.sleep(0.2)
        source.consumer._coordinator.request_rejoin()
    else:
        source.consumer._coordinator.request_rejoin()
        await asyncio.sleep(0.2)
        assert source.rebalancing
        drain = asyncio.create_task(source.drain(10))
    assert await drain
    assert await kafka.committed(group, topic) == ends


@pytest.mark.timeout(120)
async def test_offset_when_it_lies_past_the_end_then_skip_goes_back_to_the_oldest_record(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "goes-back", 40)
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, group_id=group, enable_auto_commit=False)
    await consumer.start()
    consumer.assign([TopicPartition(source, 0)])
    await consumer.commit({TopicPartition(source, 0): 1000})  # as after the topic was made anew
    await consumer.stop()
    worker = launch(settings(kafka.bootstrap, source, target, group, {"input": {"on_lost_range": "skip"}}))
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    assert judge(await kafka.read_all(target)).missing(await kafka.end_offsets(source)) == []


@pytest.mark.timeout(120)
async def test_member_when_it_is_stopped_past_its_session_then_nothing_is_missing(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "stopped", 20_000)
    tree = settings(kafka.bootstrap, source, target, group, SLOW)
    stopped = launch(tree)

    await until(lambda: has_results(kafka, target, 501), 60, "the first results")
    os.kill(stopped.pid, signal.SIGSTOP)
    other = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 60, "the other member to take over")
    os.kill(stopped.pid, signal.SIGCONT)
    await kafka.produce(source, documents(400))
    await until(lambda: caught_up(kafka, group, source), 60, "both to catch up")
    for worker in (stopped, other):
        worker.terminate()
    for worker in (stopped, other):
        assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    assert judge(await kafka.read_all(target)).missing(await kafka.end_offsets(source)) == []


@pytest.mark.timeout(120)
async def test_members_when_there_are_more_than_partitions_then_the_idle_one_stays_and_drains(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source = await kafka.create_topic(kafka.unique("one-partition"), partitions=1)
    _, target, group = await make_topics(kafka, "idle", 0)
    tree = settings(kafka.bootstrap, source, target, group)
    workers = [launch(tree), launch(tree)]
    for worker in workers:
        await worker.says("assigned", 60)
    await kafka.produce(source, documents(100))
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    for worker in workers:
        worker.terminate()
    for worker in workers:
        assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    assert judge(await kafka.read_all(target)).missing({0: 100}) == []


@pytest.mark.timeout(120)
async def test_topics_when_their_partition_counts_differ_then_each_goes_by_its_own_rule(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    aligned, target, group = await make_topics(kafka, "aligned", 100)
    other = await kafka.create_topic(kafka.unique("three-partitions"), partitions=3)
    await kafka.produce(other, documents(100))
    worker = launch(
        settings(kafka.bootstrap, aligned, target, group, {"input": {"topics": [aligned, other]}})
    )
    for topic in (aligned, other):
        await until(lambda topic=topic: caught_up(kafka, group, topic), 60, "the worker to catch up")
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    results = await kafka.read_all(target)
    assert len(results) == 200
    for record in results:
        origin = orjson.loads(record.value)["source"]
        by_key = (murmur2(record.key) & 0x7FFFFFFF) % 4
        assert record.partition == (origin["partition"] if origin["topic"] == aligned else by_key)


TINY = {
    "buffer": {"max_documents": 1, "max_tokens": 1, "max_bytes": 1024},
    "delivery": {"max_uncommitted_documents": 2, "commit_interval_ms": 60_000},
    "batch": {"max_tokens": 1},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("order", ["partition", "none"])
async def test_worker_when_every_bound_is_tiny_then_it_still_gets_through(
    kafka: Kafka, launch: Callable[..., Worker], order: str
) -> None:
    source, target, group = await make_topics(kafka, "tiny", 60)
    worker = launch(
        settings(
            kafka.bootstrap, source, target, group, {**TINY, "delivery": {**TINY["delivery"], "order": order}}
        )
    )
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == [] and verdict.repeats == 0
