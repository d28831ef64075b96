"""The sink without Kafka: a producer that answers each batch as the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    TopicAuthorizationFailedError,
    UnknownError,
)

from inferstream.documents import Kind, Outgoing
from inferstream.errors import DeadLetterRefused, KafkaRefused
from inferstream.kafka import sink as module
from inferstream.kafka.sink import OutputTopic, Sink
from inferstream.lanes import COMPLETED, Lane, Slot
from inferstream.telemetry.timeline import Timeline

DEADLINE_S = 10.0
Answer = Callable[[str, int, list[bytes]], KafkaError | None]


class Batch:
    def __init__(self) -> None:
        self.values: list[bytes] = []

    def append(self, *, timestamp: int, key: Any, value: bytes, headers: Any) -> object:
        self.values.append(value)
        return object()

    def close(self) -> None: ...


class Producer:
    """Answers at once with what ``answer`` gives, or when the test releases ``held``."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.stopped = False

    async def start(self) -> None:
        self._broker.producers.append(self)

    async def stop(self) -> None:
        self.stopped = True

    def create_batch(self) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[None]:
        if self.stopped:
            raise ProducerClosed
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._broker.sent.append((topic, partition, list(batch.values)))
        if partition in self._broker.held:
            self._broker.held[partition].append((future, batch.values))
            return future
        self._broker.settle(future, topic, partition, batch.values)
        return future


@dataclass
class Broker:
    answer: Answer = lambda topic, partition, values: None
    producers: list[Producer] = field(default_factory=list)
    sent: list[tuple[str, int, list[bytes]]] = field(default_factory=list)
    log: list[tuple[str, int, bytes]] = field(default_factory=list)
    held: dict[int, list[tuple[asyncio.Future[None], list[bytes]]]] = field(default_factory=dict)
    acknowledged_slots: list[Slot] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def settle(self, future: asyncio.Future[None], topic: str, partition: int, values: list[bytes]) -> None:
        if (error := self.answer(topic, partition, values)) is not None:
            future.set_exception(error)
            return
        self.log += [(topic, partition, value) for value in values]
        future.set_result(None)

    # as the pipeline

    def acknowledged(self, slots: list[Slot]) -> None:
        for slot in slots:
            if slot.lane.acknowledge(slot):
                self.acknowledged_slots.append(slot)

    def refused(self, slot: Slot, error: KafkaError) -> Outgoing:
        outgoing = slot.outcome
        assert outgoing is not None
        if outgoing.kind is Kind.DEAD_LETTER:
            raise DeadLetterRefused("too large")
        return Outgoing(Kind.DEAD_LETTER, outgoing.key, outgoing.value, ())


Build = Callable[..., tuple[Sink, Broker]]


@pytest.fixture
async def build(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Build]:
    monkeypatch.setattr(module, "ERROR_BACKOFF_S", 0.01)
    sinks: list[Sink] = []

    def make(answer: Answer | None = None, inputs: int = 4, limit: int = 1 << 20) -> tuple[Sink, Broker]:
        broker = Broker() if answer is None else Broker(answer)
        sink = Sink(
            lambda: Producer(broker),
            OutputTopic("out", 4, limit),
            OutputTopic("dead", 4, limit),
            {"in": inputs},
            broker,
            broker.failures.append,
            Timeline(),
        )
        sinks.append(sink)
        return sink, broker

    yield make
    for sink in sinks:
        await sink.stop(1.0)


@dataclass(frozen=True)
class Fake:
    offset: int
    topic: str = "in"
    partition: int = 0
    timestamp: int = 0
    key: bytes | None = None
    value: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()


def send(sink: Sink, lane: Lane, count: int, kind: Kind = Kind.RESULT, size: int = 0) -> list[Slot]:
    slots = []
    for _ in range(count):
        slot = lane.admit(Fake(lane.position, partition=lane.partition), 1)
        value = b"%d" % slot.offset
        lane.complete(slot, Outgoing(kind, None, value.ljust(size, b" "), ()))
        slots.append(slot)
    sink.send(lane, lane.release())
    return slots


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def values(broker: Broker, topic: str = "out") -> list[int]:
    return [int(value) for name, _, value in broker.log if name == topic]


