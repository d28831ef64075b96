"""What a running worker rarely meets: rebalances at bad moments, logs that go back, long stops, refusals, and
documents that unpack to thousands of times their size."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.errors import (
    CorruptRecordException,
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    KafkaError,
)
from aiokafka.partitioner import murmur2
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from inferstream.errors import KafkaRefused
from inferstream.kafka.epochs import Epoch
from inferstream.kafka.notes import Note
from inferstream.kafka.polling import poll
from inferstream.kafka.refusals import refusal_of
from inferstream.kafka.source import Source
from inferstream.lanes import Lane
from inferstream.settings import load_settings, resolve
from inferstream.telemetry.timeline import Timeline
from tests.conftest import start_broker
from tests.kafka.test_killed_in_the_middle import (
    SLOW,
    caught_up,
    documents,
    has_results,
    make_topics,
    until,
)
from tests.kafka.test_life_cycle import scraped
from tests.support.broker import free_ports
from tests.support.client import Kafka
from tests.support.judge import judge
from tests.support.worker import Worker, merged, settings


class Devourer:
    """An intake that has credit without end, and forgets each record at once but for its offset."""

    def __init__(self) -> None:
        self.closing_s = 0.05  # long enough for a fetch to come back meanwhile
        self.finishes = True  # whether a closing finishes what is in work
        self.admitted: dict[int, set[int]] = defaultdict(set)
        self.polling: asyncio.Task[None] | None = None

    def open_lanes(self, lanes: Sequence[Lane], epoch: int) -> None:
        for lane in lanes:
            if lane.suspended:
                lane.resume(epoch)

    def poll_limit(self, lanes: Sequence[Lane]) -> tuple[Sequence[Lane], int]:
        return lanes, 500

    def admit(self, lane: Lane, records: Sequence[Any]) -> None:
        for record in records:
            lane.admit(record, 1)
            self.admitted[lane.partition].add(record.offset)

    async def wait_for_credit(self, timeout_s: float) -> None:
        await asyncio.sleep(0.001)

    async def close_lanes(self, lanes: Sequence[Lane], timeout_s: float, *, for_good: bool = True) -> bool:
        await asyncio.sleep(self.closing_s)
        for lane in lanes if self.finishes else ():
            for slot in list(lane):
                lane.complete(slot, None)  # type: ignore[arg-type]  # nobody looks at it
            for slot in lane.release():
                lane.acknowledge(slot)
        return self.finishes

    def suspend_lanes(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            lane.suspend()

    def drop_lanes(self, lanes: Sequence[Lane]) -> None: ...

    def committed(self, lane: Lane, settled: int) -> None: ...

    # as the source's listener

    def assigned(self, lanes: Sequence[Lane]) -> None: ...

    def revoked(self, lanes: Sequence[Lane]) -> None: ...

    def commit_ended(self, outcome: str) -> None: ...

    def lost(self, topic: str, count: int) -> None: ...


@asynccontextmanager
async def devour(kafka: Kafka, topic: str, target: str, group: str) -> AsyncIterator[tuple[Source, Devourer]]:
    """A source that runs in this process, and its intake."""
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
    intake.polling = asyncio.create_task(source.run())
    try:
        yield source, intake
    finally:
        intake.polling.cancel()
        await source.stop(5)


@pytest.fixture
async def devouring(kafka: Kafka) -> AsyncIterator[tuple[Source, Devourer, str, str]]:
    """A source that runs in this process, its intake, its topic and its group."""
    topic, target, group = await make_topics(kafka, "devoured", 0)
    async with devour(kafka, topic, target, group) as (source, intake):
        yield source, intake, topic, group


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


async def test_offset_when_it_is_moved_while_lanes_are_suspended_then_they_begin_there(
    kafka: Kafka, devouring: Devouring, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, intake, topic, _ = devouring
    await kafka.produce(topic, documents(200))
    ends = await read_to_the_end(kafka, source, topic)
    settle = source._settle

    async def settle_and_move(epoch: Epoch, timeout_s: float) -> bool:
        settled = await settle(epoch, timeout_s)
        if epoch.closing:
            await source._committer.commit(epoch, {TopicPartition(topic, 0): (7, "")}, timeout_s)
        return settled

    monkeypatch.setattr(source, "_settle", settle_and_move)
    intake.admitted.clear()
    source.consumer._coordinator.request_rejoin()

    async def read_again() -> bool:
        return intake.admitted[0] == set(range(7, ends[0]))

    await until(read_again, 30, "the partition to be read from there")
    assert list(intake.admitted) == [0], "the others were not moved"


async def test_documents_when_they_outlast_many_rebalances_then_they_are_kept_and_nobody_suspects_them(
    kafka: Kafka, devouring: Devouring
) -> None:
    source, intake, topic, _ = devouring
    intake.finishes = False
    await kafka.produce(topic, documents(200))
    await read_to_the_end(kafka, source, topic)
    lanes, generations = source.lanes, set[int]()
    for _ in range(5):  # more than delivery.max_crash_attempts
        epoch = source._epoch
        assert epoch is not None
        generations.add(epoch.identity.generation)
        source.consumer._coordinator.request_rejoin()

        async def opened(before: Epoch = epoch) -> bool:
            return source._epoch not in (None, before) and bool(source.lanes)

        await until(opened, 30, "the next epoch to open")
    assert len(generations) == 5 and source.lanes == lanes, "the lanes themselves went on"
    assert sum(map(len, lanes)) == 200
    assert source._epoch is not None and source._epoch.caution is None
    partitions = [TopicPartition(topic, lane.partition) for lane in lanes]
    offsets = await source.settler.offsets(partitions, [])
    assert {Note.parse(entry.metadata).attempts for entry in offsets.values()} <= {0, 1}


@pytest.mark.parametrize("end", ["drain", "refused by Kafka"])
async def test_documents_when_they_go_one_at_a_time_then_an_orderly_end_leaves_none_of_them_named(
    kafka: Kafka, end: str
) -> None:
    topic, target, group = await make_topics(kafka, "named", 200)
    partitions = [TopicPartition(topic, partition) for partition in await kafka.end_offsets(topic)]
    found = f"partitions={len(partitions)};attempts=3"
    async with AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, group_id=group) as dead:
        dead.assign(partitions)
        await dead.commit(dict.fromkeys(partitions, (0, found)))

    async with devour(kafka, topic, target, group) as (source, intake):
        intake.finishes = False
        epochs = []
        for _ in range(2):

            async def one_is_named() -> bool:
                notes = [Note.parse(note) for _, note in (await kafka.commits(group, topic)).values()]
                epoch = source._epoch
                new = epoch is not None and epoch not in epochs and epoch.gate.is_set()
                return new and [note.suspect for note in notes if note.suspect is not None] == [0]

            await until(one_is_named, 30, "a document to be named")
            assert source._epoch is not None and source._epoch.caution is not None
            assert source._epoch.condemned == {}, "nothing died of what was named in the epoch before"
            epochs.append(source._epoch)
            if len(epochs) == 1:
                source.consumer._coordinator.request_rejoin()
        if end == "drain":
            assert not await source.drain(1), "the named one was not finished"
        else:
            await source.acquit(5)
        assert set((await kafka.commits(group, topic)).values()) == {(0, found)}


async def test_batch_when_it_cannot_be_read_then_the_log_says_which_and_not_at_every_poll(
    kafka: Kafka, devouring: Devouring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, _, topic, _ = devouring
    polls = 0

    async def corrupt() -> None:
        nonlocal polls
        polls += 1
        raise CorruptRecordException(f"Invalid CRC - {TopicPartition(topic, 1)}")

    async def polled() -> bool:
        return polls >= 3

    monkeypatch.setattr(source, "_poll", corrupt)
    await until(polled, 30, "a few polls")
    said = [vars(record)["error"] for record in caplog.records if "cannot be read" in record.message]
    assert len(said) == 1 and f"topic='{topic}', partition=1" in said[0]


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
    [port] = free_ports(1)
    stopped = launch(merged(tree, {"telemetry": {"port": port}}))

    await until(lambda: has_results(kafka, target, 501), 60, "the first results")
    os.kill(stopped.pid, signal.SIGSTOP)
    other = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 60, "the other member to take over")
    os.kill(stopped.pid, signal.SIGCONT)
    await stopped.says("its work in flight is dropped(?s:.*)assigned")  # it has joined again
    metrics = await asyncio.to_thread(scraped, port)
    dropped = re.search(r"^inferstream_documents_dropped_total (\S+)", metrics, re.MULTILINE)
    assert dropped is not None and float(dropped[1]) > 0
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


# ---- what a group refuses


async def test_session_timeout_when_outside_the_brokers_bounds_then_exits_3_naming_it(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "session", 0)
    changes = {"kafka": {"session_timeout_ms": 1000, "heartbeat_interval_ms": 300}}
    worker = launch(settings(kafka.bootstrap, source, target, group, changes))
    assert await worker.ended(60) == 3, worker.stderr_text()[-2000:]
    [line] = [line for line in worker.stderr_text().splitlines() if line.startswith("inferstream: error")]
    assert "kafka.session_timeout_ms=1000" in line and "group.min.session.timeout.ms" in line


async def test_group_when_its_members_speak_of_another_assignor_then_exits_3_naming_it(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "assignor", 0)
    async with kafka.member_of_another_kind(group, source):
        worker = launch(settings(kafka.bootstrap, source, target, group))
        assert await worker.ended(60) == 3, worker.stderr_text()[-2000:]
    assert "members of another kind" in worker.stderr_text() and group in worker.stderr_text()


@pytest.fixture(scope="module")
def strict_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker whose groups have one member, and that refuses what an ACL says."""
    broker = start_broker(
        tmp_path_factory.mktemp("strict"),
        {
            "group.max.size": "1",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        },
    )
    yield broker
    broker.remove()


