"""Exactly once against a simulated broker that may fail at every step of a transaction.

The real Lane and Ticks, driven through random steps; the broker's side is the little that KIP-98 and KIP-447 promise:
an open transaction's records and offset become visible together or never, InitProducerId ends what is open, and a
commit that was begun is carried through.  After every run the worker is drained, and what a reader with
read_committed then sees is each result once, in order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferstream.documents import Kind, Outgoing
from inferstream.kafka.sink import take_back
from inferstream.kafka.ticks import Ticks
from inferstream.lanes import ADMITTED, DROPPED, Lane, Slot

PARTITIONS = 2
OUTPUTS = 2
ENDS = ["answered", "answer lost", "request lost", "offsets refused"]


@dataclass(frozen=True)
class Fake:
    partition: int
    offset: int
    topic: str = "in"
    timestamp: int = 0
    key: None = None
    value: None = None
    headers: tuple[Any, ...] = ()


class SimulatedBroker:
    """Output partitions, the group's offsets, and one open transaction of one producer."""

    def __init__(self) -> None:
        self.visible: dict[int, list[tuple[int, int]]] = defaultdict(list)  # output → (partition, offset)
        self.offsets: dict[int, int] = defaultdict(int)
        self._records: list[tuple[int, tuple[int, int]]] = []
        self._pending: dict[int, int] = {}

    def append(self, output: int, source: tuple[int, int]) -> None:
        self._records.append((output, source))

    def add_offsets(self, offsets: dict[int, int]) -> None:
        self._pending = dict(offsets)

    def commit(self) -> None:
        for output, source in self._records:
            self.visible[output].append(source)
        self.offsets.update(self._pending)
        self.abort()

    def abort(self) -> None:
        """What InitProducerId does with an open transaction."""
        self._records, self._pending = [], {}


