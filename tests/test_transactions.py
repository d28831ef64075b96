"""Transactions without Kafka: a simulated broker, and producers that fail where the test tells them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
)
from aiokafka.structs import OffsetAndMetadata

from inferstream.documents import Kind, Outgoing
from inferstream.errors import KafkaRefused
from inferstream.kafka import sink as sink_module
from inferstream.kafka import transactions as module
from inferstream.kafka.commit import CommitFailed, EpochEnded
from inferstream.kafka.epochs import Epoch, Identity
from inferstream.kafka.sink import OutputTopic
from inferstream.kafka.transactions import Transactions
from inferstream.kafka.txn_protocol import Fenced, MemberGone
from inferstream.lanes import Lane, Slot
from inferstream.settings import load_settings
from inferstream.telemetry.timeline import Timeline
from tests.test_sink import Batch, Fake

DEADLINE_S = 10.0
IDENTITY = Identity(3, "me")


@dataclass
class Broker:
    """``fail(step)`` gives what goes wrong at ``send``, ``offsets``, ``end`` (not begun), ``answer`` (begun and lost)
    or ``start``; None when nothing does."""

    fail: Callable[[str, Any], BaseException | None] = lambda step, what: None
    visible: list[tuple[str, int, bytes]] = field(default_factory=list)
    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    open: list[tuple[str, int, bytes]] = field(default_factory=list)
    pending: dict[TopicPartition, int] = field(default_factory=dict)
    producers: list[Producer] = field(default_factory=list)
    commits: int = 0
    instances: set[str | None] = field(default_factory=set)  # that offsets came with

    def of(self, topic: str = "out") -> list[int]:
        return [int(value) for name, _, value in self.visible if name == topic]


class Producer:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.since: float | None = None
        self.gone = False

    def _step(self, step: str, what: Any = None) -> None:
        if self.gone:
            raise KafkaConnectionError("closed")
        if (error := self._broker.fail(step, what)) is not None:
            raise error

    async def start(self) -> None:
        self._step("start")
        self._broker.open.clear()
        self._broker.pending.clear()
        self._broker.producers.append(self)

    def create_batch(self) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[None]:
        self.since = time.monotonic() if self.since is None else self.since
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)
        try:
            self._step("send", (topic, batch.values))
        except KafkaError as error:
            future.set_exception(error)
            return future
        self._broker.open += [(topic, partition, value) for value in batch.values]
        future.set_result(None)
        return future

    async def add_group(self, group_id: str) -> None:
        self._step("group")

    async def commit_offsets(
        self,
        group_id: str,
        identity: Identity,
        instance: str | None,
        offsets: Mapping[TopicPartition, tuple[int, str]],
        still: Callable[[], None],
    ) -> None:
        await asyncio.sleep(0)
        still()
        self._step("offsets")
        self._broker.instances.add(instance)
        self._broker.pending = {tp: offset for tp, (offset, _) in offsets.items()}

    async def commit(self) -> None:
        self._step("end")
        await asyncio.sleep(0)
        self._broker.visible += self._broker.open
        self._broker.offsets |= self._broker.pending
        self._broker.open.clear()
        self._broker.commits += 1
        self._step("answer")

    def begin(self) -> None:
        self.since = None

    async def stable_offsets(
        self, group_id: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        found = self._broker.offsets
        return {tp: OffsetAndMetadata(found[tp], "") for tp in partitions if tp in found}

    async def discard(self) -> None:
        self.gone = True


class Listener:
    """The pipeline's part: acknowledges, and says what to send instead of a refused record."""

    def __init__(self) -> None:
        self.settled: list[Slot] = []

    def acknowledged(self, slots: list[Slot], *, committed: bool = False) -> None:
        assert committed
        self.settled += [slot for slot in slots if slot.lane.acknowledge(slot)]

    def refused(self, slot: Slot, error: KafkaError) -> Outgoing:
        assert slot.outcome is not None
        return Outgoing(Kind.DEAD_LETTER, None, slot.outcome.value, ())

    def handed_over(self, lane: Lane) -> None: ...


@dataclass
class Stage:
    """A worker's transactions with two lanes of one epoch."""

    broker: Broker
    transactions: Transactions
    listener: Listener
    coordinator: SimpleNamespace
    failures: list[BaseException]
    lanes: list[Lane]
    epoch: Epoch
    committed: dict[Lane, int]

    def release(self, lane: int, count: int) -> None:
        """Admit, complete and release ``count`` records; what they are is their offset."""
        it = self.lanes[lane]
        for _ in range(count):
            slot = it.admit(Fake(it.position, partition=it.partition), 1)
            it.complete(slot, Outgoing(Kind.RESULT, None, b"%d" % slot.offset, ()))
        self.transactions.send(it, it.release())

    async def settle(self, timeout_s: float = DEADLINE_S) -> dict[Lane, tuple[int, int]]:
        covered = await self.transactions.settle(self.epoch, self.committed, {}, timeout_s)
        self.committed |= {lane: offset for lane, (offset, _) in covered.items() if lane in self.committed}
        return covered

    async def renewed(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.transactions.producing.wait()


Build = Callable[..., Any]


@pytest.fixture
async def build(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Build]:
    monkeypatch.setattr(module, "ERROR_BACKOFF_S", 0.01)
    monkeypatch.setattr(sink_module, "ERROR_BACKOFF_S", 0.01)
    made: list[Transactions] = []

    async def make(fail: Callable[[str, Any], BaseException | None] | None = None, **kafka: str) -> Stage:
        broker = Broker() if fail is None else Broker(fail)
        flags = {
            **{f"kafka.{name}": value for name, value in kafka.items()},
            "kafka.bootstrap_servers": "broker:1",
            "input.topics": "in",
            "output.topic": "out",
            "delivery.guarantee": "exactly-once",
        }
        coordinator = SimpleNamespace(
            generation=IDENTITY.generation, member_id=IDENTITY.member, reset_generation=lambda: None
        )
        listener, failures = Listener(), list[BaseException]()
        transactions = Transactions(
            load_settings(environ={}, flags=flags).settings,
            lambda: Producer(broker),  # type: ignore[arg-type, return-value]  # as much of one as is used
            OutputTopic("out", 2, 1 << 20),
            OutputTopic("dead", 2, 1 << 20),
            {"in": 2},
            listener,
            failures.append,
            Timeline(),
            SimpleNamespace(_coordinator=coordinator),
        )
        made.append(transactions)
        await transactions.start()
        lanes = [Lane("in", n, 1, 0) for n in range(2)]
        epoch = Epoch(1, IDENTITY, {TopicPartition("in", n): lane for n, lane in enumerate(lanes)})
        return Stage(
            broker, transactions, listener, coordinator, failures, lanes, epoch, dict.fromkeys(lanes, 0)
        )

    yield make
    for transactions in made:
        await transactions.stop(1.0)


def once(step: str, error: BaseException) -> Callable[[str, Any], BaseException | None]:
    """Fail the first time that the step is taken."""
    errors = [error]
    return lambda at, what: errors.pop() if at == step and errors else None


async def test_tick_when_all_is_well_then_results_and_offsets_are_visible_and_slots_settled(
    build: Build,
) -> None:
    stage = await build()
    stage.release(0, 5)
    stage.release(1, 3)
    covered = await stage.settle()
    assert covered == {stage.lanes[0]: (5, 5), stage.lanes[1]: (3, 3)}
    assert sorted(stage.broker.of()) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert len(stage.listener.settled) == 8 and not len(stage.lanes[0])
    assert await stage.settle() == {} and stage.broker.commits == 1


@pytest.mark.parametrize("instance", [None, "pod-0"])
async def test_offsets_when_the_member_is_static_then_they_come_with_its_instance(
    build: Build, instance: str | None
) -> None:
    stage = await (build() if instance is None else build(group_instance_id=instance))
    stage.release(0, 1)
    await stage.settle()
    assert stage.broker.instances == {instance}


async def test_slots_when_their_transaction_is_not_committed_then_they_keep_their_result(
    build: Build,
) -> None:
    stage = await build()
    stage.release(0, 2)
    await asyncio.sleep(0.05)
    assert len(stage.broker.open) == 2
    assert stage.listener.settled == [] and all(slot.outcome is not None for slot in stage.lanes[0])


@pytest.mark.parametrize("step", ["send", "group", "offsets", "end", "answer"])
@pytest.mark.parametrize("error", [KafkaConnectionError(), OutOfOrderSequenceNumber()])
async def test_transaction_when_a_step_fails_then_each_result_is_visible_once_in_order(
    build: Build, step: str, error: KafkaError
) -> None:
    stage = await build(once(step, error))
    stage.release(0, 4)
    with pytest.raises(CommitFailed):
        await stage.settle()
    stage.release(0, 3)
    await stage.renewed()
    await stage.settle()
    assert stage.broker.of() == list(range(7))
    assert stage.broker.offsets == {TopicPartition("in", 0): 7} and stage.committed[stage.lanes[0]] == 7
    assert [producer.gone for producer in stage.broker.producers] == [True, False]


async def test_end_when_unknown_and_committed_then_nothing_is_sent_again(build: Build) -> None:
    stage = await build(once("answer", KafkaConnectionError()))
    stage.release(0, 4)
    with pytest.raises(CommitFailed):
        await stage.settle()
    assert stage.listener.settled == []
    await stage.renewed()
    assert len(stage.listener.settled) == 4 and stage.broker.open == []
    assert await stage.settle() == {stage.lanes[0]: (4, 4)} and stage.broker.commits == 1


async def test_end_when_unknown_and_committed_in_a_drain_then_nothing_is_sent_again(build: Build) -> None:
    stage = await build(once("answer", KafkaConnectionError()))
    stage.release(0, 4)
    for lane in stage.lanes:
        lane.drop(None)  # it is closed for good and keeps what it has
    with pytest.raises(CommitFailed):
        await stage.settle()
    await stage.renewed()
    assert len(stage.listener.settled) == 4
    await stage.settle()
    assert stage.broker.of() == [0, 1, 2, 3] and stage.broker.open == []


async def test_end_when_it_takes_too_long_then_it_is_given_up_and_found_out(build: Build) -> None:
    stage = await build()
    producer = stage.transactions.producer
    answered = producer.commit

    async def late() -> None:
        await answered()
        await asyncio.Event().wait()

    producer.commit = late
    stage.release(0, 4)
    stage.epoch.closing = True
    with pytest.raises(CommitFailed):
        await stage.settle(0.05)
    await stage.renewed()
    assert await stage.settle() == {stage.lanes[0]: (4, 4)} and stage.broker.of() == [0, 1, 2, 3]


async def test_tick_when_the_brokers_are_slow_then_it_is_not_given_up_before_its_transaction_has_to_be(
    build: Build,
) -> None:
    stage = await build()
    producer = stage.transactions.producer
    answered = producer.commit

    async def slow() -> None:
        await asyncio.sleep(0.2)
        await answered()

    producer.commit = slow
    stage.release(0, 4)
    assert await stage.settle(0.05) == {stage.lanes[0]: (4, 4)}
    assert stage.transactions.producer is producer


async def test_slots_when_released_while_a_transaction_ends_then_they_go_into_the_next(build: Build) -> None:
    stage = await build()
    producer = stage.transactions.producer
    answered, during = producer.commit, asyncio.Event()

    async def slowly() -> None:
        during.set()
        await asyncio.sleep(0.05)
        await answered()

    producer.commit = slowly
    stage.release(0, 2)
    settling = asyncio.create_task(stage.settle())
    await during.wait()
    stage.release(0, 3)
    await settling
    assert stage.broker.of() == [0, 1] and stage.broker.offsets == {TopicPartition("in", 0): 2}
    await stage.settle()
    assert stage.broker.of() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("records", "refused"), [(20, [7]), (3000, [2500]), (1500, [70, 71, 900])])
async def test_record_when_it_is_refused_then_only_it_is_a_dead_letter_and_nothing_is_twice(
    build: Build, records: int, refused: list[int]
) -> None:
    values = {b"%d" % n for n in refused}

    def refuse(step: str, what: Any) -> BaseException | None:
        if step == "send" and what[0] == "out" and not values.isdisjoint(what[1]):
            return MessageSizeTooLargeError()
        return None

    stage = await build(refuse)
    stage.release(0, records)
    async with asyncio.timeout(DEADLINE_S):
        await settled_in_the_end(stage, records)
    assert stage.broker.of() == [n for n in range(records) if n not in refused]
    assert stage.broker.of("dead") == refused
    assert stage.failures == []
    assert len(stage.broker.producers) <= 1 + 20 * len(refused)


async def test_batches_when_the_topic_takes_smaller_ones_than_it_said_then_all_come_through(
    build: Build,
) -> None:
    def refuse(step: str, what: Any) -> BaseException | None:
        return MessageSizeTooLargeError() if step == "send" and len(what[1]) > 100 else None

    stage = await build(refuse)
    stage.release(0, 2000)
    async with asyncio.timeout(DEADLINE_S):
        await settled_in_the_end(stage, 2000)
    assert stage.broker.of() == list(range(2000)) and stage.broker.of("dead") == []


async def settled_in_the_end(stage: Stage, count: int) -> None:
    while stage.committed[stage.lanes[0]] < count:
        try:
            await stage.settle()
        except CommitFailed:
            await stage.renewed()


@pytest.mark.parametrize("how", ["check", "broker"])
async def test_epoch_when_it_has_ended_then_nothing_of_it_becomes_visible(build: Build, how: str) -> None:
    stage = await build(once("offsets", MemberGone("gone")) if how == "broker" else None)
    stage.release(0, 4)
    if how == "check":
        stage.coordinator.generation = 4
    with pytest.raises(EpochEnded):
        await stage.settle()
    stage.lanes[0].drop(0)
    stage.transactions.withdraw()
    stage.transactions.abandon()
    await stage.renewed()
    assert stage.broker.open == []
    lane = Lane("in", 0, 2, 0)
    stage.lanes[0] = lane
    stage.coordinator.generation = 4
    stage.epoch = Epoch(2, Identity(4, "me"), {TopicPartition("in", 0): lane})
    stage.committed = {lane: 0}
    stage.release(0, 6)
    await stage.settle()
    assert stage.broker.of() == list(range(6))


@pytest.mark.parametrize("step", ["send", "offsets", "end", "answer"])
async def test_suspended_lane_when_its_transaction_ends_badly_then_each_result_is_visible_once_after_it_resumes(
    build: Build, step: str
) -> None:
    stage = await build(once(step, KafkaConnectionError()))
    stage.release(0, 4)
    stage.release(1, 2)
    for lane in stage.lanes:
        lane.suspend()
    stage.transactions.withdraw()
    with pytest.raises(CommitFailed):
        await stage.settle()
    stage.transactions.abandon()
    await stage.renewed()
    committed = step == "answer"
    assert len(stage.transactions._ticks) == 0 and stage.broker.open == []
    assert [len(lane) for lane in stage.lanes] == ([0, 0] if committed else [4, 2])

    stage.coordinator.generation = 4
    stage.epoch = Epoch(2, Identity(4, "me"), stage.epoch.lanes)
    for lane in stage.lanes:
        lane.resume(2)
        stage.transactions.send(lane, lane.release())
    stage.release(0, 2)
    await stage.settle()
    assert sorted(stage.broker.of()) == sorted([*range(6), *range(2)])
    assert stage.broker.of()[:4] == [0, 1, 2, 3] or not committed
    assert stage.broker.offsets == {TopicPartition("in", 0): 6, TopicPartition("in", 1): 2}


async def test_end_when_unknown_and_a_partition_was_moved_on_by_its_new_owner_then_the_others_tell(
    build: Build,
) -> None:
    stage = await build(once("end", KafkaConnectionError()))
    stage.release(0, 4)
    stage.release(1, 4)
    for lane in stage.lanes:
        lane.suspend()
    given_away, kept = stage.lanes
    stage.broker.offsets = {TopicPartition("in", 0): 9, TopicPartition("in", 1): 0}
    with pytest.raises(CommitFailed):
        await stage.settle()
    await stage.renewed()
    assert stage.listener.settled == [] and kept.watermark == 0

    given_away.drop(0)
    kept.resume(2)
    stage.epoch = Epoch(2, IDENTITY, {TopicPartition("in", 1): kept})
    stage.transactions.send(kept, kept.release())
    await stage.settle()
    assert stage.broker.of() == [0, 1, 2, 3] and kept.watermark == 4


async def test_slots_when_they_wait_for_the_next_transaction_then_a_suspended_lane_takes_them_back(
    build: Build,
) -> None:
    stage = await build()
    stage.release(0, 2)
    stage.transactions._ticks.close()
    stage.release(0, 2)
    [lane, _] = stage.lanes
    lane.suspend()
    stage.transactions.withdraw()
    assert lane.unsettled == 2
    await stage.settle()
    assert stage.broker.of() == [0, 1] and lane.watermark == 2 and stage.broker.open == []
    lane.resume(2)
    stage.transactions.send(lane, lane.release())
    await stage.settle()
    assert stage.broker.of() == [0, 1, 2, 3]


async def test_identity_when_it_is_none_then_nothing_is_committed(build: Build) -> None:
    stage = await build()
    stage.coordinator.generation, stage.coordinator.member_id = -1, ""
    stage.epoch = Epoch(1, Identity(-1, ""), stage.epoch.lanes)
    stage.release(0, 1)
    with pytest.raises(EpochEnded):
        await stage.settle()
    assert stage.broker.visible == [] and stage.broker.pending == {}


async def test_lane_when_only_its_position_moved_then_the_offset_alone_is_committed(build: Build) -> None:
    stage = await build()
    stage.lanes[1].advance(9)  # past the markers of the input's own transactions
    assert await stage.settle() == {stage.lanes[1]: (9, 0)}
    assert stage.broker.offsets == {TopicPartition("in", 1): 9} and stage.broker.visible == []


async def test_producer_when_fenced_twice_in_a_row_then_the_process_ends(build: Build) -> None:
    stage = await build(lambda step, what: Fenced() if step == "end" else None)
    for _ in range(2):
        await stage.renewed()
        stage.release(0, 1)
        with pytest.raises(CommitFailed):
            await stage.settle()
    [failure] = stage.failures
    assert isinstance(failure, KafkaRefused) and "kafka.transactional_id" in str(failure)
    await stage.transactions.stop(1.0)
    assert len(stage.broker.producers) == 2  # a third would put out the worker that is to stay


async def test_producer_when_its_transaction_has_timed_out_then_that_is_no_fence(build: Build) -> None:
    stage = await build(once("end", Fenced()))
    for _ in range(3):
        stage.release(0, 1)
        stage.transactions.producer.since = time.monotonic() - 11
        try:
            await stage.settle()
        except CommitFailed:
            stage.broker.fail = once("end", Fenced())
        await stage.renewed()
    assert stage.failures == []


async def test_brokers_when_they_are_away_then_no_new_producer_is_given_up(build: Build) -> None:
    refusals = 3

    def away(step: str, what: Any) -> BaseException | None:
        nonlocal refusals
        if step == "start" and stage_is_there and refusals:
            refusals -= 1
            return KafkaConnectionError()
        return KafkaConnectionError() if step == "end" and refusals else None

    stage_is_there = False
    stage = await build(away)
    stage_is_there = True
    stage.release(0, 3)
    with pytest.raises(CommitFailed):
        await stage.settle()
    await stage.renewed()
    await stage.settle()
    assert stage.broker.of() == [0, 1, 2]