async def test_batch_when_one_record_is_refused_then_only_that_one_is_a_dead_letter(build: Build) -> None:
    def refuse_7(topic: str, partition: int, batch: list[bytes]) -> KafkaError | None:
        return MessageSizeTooLargeError() if topic == "out" and b"7" in batch else None

    sink, broker = build(refuse_7)
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 20)
    await until(lambda: not len(lane))
    assert values(broker) == [n for n in range(20) if n != 7]
    assert values(broker, "dead") == [7]
    assert lane.watermark == 20


async def test_producer_when_a_batch_fails_then_a_new_one_sends_it_again_in_order(build: Build) -> None:
    failures = iter([OutOfOrderSequenceNumber()])
    sink, broker = build(lambda topic, partition, batch: next(failures, None))
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 10)
    await until(lambda: not len(lane))
    assert values(broker) == list(range(10))
    assert [producer.stopped for producer in broker.producers] == [True, False]


async def test_producer_when_it_is_replaced_then_the_healthy_batches_are_awaited_first(build: Build) -> None:
    failures = {0: [OutOfOrderSequenceNumber()]}
    sink, broker = build(
        lambda topic, partition, batch: failures[partition].pop() if failures.get(partition) else None
    )
    broker.held[1] = []
    await sink.start()
    healthy, failing = Lane("in", 1, 1, 0), Lane("in", 0, 1, 0)
    send(sink, healthy, 3)
    await until(lambda: bool(broker.held[1]))
    send(sink, failing, 3)
    await until(lambda: not sink.producing.is_set())
    await asyncio.sleep(0.05)
    assert not broker.producers[0].stopped
    [(future, batch)] = broker.held.pop(1)
    broker.settle(future, "out", 1, batch)
    await until(lambda: not len(failing) and not len(healthy))
    assert sorted(values(broker)) == [0, 0, 1, 1, 2, 2]
    assert len(broker.producers) == 2


async def test_record_when_the_broker_errs_once_or_twice_then_it_is_not_a_dead_letter(build: Build) -> None:
    failures = iter([UnknownError(), UnknownError()])
    sink, broker = build(lambda topic, partition, batch: next(failures, None))
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 1)
    await until(lambda: not len(lane))
    assert values(broker) == [0] and values(broker, "dead") == []


async def test_record_when_it_is_refused_for_an_unknown_reason_thrice_then_it_is_a_dead_letter(
    build: Build,
) -> None:
    sink, broker = build(lambda topic, partition, batch: UnknownError() if topic == "out" else None)
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 1)
    await until(lambda: not len(lane))
    assert values(broker, "dead") == [0] and len(broker.sent) == 4


async def test_dead_letter_when_it_is_refused_then_the_process_is_told(build: Build) -> None:
    sink, broker = build(lambda topic, partition, batch: MessageSizeTooLargeError())
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 1)
    await until(lambda: bool(broker.failures))
    assert isinstance(broker.failures[0], DeadLetterRefused) and lane.watermark == 0


async def test_batches_when_they_are_formed_then_they_stay_below_the_topics_limit(build: Build) -> None:
    sink, broker = build(limit=10_000)
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 30, size=1000)
    await until(lambda: not len(lane))
    assert all(sum(map(len, batch)) < 10_000 for _, _, batch in broker.sent)
    assert values(broker) == list(range(30))


async def test_epoch_when_it_ends_then_what_was_not_handed_over_is_not_sent(build: Build) -> None:
    sink, broker = build()
    broker.held[0] = []
    await sink.start()
    old, new = Lane("in", 0, 1, 0), Lane("in", 0, 2, 0)
    send(sink, old, 3)
    await until(lambda: bool(broker.held[0]))
    send(sink, old, 3)
    old.drop(0)
    sink.withdraw()
    send(sink, new, 2)
    [(future, batch)] = broker.held.pop(0)
    broker.settle(future, "out", 0, batch)
    await until(lambda: not len(new))
    assert values(broker) == [0, 1, 2, 0, 1]
    assert [slot.lane for slot in broker.acknowledged_slots] == [new, new]


async def test_failed_batch_when_its_epoch_has_ended_then_it_is_not_sent_again(build: Build) -> None:
    failures = iter([OutOfOrderSequenceNumber()])
    sink, broker = build(lambda topic, partition, batch: next(failures, None))
    broker.held[0] = []
    await sink.start()
    old, new = Lane("in", 0, 1, 0), Lane("in", 0, 2, 50)
    send(sink, old, 3)
    await until(lambda: bool(broker.held[0]))
    old.drop(0)
    sink.withdraw()
    send(sink, new, 2)
    [(future, batch)] = broker.held.pop(0)
    broker.settle(future, "out", 0, batch)
    await until(lambda: not len(new))
    assert values(broker) == [50, 51]


async def test_suspended_lane_when_its_batch_is_on_its_way_then_only_that_is_sent_until_it_resumes(
    build: Build,
) -> None:
    sink, broker = build()
    broker.held[0] = []
    await sink.start()
    lane = Lane("in", 0, 1, 0)
    send(sink, lane, 3)
    await until(lambda: bool(broker.held[0]))
    send(sink, lane, 3)
    lane.suspend()
    sink.withdraw()
    [(future, batch)] = broker.held.pop(0)
    broker.settle(future, "out", 0, batch)
    await until(lambda: lane.watermark == 3)
    assert sink.queued == 0 and values(broker) == [0, 1, 2]

    lane.resume(2)
    sink.send(lane, lane.release())
    await until(lambda: not len(lane))
    assert values(broker) == list(range(6))


@pytest.mark.parametrize("refused", [False, True])
async def test_suspended_lane_when_its_batch_fails_then_it_is_sent_again_after_it_resumes(
    build: Build, refused: bool
) -> None:
    failures = iter([MessageSizeTooLargeError() if refused else OutOfOrderSequenceNumber()])
    sink, broker = build(lambda topic, partition, batch: next(failures, None))
    broker.held[0] = []
    await sink.start()
    lane, other = Lane("in", 0, 1, 0), Lane("in", 1, 1, 0)
    [slot] = send(sink, lane, 1)
    await until(lambda: bool(broker.held[0]))
    lane.suspend()
    sink.withdraw()
    [(future, batch)] = broker.held.pop(0)
    broker.settle(future, "out", 0, batch)
    await until(lambda: slot.state == COMPLETED)
    send(sink, other, 2)
    await until(lambda: not len(other))
    assert sink.queued == 0 and [partition for _, partition, _ in broker.log] == [1, 1]

    lane.resume(2)
    sink.send(lane, lane.release())
    await until(lambda: not len(lane))
    assert broker.log[2:] == [("dead" if refused else "out", 0, b"0")] and broker.failures == []


async def test_partition_when_it_was_born_after_the_start_then_the_output_partition_exists(
    build: Build,
) -> None:
    sink, broker = build()
    await sink.start()
    lane = Lane("in", 6, 1, 0)
    send(sink, lane, 1)
    await until(lambda: not len(lane))
    assert [partition for _, partition, _ in broker.log] == [2]


async def test_refusal_when_it_lasts_then_the_process_ends_though_other_topics_work(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFUSED_FOR_S", 0.2)
    sink, broker = build(
        lambda topic, partition, batch: TopicAuthorizationFailedError() if topic == "dead" else None
    )
    await sink.start()
    good, bad = Lane("in", 0, 1, 0), Lane("in", 1, 1, 0)
    send(sink, bad, 1, Kind.DEAD_LETTER)
    async with asyncio.timeout(DEADLINE_S):
        while not broker.failures:
            send(sink, good, 1)
            await asyncio.sleep(0.01)
    assert isinstance(broker.failures[0], KafkaRefused) and "dead:1" in str(broker.failures[0])
    assert bad.watermark == 0
