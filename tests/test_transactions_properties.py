"""The real Transactions, with its senders and its ledger, against brokers that answer when and how the test says.

The brokers' side is the little that KIP-98, KIP-360 and KIP-447 promise: the records and offsets of a transaction
become visible together or never; InitProducerId ends what is open and refuses what an older producer sends from then
on; a transaction that is open for too long is aborted; the group takes offsets of its members only; stable offsets
are told when no transaction is pending that could change them.  Any request may be carried out or not, and
whichever it was its answer may be lost, be an error, or never come.

What a reader with read_committed sees is held, after each step, against the group's offsets: each result once, in
order, and none without its offset.  In the end everything comes through and nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError, MessageSizeTooLargeError
from aiokafka.structs import OffsetAndMetadata
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from inferstream.documents import Kind, Outgoing
from inferstream.kafka.commit import CommitFailed, EpochEnded
from inferstream.kafka.epochs import Epoch, Identity
from inferstream.kafka.sink import OutputTopic
from inferstream.kafka.transactions import Transactions
from inferstream.kafka.txn_protocol import Fenced, MemberGone
from inferstream.lanes import ADMITTED, Lane, Slot
from inferstream.settings import load_settings
from inferstream.telemetry.timeline import Timeline
from tests.support.simulation import SimulatedLoop, SimulatedTime
from tests.test_sink import Fake

PARTITIONS = 2
BATCH = 3  # records that fit a batch
TIMEOUT_S = 10.0  # of a transaction
CLOCK = SimulatedTime()
# What becomes of a request: whether it is carried out, and whether the worker hears of it.
FATE_OF = {
    "answered": (True, True),
    "refused": (False, True),
    "carried out, then the connection fails": (True, True),
    "carried out, and no answer": (True, False),
    "lost": (False, False),
}
FATES = st.sampled_from(["answered", *FATE_OF])
FLAGS = {
    "kafka.bootstrap_servers": "broker:1",
    "input.topics": "in",
    "output.topic": "out",
    "delivery.guarantee": "exactly-once",
}
SETTINGS = load_settings(environ={}, flags=FLAGS).settings


@dataclass(eq=False)
class Request:
    """What a producer has sent and nobody has answered."""

    producer: Producer
    kind: str
    carry_out: Callable[[], Any]
    answer: asyncio.Future[Any]


class Brokers:
    """Output, the group's offsets, and the one transactional id's producer and open transaction."""

    def __init__(self) -> None:
        self.visible: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        self.offsets: dict[TopicPartition, int] = {}
        self.pending: dict[TopicPartition, int] = {}
        self.requests: list[Request] = []
        self.current: Producer | None = None
        self.generation = 1
        self.refused: set[bytes] = set()
        self.records: list[tuple[str, int, bytes]] = []

    def abort(self) -> None:
        self.records, self.pending = [], {}

    def time_out(self) -> None:
        """The open transaction has taken too long: its producer is fenced."""
        if self.records or self.pending:
            self.abort()
            self.current = None

    def init_producer(self, producer: Producer) -> None:
        self.abort()
        self.current = producer

    def append(self, producer: Producer, topic: str, partition: int, values: list[bytes]) -> None:
        self._require_current(producer)
        if topic == "out" and not self.refused.isdisjoint(values):
            raise MessageSizeTooLargeError
        self.records += [(topic, partition, value) for value in values]

    def add_offsets(
        self, producer: Producer, identity: Identity, offsets: Mapping[TopicPartition, int]
    ) -> None:
        self._require_current(producer)
        if identity != Identity(self.generation, "me"):
            raise MemberGone("UnknownMemberIdError", rejoin=True)
        self.pending |= offsets

    def commit(self, producer: Producer) -> None:
        self._require_current(producer)
        for topic, partition, value in self.records:
            source, _, offset = value.partition(b":")
            self.visible[topic, partition].append((int(source), int(offset)))
        self.offsets |= self.pending
        self.abort()

    def stable(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        if not self.pending.keys().isdisjoint(partitions):
            raise KafkaConnectionError("the test does not wait for them")
        return {tp: OffsetAndMetadata(self.offsets[tp], "") for tp in partitions if tp in self.offsets}

    def _require_current(self, producer: Producer) -> None:
        if producer is not self.current:
            raise Fenced


class Batch:
    def __init__(self) -> None:
        self.values: list[bytes] = []

    def append(self, *, timestamp: int, key: Any, value: bytes, headers: Any) -> object | None:
        if len(self.values) == BATCH:
            return None
        self.values.append(value)
        return self

    def close(self) -> None: ...


class Producer:
    """As much of a TransactionalProducer as is used."""

    def __init__(self, brokers: Brokers) -> None:
        self._brokers = brokers
        self.since: float | None = None
        self.gone = False

    def _ask(self, kind: str, carry_out: Callable[[], Any]) -> asyncio.Future[Any]:
        if self.gone:
            raise KafkaConnectionError("closed")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._brokers.requests.append(Request(self, kind, carry_out, answer))
        return answer

    async def start(self) -> None:
        await self._ask("start", lambda: self._brokers.init_producer(self))

    def create_batch(self) -> Batch:
        return Batch()

    def _begun(self) -> None:
        self.since = CLOCK.monotonic() if self.since is None else self.since

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[None]:
        self._begun()
        return self._ask("send", lambda: self._brokers.append(self, topic, partition, batch.values))

    async def add_group(self, group_id: str) -> None:
        self._begun()

    async def commit_offsets(
        self,
        group_id: str,
        identity: Identity,
        instance: str | None,
        offsets: Mapping[TopicPartition, tuple[int, str]],
        still: Callable[[], None],
    ) -> None:
        still()
        plain = {tp: offset for tp, (offset, _) in offsets.items()}
        await self._ask("offsets", lambda: self._brokers.add_offsets(self, identity, plain))

    async def commit(self) -> None:
        await self._ask("end", lambda: self._brokers.commit(self))

    def begin(self) -> None:
        self.since = None

    async def stable_offsets(
        self, group_id: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        found: dict[TopicPartition, OffsetAndMetadata] = await self._ask(
            "stable", lambda: self._brokers.stable(partitions)
        )
        return found

    async def discard(self) -> None:
        self.gone = True


class Listener:
    """The pipeline's part."""

    def acknowledged(self, slots: list[Slot], *, committed: bool = False) -> None:
        assert committed
        for slot in slots:
            slot.lane.acknowledge(slot)

    def refused(self, slot: Slot, error: KafkaError) -> Outgoing:
        assert slot.outcome is not None and slot.outcome.kind is not Kind.DEAD_LETTER
        return Outgoing(Kind.DEAD_LETTER, None, slot.outcome.value, ())

    def handed_over(self, lane: Lane) -> None: ...


