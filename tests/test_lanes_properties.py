"""Random lives of a lane against the plainest possible model: what was fetched, what was acknowledged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from inferstream.documents import Kind, Outgoing, Reason, Rejected
from inferstream.lanes import ADMITTED, DROPPED, RELEASED, Lane, Slot

RESULT = Outgoing(Kind.RESULT, None, b"{}", ())
DEAD_LETTER = Outgoing(Kind.DEAD_LETTER, None, b"?", (), Rejected(Reason.INVALID_JSON, "no"))


@dataclass(frozen=True)
class Fetched:
    offset: int


class LaneLife(RuleBasedStateMachine):
    """Records come with gaps, complete and are acknowledged in any order, until the lane is dropped.

    Meanwhile it may be closed, suspended and resumed, again and again.
    """

    @initialize(start=st.integers(0, 5), ordered=st.booleans(), limit=st.none() | st.integers(1, 4))
    def assigned(self, start: int, ordered: bool, limit: int | None) -> None:
        self.lane = Lane("in", 0, epoch=1, start=start, ordered=ordered)
        self.limit = limit
        self.fetched: list[int] = []
        self.acknowledged: set[int] = set()
        self.sent: list[int] = []
        self.slots: list[Slot] = []
        self.credit = 0
        self.watermark = start
        self.first_dropped: int | None = None
        self.behind = False  # whether something was ever taken back
        self.state = "open"
        self.fence = 0  # of the closing lane

    def pick(self, data: st.DataObject, state: int) -> Slot | None:
        slots = [slot for slot in self.slots if slot.state == state]
        return data.draw(st.sampled_from(slots)) if slots else None

    @precondition(lambda self: self.state == "open")
    @rule(gaps=st.lists(st.sampled_from([0, 0, 0, 1, 7]), min_size=1, max_size=4))
    def fetch(self, gaps: list[int]) -> None:
        for gap in gaps:
            record: Any = Fetched(self.lane.position + gap)
            self.slots.append(self.lane.admit(record, weight=1))
            self.fetched.append(record.offset)
            self.credit += 1

    @rule(by=st.integers(0, 3))
    def pass_control_records(self, by: int) -> None:
        self.lane.advance(self.lane.position + by)

    @rule(data=st.data(), outcome=st.sampled_from([RESULT, DEAD_LETTER]), count=st.integers(1, 8))
    def finish(self, data: st.DataObject, outcome: Outgoing, count: int) -> None:
        for _ in range(count):
            slot = self.pick(data, ADMITTED)
            if slot is not None:
                assert self.lane.complete(slot, outcome)

    @rule(data=st.data())
    def finish_late(self, data: st.DataObject) -> None:
        slot = self.pick(data, DROPPED)
        if slot is not None:
            assert not self.lane.complete(slot, RESULT)
            assert not self.lane.acknowledge(slot)

    @rule()
    def send(self) -> None:
        run = self.lane.release(self.limit)
        assert not run or self.state != "suspended"
        for slot in run:
            assert slot.outcome is not None
            assert self.state != "closing" or slot.offset < self.fence
            self.sent.append(slot.offset)

    @precondition(lambda self: self.state == "open")
    @rule(keep=st.none() | st.integers(0, 5), chance=st.integers(0, 3))
    def close(self, keep: int | None, chance: int) -> None:
        if chance != 1:
            return
        held = [slot.offset for slot in self.lane]
        self.lane.close(keep)
        self.state = "closing"
        self.fence = self.lane.position if keep is None or keep >= len(held) else held[keep]
        assert self.lane.finished == all(offset >= self.fence for offset in held)

    @precondition(lambda self: self.state in ("open", "closing"))
    @rule(data=st.data(), back=st.integers(0, 6), chance=st.integers(0, 2))
    def suspend(self, data: st.DataObject, back: int, chance: int) -> None:
        """What was released and went to nobody comes back."""
        if chance != 1 and self.state == "open":
            return
        self.lane.suspend()
        self.state = "suspended"
        for _ in range(back):
            self.batch_fails(data)

    @precondition(lambda self: self.state == "suspended")
    @rule(data=st.data())
    def batch_fails(self, data: st.DataObject) -> None:
        slot = self.pick(data, RELEASED)
        if slot is not None:
            self.lane.take_back([slot])
            self.sent.remove(slot.offset)
            self.behind = True

    @precondition(lambda self: self.state == "suspended")
    @rule()
    def resume(self) -> None:
        self.lane.resume(self.lane.epoch + 1)
        self.state = "open"

    @rule(data=st.data(), count=st.integers(1, 6))
    def broker_answers(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            slot = self.pick(data, RELEASED)
            if slot is not None and self.lane.acknowledge(slot):
                self.acknowledged.add(slot.offset)
                self.credit -= 1

    @rule(keep=st.none() | st.integers(0, 5), chance=st.integers(0, 9))
    def revoke(self, keep: int | None, chance: int) -> None:
        if chance != 5:
            return  # lanes live long enough to be interesting
        dropped = self.lane.drop(keep)
        self.state = "dropped"
        self.credit -= len(dropped)
        if dropped:
            self.first_dropped = dropped[0].offset
        assert all(slot.offset not in self.acknowledged for slot in dropped)

    @invariant()
    def nothing_is_lost(self) -> None:
        lost = [o for o in self.fetched if o < self.lane.watermark and o not in self.acknowledged]
        assert lost == []

    @invariant()
    def watermark_never_falls_nor_passes_a_dropped_record(self) -> None:
        assert self.lane.watermark >= self.watermark
        self.watermark = self.lane.watermark
        assert self.first_dropped is None or self.watermark <= self.first_dropped

    @invariant()
    def each_is_sent_once_and_in_order(self) -> None:
        """What came back is sent again in its turn: behind what was sent before it, before what was not."""
        assert len(set(self.sent)) == len(self.sent)
        if self.lane.ordered and not self.behind:
            assert self.sent == self.fetched[: len(self.sent)]
        waiting = [slot.offset for slot in self.lane._queue]
        assert not self.lane.ordered or waiting == sorted(waiting)
        assert not set(waiting) & set(self.sent)

    @invariant()
    def repeats_after_a_crash_are_bounded(self) -> None:
        assert self.limit is None or self.lane.unsettled <= self.limit

    @invariant()
    def counts_agree_with_the_slots(self) -> None:
        held = list(self.lane)
        assert len(self.lane) == len(held)
        assert self.lane.in_flight == sum(slot.state == ADMITTED for slot in held)
        waiting = [slot.state for slot in held if slot.state < RELEASED]
        run = waiting.index(ADMITTED) if ADMITTED in waiting else len(waiting)
        behind = len(waiting) - run - waiting.count(ADMITTED)
        assert self.lane.blocked == (behind if self.lane.ordered else 0)
        assert self.credit == sum(slot.state <= RELEASED for slot in held)

    def teardown(self) -> None:
        """Whatever happened, a lane that is left alone with working neighbours settles what it kept."""
        if not hasattr(self, "lane"):
            return
        if self.state in ("closing", "suspended"):
            self.lane.suspend()
            self.lane.resume(self.lane.epoch + 1)
        for slot in self.slots:
            if slot.state == ADMITTED:
                self.lane.complete(slot, RESULT)
        for _ in range(len(self.slots) + 1):
            for slot in self.lane.release(self.limit):
                self.sent.append(slot.offset)
            for slot in self.slots:
                if slot.state == RELEASED and self.lane.acknowledge(slot):
                    self.acknowledged.add(slot.offset)
                    self.credit -= 1
            self.nothing_is_lost()
        assert (len(self.lane), self.credit, self.lane.watermark) == (0, 0, self.lane.position)
        self.each_is_sent_once_and_in_order()


def test_lane_when_its_life_is_random_then_loses_nothing_and_keeps_order() -> None:
    run_state_machine_as_test(
        LaneLife, settings=settings(max_examples=300, stateful_step_count=50, deadline=None)
    )