class Worker(RuleBasedStateMachine):
    """One worker after the other: admit, release, publish, settle; anything may fail or be cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = SimulatedBroker()
        self.ends = [0] * PARTITIONS
        self.replay: dict[tuple[int, int], int] = {}  # which output each record's outcome goes to
        self.epoch = 0
        self.ticks = Ticks()
        self.lanes: dict[int, Lane] = {}
        self.senders: dict[int, deque[Slot]] = defaultdict(deque)
        self.unknown: dict[int, int] | None = None
        self.closing: dict[Lane, int] = {}
        self.begin_epoch()
        self.open()

    # -- what Transactions does

    def begin_epoch(self) -> None:
        self.epoch += 1
        self.lanes = {n: Lane("in", n, self.epoch, self.broker.offsets[n]) for n in range(PARTITIONS)}

    def open(self) -> None:
        self.senders.clear()
        take_back(self.ticks.withdraw())
        for slot in self.ticks.open():
            self.enqueue(slot)

    def enqueue(self, slot: Slot) -> None:
        assert slot.outcome is not None
        self.senders[int(slot.outcome.value or b"0")].append(slot)

    def know_committed(self) -> None:
        for slot in self.ticks.committed():
            if slot.state != DROPPED:
                slot.lane.acknowledge(slot)

    # -- the flow

    @rule(partition=st.integers(0, PARTITIONS - 1), outputs=st.lists(st.integers(0, OUTPUTS - 1), max_size=4))
    def admit(self, partition: int, outputs: list[int]) -> None:
        """Records, each with the output that its result goes to."""
        lane = self.lanes[partition]
        for output in outputs:
            self.ends[partition] = max(self.ends[partition], lane.position + 1)
            self.replay.setdefault((partition, lane.position), output)
            lane.admit(Fake(partition, lane.position), 1)

    @rule(partition=st.integers(0, PARTITIONS - 1), but=st.integers(0, 8), limit=st.integers(1, 8))
    def complete_and_release(self, partition: int, but: int, limit: int) -> None:
        """All but one of the documents are done, and what heads the lane is sent."""
        lane = self.lanes[partition]
        waiting = [slot for slot in lane if slot.state == ADMITTED]
        for n, slot in enumerate(waiting):
            if n != but:
                output = self.replay[partition, slot.offset]
                lane.complete(slot, Outgoing(Kind.RESULT, None, b"%d" % output, ()))
        run = lane.release(limit)
        if self.ticks.add(run):
            for slot in run:
                self.enqueue(slot)

    @rule()
    def publish_all(self) -> None:
        for output in range(OUTPUTS):
            while self.senders[output] and self.unknown is None:
                self.publish(output, 3, True)

    @rule(output=st.integers(0, OUTPUTS - 1), count=st.integers(1, 4), answered=st.booleans())
    def publish(self, output: int, count: int, answered: bool) -> None:
        if self.unknown is not None:
            return
        queue = self.senders[output]
        batch = [queue.popleft() for _ in range(min(count, len(queue)))]
        for slot in batch:
            self.broker.append(output, (slot.lane.partition, slot.offset))
        if answered:
            self.ticks.acknowledged(len(batch))
        elif batch:
            self.give_up()

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """A record is refused: the transaction is given up and the record goes elsewhere."""
        heads = [queue[0] for queue in self.senders.values() if queue]
        if heads and self.unknown is None:
            slot = data.draw(st.sampled_from(heads))
            output = data.draw(st.integers(0, OUTPUTS - 1))
            if slot.state != DROPPED:
                slot.outcome = Outgoing(Kind.RESULT, None, b"%d" % output, ())
                self.replay[slot.lane.partition, slot.offset] = output
            self.give_up()

    # -- a tick

    @precondition(lambda self: not self.ticks.closed)
    @rule(
        partition=st.integers(0, PARTITIONS - 1),
        outputs=st.lists(st.integers(0, OUTPUTS - 1), max_size=3),
        end=st.sampled_from(ENDS),
    )
    def tick(self, partition: int, outputs: list[int], end: str) -> None:
        """All of it, with more results coming while the transaction ends."""
        self.publish_all()
        self.close()
        self.admit(partition, outputs)
        self.complete_and_release(partition, 8, 8)
        self.end(end)

    @precondition(lambda self: not self.ticks.closed)
    @rule()
    def close(self) -> None:
        self.closing = self.ticks.marks()
        self.ticks.close()

    @precondition(lambda self: self.ticks.closed and self.unknown is None and self.ticks.published)
    @rule(end=st.sampled_from(ENDS))
    def end(self, end: str) -> None:
        offsets = {lane.partition: offset for lane, offset in self.closing.items()}
        assert all(lane.epoch == self.epoch for lane in self.closing), "a transaction of two epochs"
        if end == "offsets refused":
            self.give_up()
            return
        self.broker.add_offsets(offsets)
        if end != "request lost":
            self.broker.commit()
        if end == "answered":
            self.know_committed()
            self.open()
        else:
            self.unknown = offsets

    @rule()
    def give_up(self) -> None:
        """A new producer, and with it the end of what was open; an unknown end is found out by the offsets."""
        self.ticks.close()
        self.broker.abort()
        sent, self.unknown = self.unknown, None
        if sent and all(self.broker.offsets[n] >= offset for n, offset in sent.items()):
            self.know_committed()
        else:
            self.ticks.aborted()
        self.open()

    # -- a rebalance, a crash

    @rule()
    def revoke(self) -> None:
        """All lanes are dropped, the open transaction abandoned, and the next epoch starts at the offsets."""
        for lane in self.lanes.values():
            lane.drop(0)
        self.ticks.withdraw()
        self.give_up()
        self.begin_epoch()

    @rule(
        kept=st.sets(st.integers(0, PARTITIONS - 1)), others=st.sampled_from([0, 1, 50]), late=st.booleans()
    )
    def rebalance(self, kept: set[int], others: int, late: bool) -> None:
        """All lanes are suspended; some come back, the others were another member's before they are ours again.

        If ``late``, the end of the transaction is found out only when that member has moved its offsets on.
        """
        for lane in self.lanes.values():
            lane.suspend()
        take_back(self.ticks.withdraw())
        if late:
            # The offsets of its partitions are stable, or it would not have begun.
            self.broker.abort()
        else:
            self.give_up()
            assert len(self.ticks) == 0
        for partition in set(range(PARTITIONS)) - kept:
            self.another_member(partition, others)
        if late:
            self.give_up()
            assert len(self.ticks) == 0
        self.epoch += 1
        for partition, lane in self.lanes.items():
            if partition in kept:
                assert lane.watermark >= self.broker.offsets[partition]
                lane.resume(self.epoch)
                run = lane.release()
                if self.ticks.add(run):
                    for slot in run:
                        self.enqueue(slot)
            else:
                lane.drop(0)
                self.lanes[partition] = Lane("in", partition, self.epoch, self.broker.offsets[partition])

    def another_member(self, partition: int, count: int) -> None:
        first = self.broker.offsets[partition]
        for offset in range(first, min(first + count, self.ends[partition])):
            self.broker.visible[self.replay[partition, offset]].append((partition, offset))
            self.broker.offsets[partition] = offset + 1

    @rule()
    def crash(self) -> None:
        """kill -9, and a successor: the broker ends what was open, nothing else is left."""
        self.broker.abort()
        self.ticks, self.unknown = Ticks(), None
        self.begin_epoch()
        self.open()

    # -- what must hold

    @invariant()
    def nothing_visible_past_the_offsets_or_twice(self) -> None:
        seen = [source for output in self.broker.visible.values() for source in output]
        assert len(seen) == len(set(seen)), "a result is visible twice"
        for partition in range(PARTITIONS):
            mine = sorted(offset for n, offset in seen if n == partition)
            assert mine == list(range(self.broker.offsets[partition])), "results and offsets disagree"

    @invariant()
    def in_order(self) -> None:
        for records in self.broker.visible.values():
            for partition in range(PARTITIONS):
                mine = [offset for n, offset in records if n == partition]
                assert mine == sorted(mine), "results overtook each other"

    def teardown(self) -> None:
        """Let it finish without failures: then everything that was ever admitted is visible."""
        self.give_up()
        for partition, lane in self.lanes.items():
            while lane.position < self.ends[partition]:
                self.replay.setdefault((partition, lane.position), 0)
                lane.admit(Fake(partition, lane.position), 1)
            for slot in list(lane):
                if slot.state == ADMITTED:
                    lane.complete(
                        slot, Outgoing(Kind.RESULT, None, b"%d" % self.replay[partition, slot.offset], ())
                    )
            run = lane.release()
            assert self.ticks.add(run)
            for slot in run:
                self.enqueue(slot)
        for output in range(OUTPUTS):
            while self.senders[output]:
                self.publish(output, 4, True)
        self.close()
        self.end("answered")
        self.nothing_visible_past_the_offsets_or_twice()
        self.in_order()
        assert [self.broker.offsets[n] for n in range(PARTITIONS)] == self.ends
        assert all(lane.watermark == lane.position for lane in self.lanes.values())


TestExactlyOnce = Worker.TestCase
TestExactlyOnce.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