class Life(RuleBasedStateMachine):
    """One worker after the other with one transactional id."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = CLOCK.loop = SimulatedLoop()
        self.brokers = Brokers()
        self.ends = [0] * PARTITIONS
        self.failures: list[BaseException] = []
        self.epochs = 0
        self.begin_worker()

    def begin_worker(self) -> None:
        self.coordinator = SimpleNamespace(
            generation=self.brokers.generation, member_id="me", reset_generation=self.forget_membership
        )

        async def build() -> Transactions:
            return Transactions(
                SETTINGS,
                lambda: Producer(self.brokers),  # type: ignore[arg-type, return-value]  # as much of one as is used
                OutputTopic("out", PARTITIONS, 1 << 20),
                OutputTopic("dead", PARTITIONS, 1 << 20),
                {"in": PARTITIONS},
                Listener(),
                self.failures.append,
                Timeline(),
                SimpleNamespace(_coordinator=self.coordinator),
            )

        self.transactions = self.loop.go(build())
        self.settling: asyncio.Task[None] | None = None
        self.lanes: dict[int, Lane] = {}
        self.committed: dict[Lane, int] = {}
        starting = self.loop.go(self.loop.create_task, self.transactions.start())
        self.answer_all()
        assert starting.done() and starting.exception() is None
        self.begin_epoch({})

    def forget_membership(self) -> None:
        self.coordinator.generation, self.coordinator.member_id = -1, ""

    def begin_epoch(self, kept: dict[int, Lane]) -> None:
        self.epochs += 1
        self.coordinator.generation, self.coordinator.member_id = self.brokers.generation, "me"
        committed = {}
        for partition in range(PARTITIONS):
            offset = self.brokers.offsets.get(TopicPartition("in", partition), 0)
            lane = kept.get(partition) or Lane("in", partition, self.epochs, offset)
            committed[lane] = self.committed.get(lane, offset)
            self.lanes[partition] = lane
        self.committed = committed
        lanes = {TopicPartition("in", partition): lane for partition, lane in self.lanes.items()}
        self.epoch = Epoch(self.epochs, Identity(self.brokers.generation, "me"), lanes)
        for lane in kept.values():
            lane.resume(self.epochs)
            self.loop.go(self.transactions.send, lane, lane.release())

    # ---- the flow

    @rule(
        partition=st.integers(0, PARTITIONS - 1),
        count=st.integers(1, 8),
        refused=st.sets(st.integers(0, 40), max_size=2),
        but=st.integers(0, 12),
    )
    def work(self, partition: int, count: int, refused: set[int], but: int) -> None:
        """Records come, all but one of the documents are done, and what heads the lane is sent.

        ``refused`` are those whose result the output topic will not take.
        """
        lane = self.lanes[partition]
        for n in range(count):
            if n in refused:
                self.brokers.refused.add(b"%d:%d" % (partition, lane.position))
            lane.admit(Fake(lane.position, partition=partition), 1)
        self.ends[partition] = max(self.ends[partition], lane.position)
        self.finish(partition, but)

    @rule(partition=st.integers(0, PARTITIONS - 1), but=st.integers(0, 12))
    def finish(self, partition: int, but: int) -> None:
        lane = self.lanes[partition]
        for n, slot in enumerate([slot for slot in lane if slot.state == ADMITTED]):
            if n != but:
                lane.complete(slot, Outgoing(Kind.RESULT, None, b"%d:%d" % (partition, slot.offset), ()))
        self.loop.go(self.transactions.send, lane, lane.release())

    @rule(pick=st.integers(0, 9), count=st.integers(1, 6), fate=FATES)
    def answer(self, pick: int, count: int, fate: str) -> None:
        """Deal with some requests: all but the last as they deserve."""
        for n in range(count):
            if self.brokers.requests:
                request = self.brokers.requests.pop(pick % len(self.brokers.requests))
                self.deal_with(request, "answered" if n + 1 < count else fate)

    def deal_with(self, request: Request, fate: str) -> None:
        carried_out, told = FATE_OF[fate]
        error: BaseException = KafkaConnectionError("gone")
        found = None
        if carried_out:
            try:
                found = request.carry_out()
            except (KafkaError, MemberGone) as refusal:
                error, carried_out = refusal, False
        if request.kind in ("start", "stable"):
            told = True  # by the client's own timeout
        if not told:
            return

        def happen() -> None:
            if request.answer.done():
                return  # nobody waits for it any more
            if carried_out and fate == "answered":
                request.answer.set_result(found)
            else:
                request.answer.set_exception(error)

        self.loop.go(happen)

    @rule()
    def answer_all(self) -> None:
        """Healthy brokers, until nothing is asked any more."""
        for _ in range(500):
            if not self.brokers.requests:
                return
            self.deal_with(self.brokers.requests.pop(0), "answered")
        raise AssertionError("it asks for ever")

    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.loop.go(asyncio.sleep(seconds))
        producer = self.transactions.producer
        if producer.since is not None and self.loop.now - producer.since > TIMEOUT_S:
            self.brokers.time_out()

    # ---- a tick

    @precondition(lambda self: self.settling is None)
    @rule()
    def tick(self) -> None:
        self.settling = self.loop.go(self.loop.create_task, self.settle(5.0))

    @precondition(lambda self: self.settling is None)
    @rule(
        partition=st.integers(0, PARTITIONS - 1),
        step=st.sampled_from(["send", "offsets", "end", "end"]),
        fate=FATES,
        meanwhile=st.integers(0, PARTITIONS),
    )
    def whole_tick(self, partition: int, step: str, fate: str, meanwhile: int) -> None:
        """All of a tick; one of its steps may go wrong, and more may come while it ends."""
        self.work(partition, 2, set(), 12)
        if step != "send":
            self.answer_all()
        self.tick()
        while self.brokers.requests:
            request = self.brokers.requests.pop(0)
            if request.kind != step:
                self.deal_with(request, "answered")
                continue
            if meanwhile < PARTITIONS:
                self.work(meanwhile, 2, set(), 12)
            self.deal_with(request, fate)
            step = "none"

    async def settle(self, timeout_s: float) -> None:
        try:
            covered = await self.transactions.settle(self.epoch, self.committed, {}, timeout_s)
        except (CommitFailed, EpochEnded):
            return
        for lane, (offset, _) in covered.items():
            if lane in self.committed:
                self.committed[lane] = offset

    @invariant()
    def a_tick_ends(self) -> None:
        if self.settling is not None and self.settling.done():
            self.settling.result()
            self.settling = None

    # ---- a rebalance, an eviction, a crash

    @precondition(lambda self: len(self.transactions._ticks))
    @rule(
        kept=st.sets(st.integers(0, PARTITIONS - 1)),
        others=st.sampled_from([0, 1, 50]),
        answers=st.lists(FATES, max_size=8),
        late=st.booleans(),
    )
    def rebalance(self, kept: set[int], others: int, answers: list[str], late: bool) -> None:
        """All lanes are suspended and the transaction is settled or abandoned; some lanes come back.

        The others were another member's in between.  If ``late``, that member has moved their offsets on before this
        worker hears anything of the brokers.
        """
        if self.settling is not None:
            self.loop.go(asyncio.sleep(TIMEOUT_S))
            self.a_tick_ends()
        assert self.settling is None, "a tick that nobody answers does not end"
        for lane in self.lanes.values():
            lane.suspend()
        self.loop.go(self.transactions.withdraw)
        self.epoch.closing = True
        closing = self.loop.go(self.loop.create_task, self.settle(1.0))
        for fate in answers:
            self.answer(0, 1, fate)
        self.loop.go(asyncio.sleep(1.5))
        assert closing.done()
        self.loop.go(self.transactions.abandon)
        gone = set(range(PARTITIONS)) - kept
        self.brokers.generation += 1
        if late:
            self.another_member(gone, others)
        self.recover()
        assert len(self.transactions._ticks) == 0
        assert self.brokers.records == [], "the transaction of an ended epoch holds readers back"
        if not late:
            self.another_member(gone, others)
        for partition in kept:  # as the source requires it of them
            lane = self.lanes[partition]
            found = self.brokers.offsets.get(TopicPartition("in", partition), 0)
            assert self.committed[lane] <= found <= lane.watermark
        self.drop(gone)
        self.begin_epoch({partition: self.lanes[partition] for partition in kept})

    @precondition(lambda self: len(self.transactions._ticks))
    @rule(others=st.sampled_from([1, 50]), ended=st.booleans())
    def evict(self, others: int, ended: bool) -> None:
        """The group gives the partitions to another member, and this one does not know: it goes on to its tick."""
        if self.settling is not None and ended:
            self.answer_all()
        self.brokers.generation += 1
        self.another_member(range(PARTITIONS), others)
        before = {place: list(records) for place, records in self.brokers.visible.items()}
        self.loop.go(asyncio.sleep(6))
        self.recover()
        self.a_tick_ends()
        if self.settling is None:
            self.tick()
        self.answer_all()
        assert {place: list(records) for place, records in self.brokers.visible.items()} == before
        self.loop.go(asyncio.sleep(6))
        self.a_tick_ends()
        self.drop(range(PARTITIONS))
        self.loop.go(self.transactions.withdraw)
        self.loop.go(self.transactions.abandon)
        self.recover()
        assert self.brokers.records == [], "the transaction of an ended epoch holds readers back"
        self.begin_epoch({})

    def another_member(self, partitions: Collection[int], count: int) -> None:
        tps = {TopicPartition("in", partition) for partition in partitions}
        if not tps.isdisjoint(self.brokers.pending):  # it waits for them to be stable
            self.loop.go(asyncio.sleep(TIMEOUT_S))
            self.brokers.time_out()
        for tp in tps:
            first = self.brokers.offsets.get(tp, 0)
            for offset in range(first, min(first + count, self.ends[tp.partition])):
                self.brokers.visible["other", tp.partition].append((tp.partition, offset))
                self.brokers.offsets[tp] = offset + 1

    def drop(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            lane = self.lanes.pop(partition)
            lane.drop(0)
            self.committed.pop(lane, None)

    def recover(self) -> None:
        """Let the brokers be healthy for as long as a new producer takes."""
        for _ in range(40):
            self.answer_all()
            if self.transactions.producing.is_set() and not self.brokers.requests:
                return
            self.loop.go(asyncio.sleep(0.6))
        raise AssertionError("no new producer is had")

    @precondition(lambda self: len(self.transactions._ticks))
    @rule(late=st.booleans())
    def crash(self, late: bool) -> None:
        """kill -9, and a successor; what was asked by then may still be carried out before it is there."""
        self.end_tasks()
        for request in self.brokers.requests if late else ():
            with contextlib.suppress(KafkaError, MemberGone):
                request.carry_out()
        self.brokers.requests.clear()
        self.begin_worker()

    def end_tasks(self) -> None:
        while tasks := asyncio.all_tasks(self.loop):  # one that is cancelled may begin another
            for task in tasks:
                task.cancel()
            self.loop.go(asyncio.sleep(0))

    # ---- what must hold

    @invariant()
    def each_result_is_visible_once_and_with_its_offset(self) -> None:
        seen = [source for records in self.brokers.visible.values() for source in records]
        assert len(seen) == len(set(seen)), "a result is visible twice"
        for partition in range(PARTITIONS):
            mine = sorted(offset for source, offset in seen if source == partition)
            committed = self.brokers.offsets.get(TopicPartition("in", partition), 0)
            assert mine == list(range(committed)), "results and offsets disagree"

    @invariant()
    def results_are_in_order(self) -> None:
        for records in self.brokers.visible.values():
            for partition in range(PARTITIONS):
                mine = [offset for source, offset in records if source == partition]
                assert mine == sorted(mine), "results overtook each other"

    @invariant()
    def nothing_is_settled_that_is_not_committed(self) -> None:
        for partition, lane in self.lanes.items():
            assert lane.watermark <= self.brokers.offsets.get(TopicPartition("in", partition), 0)

    @invariant()
    def nothing_ends_the_process(self) -> None:
        assert self.failures == []

    def teardown(self) -> None:
        """With healthy brokers everything that was ever admitted is visible, and nothing is left."""
        try:
            self.come_to_the_end()
        finally:
            self.loop.stopping = True
            self.end_tasks()
            self.loop.close()

    def come_to_the_end(self) -> None:
        for partition, lane in self.lanes.items():
            while lane.position < self.ends[partition]:
                lane.admit(Fake(lane.position, partition=partition), 1)
            self.finish(partition, -1)
        for _ in range(20 + 10 * len(self.brokers.refused)):
            self.recover()
            self.a_tick_ends()
            if self.settling is None:
                self.tick()
            self.recover()
            self.loop.go(asyncio.sleep(0.6))
            if all(not len(lane) for lane in self.lanes.values()) and not self.brokers.requests:
                break
        self.each_result_is_visible_once_and_with_its_offset()
        self.results_are_in_order()
        offsets = [self.brokers.offsets.get(TopicPartition("in", n), 0) for n in range(PARTITIONS)]
        assert offsets == self.ends, "it does not come to its end"
        assert len(self.transactions._ticks) == 0 and all(not len(lane) for lane in self.lanes.values())


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("sink", "transactions"):
        monkeypatch.setattr(f"inferstream.kafka.{module}.time", CLOCK)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_transactions_when_their_life_is_random_then_each_result_is_visible_once_and_none_is_stuck(
    simulated: None,
) -> None:
    run_state_machine_as_test(
        Life, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )
