"""Random loads on the credit and the lanes together: the documented bound is kept and nothing deadlocks."""

from __future__ import annotations

from collections import deque
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

from inferstream.credit import Credit
from inferstream.documents import Kind, Outgoing
from inferstream.lanes import ADMITTED, COMPLETED, Lane, Slot

OUTCOME = Outgoing(Kind.RESULT, None, b"{}", ())

# Records in bytes, now and then one heavier than every bound below.
sizes = st.lists(st.integers(1, 60) | st.sampled_from([1, 1, 1, 900]), min_size=1, max_size=30)


@dataclass(frozen=True)
class Fetched:
    offset: int


class Load(RuleBasedStateMachine):
    """Partitions with a backlog, polled as a Kafka client hands records over, finished in any order."""

    @initialize(
        documents=st.integers(1, 16),
        size=st.integers(1, 400) | st.just(10**6),
        tokens=st.integers(1, 100) | st.just(10**6),
        share=st.sampled_from([0.2, 0.6, 1.0]),
        fetch=st.integers(1, 200) | st.just(10**5),
        partitions=st.integers(1, 4),
    )
    def start(
        self, documents: int, size: int, tokens: int, share: float, fetch: int, partitions: int
    ) -> None:
        self.fetch_bytes = fetch
        self.share = max(1, int(documents * share))
        self.credit: Credit[Lane] = Credit(documents, size, tokens, share, fetch)
        self.backlog: dict[Lane, deque[int]] = {}
        self.slots: list[Slot] = []
        self.raw: dict[Slot, int] = {}
        self.heaviest = 0
        self.epoch = 0
        for number in range(partitions):
            self.assign(number)

    def assign(self, number: int) -> None:
        self.epoch += 1
        lane = Lane("in", number, self.epoch, start=0)
        self.credit.open_lane(lane)
        self.backlog[lane] = deque()

    @rule(data=st.data(), arriving=sizes)
    def arrive(self, data: st.DataObject, arriving: list[int]) -> None:
        self.backlog[data.draw(st.sampled_from(list(self.backlog)))].extend(arriving)

    @rule()
    def poll(self) -> None:
        eligible, limit = self.credit.poll_limit(self.backlog)
        assert bool(eligible) == (limit > 0)
        assert all(self.credit.eligible(lane) for lane in eligible)
        handed_over = 0
        for lane in eligible:
            while limit and handed_over < self.fetch_bytes and (waiting := self.backlog[lane]):
                size = waiting.popleft()
                handed_over += size
                limit -= 1
                self.credit.take(lane, size)
                record: Any = Fetched(lane.position)
                slot = lane.admit(record, size)
                self.slots.append(slot)
                self.raw[slot] = size
                self.heaviest = max(self.heaviest, size)

    @rule(data=st.data(), count=st.integers(1, 10), grown=st.integers(0, 40), tokens=st.integers(1, 20))
    def finish(self, data: st.DataObject, count: int, grown: int, tokens: int) -> None:
        for _ in range(count):
            working = [slot for slot in self.slots if slot.state == ADMITTED]
            if working:
                self.complete(data.draw(st.sampled_from(working)), grown, tokens)

    def complete(self, slot: Slot, grown: int, tokens: int) -> None:
        self.credit.reweigh(slot.lane, slot.weight, slot.weight + grown, tokens)
        slot.weight += grown
        slot.tokens += tokens
        slot.lane.complete(slot, OUTCOME)

    @rule()
    def deliver(self) -> None:
        for lane in self.backlog:
            for slot in lane.release():
                lane.acknowledge(slot)
                self.credit.give(lane, slot.weight, slot.tokens)
                self.slots.remove(slot)

    @precondition(lambda self: self.epoch < 8)
    @rule(data=st.data(), keep=st.integers(0, 2), chance=st.integers(0, 9))
    def revoke(self, data: st.DataObject, keep: int, chance: int) -> None:
        if chance != 5:
            return  # lanes live long enough to fill
        lane = data.draw(st.sampled_from(list(self.backlog)))
        for slot in lane.drop(keep):
            self.credit.give(lane, slot.weight, slot.tokens)
            self.slots.remove(slot)
        for slot in list(self.slots):
            if slot.lane is lane:
                self.slots.remove(slot)
        self.credit.close_lane(lane)
        del self.backlog[lane]
        self.assign(lane.partition)

    @invariant()
    def counts_agree_with_the_slots(self) -> None:
        assert self.credit.documents == len(self.slots)
        assert self.credit.bytes == sum(slot.weight for slot in self.slots)
        assert self.credit.tokens == sum(slot.tokens for slot in self.slots)

    @invariant()
    def documented_bound_is_kept(self) -> None:
        lanes = len(self.backlog)
        credit = self.credit
        growth = sum(slot.weight - self.raw[slot] for slot in self.slots)
        assert credit.documents <= credit.max_documents + lanes - 1
        assert credit.bytes <= credit.max_bytes + self.fetch_bytes + lanes * self.heaviest + growth
        for lane in self.backlog:
            assert credit.held(lane) <= self.share + max(1, self.share // 8)

    @invariant()
    def there_is_always_a_next_step(self) -> None:
        """A lane that holds nothing is eligible; so if none is, each has something being worked on."""
        eligible, _ = self.credit.poll_limit(self.backlog)
        for lane in self.backlog:
            assert len(lane) or self.credit.eligible(lane)
        assert eligible or all(len(lane) for lane in self.backlog)

    def teardown(self) -> None:
        """With everything finished as it comes, every backlog is emptied and all credit returned."""
        if not hasattr(self, "backlog"):
            return
        for _ in range(sum(map(len, self.backlog.values())) * 4 + 4):
            self.poll()
            for slot in self.slots:
                if slot.state < COMPLETED:
                    self.complete(slot, 0, 0)
            self.deliver()
        assert not any(self.backlog.values())
        assert (self.credit.documents, self.credit.bytes, self.credit.tokens) == (0, 0, 0)


def test_credit_when_load_is_random_then_keeps_the_bound_and_never_deadlocks() -> None:
    run_state_machine_as_test(
        Load, settings=settings(max_examples=300, stateful_step_count=40, deadline=None)
    )