@pytest.mark.kafka
@pytest.mark.timeout(120)
async def test_group_when_it_is_full_then_exits_3_naming_it(
    strict_broker: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(strict_broker, "full", 0)
    tree = settings(strict_broker.bootstrap, source, target, group)
    first = launch(tree)
    await first.says('"assigned"', 60)
    second = launch(tree)
    assert await second.ended(60) == 3, second.stderr_text()[-2000:]
    assert "group.max.size" in second.stderr_text()
    assert first.returncode is None


@pytest.mark.kafka
@pytest.mark.timeout(120)
async def test_group_when_the_right_to_it_is_missing_then_exits_3_naming_it(
    strict_broker: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(strict_broker, "denied", 0)
    denied = AclBinding(
        ResourceType.GROUP,
        group,
        ResourcePatternType.LITERAL,
        "User:ANONYMOUS",
        "*",
        AclOperation.READ,
        AclPermissionType.DENY,
    )
    admin = AdminClient({"bootstrap.servers": strict_broker.bootstrap})
    for done in admin.create_acls([denied]).values():
        done.result(30)
    worker = launch(settings(strict_broker.bootstrap, source, target, group))
    assert await worker.ended(60) == 3, worker.stderr_text()[-2000:]
    assert f"grant READ on group {group} to User:ANONYMOUS" in worker.stderr_text()


@pytest.mark.timeout(120)
async def test_static_members_when_two_have_the_same_identity_then_one_exits_3_naming_it(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "twins", 0)
    changes = {"kafka": {"group_instance_id": "pod-0", "heartbeat_interval_ms": 500}}
    tree = settings(kafka.bootstrap, source, target, group, changes)
    workers = [launch(tree), launch(tree)]

    async def some_ended() -> bool:
        return any(worker.returncode is not None for worker in workers)

    await until(some_ended, 60, "one of them to end")
    [ended] = [worker for worker in workers if worker.returncode is not None]
    assert ended.returncode == 3 and "kafka.group_instance_id='pod-0'" in ended.stderr_text()
    [left] = [worker for worker in workers if worker is not ended]
    await kafka.produce(source, documents(40))
    await until(lambda: caught_up(kafka, group, source), 60, "the other to go on")
    assert left.returncode is None


async def test_refusals_when_they_begin_while_running_then_end_the_worker_after_their_time(
    kafka: Kafka, devouring: Devouring, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, intake, topic, _ = devouring
    await read_to_the_end(kafka, source, topic)
    monkeypatch.setattr("inferstream.kafka.refusals.REFUSED_FOR_S", 2.0)
    source.consumer._coordinator._session_timeout_ms = 1  # as if the brokers had come back with other bounds
    source.consumer._coordinator.request_rejoin()
    assert intake.polling is not None
    began = time.monotonic()
    with pytest.raises(KafkaRefused, match=r"refused for 2 s.*group\.min\.session\.timeout\.ms"):
        await asyncio.wait_for(asyncio.shield(intake.polling), 30)
    assert time.monotonic() - began > 2.0


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (KafkaError("FencedInstanceIdError()"), "FencedInstanceIdError"),
        (KafkaError("UnknownError()"), "UnknownError"),
        (KafkaError("Unexpected exception in heartbeat task: UnknownError()"), "UnknownError"),
        (KafkaError("RequestTimedOutError()"), None),
        (KafkaError("Unable to get cluster metadata over all known brokers"), None),
        (KafkaConnectionError("gone"), None),
        (GroupAuthorizationFailedError("group"), "GroupAuthorizationFailedError"),
    ],
)
def test_refusal_when_an_error_passes_by_itself_then_it_is_none(
    error: KafkaError, refusal: str | None
) -> None:
    assert refusal_of(error) == refusal


# ---- memory


def peak_memory(worker: Worker) -> int:
    """The most memory the process has had, in MiB."""
    for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("no VmHWM")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("small_before", [0, 20_000])
async def test_memory_when_documents_unpack_to_thousands_of_times_their_size_then_stays_bounded(
    kafka: Kafka, launch: Callable[..., Worker], small_before: int
) -> None:
    """120 documents of 8 MB are some 100 kB on the wire: one fetch, and less than one poll's 500 records."""
    source = await kafka.create_topic(kafka.unique("packed"), partitions=1)
    _, target, group = await make_topics(kafka, "packed", 0)
    await kafka.produce(source, documents(small_before), linger_ms=5)
    huge = orjson.dumps({"text": "word " * 1_600_000})
    await kafka.produce(source, [(b"huge", huge)] * 120, compression_type="zstd")
    changes = {"buffer": {"max_bytes": 64 << 20}, "dead_letter": {"oversize": "strip"}}
    worker = launch(settings(kafka.bootstrap, source, target, group, changes))
    await until(lambda: caught_up(kafka, group, source), 150, "the worker to catch up")
    peak = peak_memory(worker)
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    results = await kafka.read_all(target)
    assert len(results) == small_before + 120
    assert peak < 300, f"{peak} MiB"  # some 180; all 120 documents together are 915


@pytest.fixture
async def reading(kafka: Kafka) -> AsyncIterator[tuple[AIOKafkaConsumer, TopicPartition]]:
    """A consumer of a partition with 30 small records and then 5 of 100 kB, each in a batch of its own."""
    topic = await kafka.create_topic(kafka.unique("poll"), partitions=1)
    await kafka.produce(topic, [(b"key", b"x" * 100)] * 30)
    await kafka.produce(topic, [(b"key", b"x" * 100_000)] * 5, compression_type="zstd")
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="none")
    await consumer.start()
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    consumer.seek(partition, 0)
    yield consumer, partition
    await consumer.stop()


Reading = tuple[AIOKafkaConsumer, TopicPartition]


async def polls(reading: Reading, max_records: int, max_bytes: int) -> list[list[int]]:
    """The offsets of each poll until all 35 are there."""
    consumer, partition = reading
    seen: list[list[int]] = []
    while not seen or seen[-1][-1] < 34:
        if fetched := await poll(consumer, [partition], 1000, max_records, max_bytes):
            seen.append([record.offset for record in fetched[partition]])
            assert await consumer.position(partition) == seen[-1][-1] + 1
    assert [offset for offsets in seen for offset in offsets] == list(range(35))
    return seen


async def test_poll_when_records_grow_heavy_then_ends_with_the_one_that_reaches_the_bound(
    reading: Reading,
) -> None:
    for offsets in await polls(reading, 500, 150_000):
        assert sum(100_000 for offset in offsets[:-1] if offset >= 30) < 150_000
        assert len(offsets) <= 32


async def test_poll_when_the_bound_is_tiny_then_gives_one_record_at_a_time(reading: Reading) -> None:
    assert all(len(offsets) == 1 for offsets in await polls(reading, 500, 1))


async def test_poll_when_records_are_bounded_then_gives_no_more(reading: Reading) -> None:
    assert all(len(offsets) <= 7 for offsets in await polls(reading, 7, 1 << 30))


async def test_poll_when_a_record_cannot_be_unpacked_then_those_before_it_are_given(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer, partition = reading
    unpack = PartitionRecords._consumer_record

    def broken(self: Any, tp: TopicPartition, record: Any) -> Any:
        if record.offset == 20:
            raise CorruptRecordException("no record")
        return unpack(self, tp, record)

    monkeypatch.setattr(PartitionRecords, "_consumer_record", broken)
    offsets: list[int] = []
    with pytest.raises(CorruptRecordException):
        while True:
            for record in (await poll(consumer, [partition], 1000, 500, 1 << 20)).get(partition, []):
                offsets.append(record.offset)
    assert offsets == list(range(20))
    monkeypatch.undo()
    while len(offsets) < 35:
        for record in (await poll(consumer, [partition], 1000, 500, 1 << 20)).get(partition, []):
            offsets.append(record.offset)
    assert offsets == list(range(35))


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
