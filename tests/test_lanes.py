"""Promise 1 and the order of promise 2, on the ledger alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from inferstream.documents import Kind, Outgoing
from inferstream.lanes import ACKNOWLEDGED, COMPLETED, DROPPED, RELEASED, Lane, Slot


@dataclass(frozen=True)
class Fetched:
    """The one field of a record that a lane reads."""

    offset: int


OUTCOME = Outgoing(Kind.RESULT, None, b"{}", ())


def admit(lane: Lane, *offsets: int) -> list[Slot]:
    records: list[Any] = [Fetched(offset) for offset in offsets]
    return [lane.admit(record, weight=10) for record in records]


def complete(lane: Lane, *slots: Slot) -> None:
    for slot in slots:
        assert lane.complete(slot, OUTCOME)


def test_watermark_when_nothing_was_admitted_then_is_the_start() -> None:
    assert Lane("in", 0, epoch=1, start=42).watermark == 42


def test_release_when_completed_out_of_order_then_returns_the_head_run_once() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    a, b, c = admit(lane, 0, 1, 2)
    complete(lane, c, b)
    assert lane.release() == []
    assert (lane.blocked, lane.in_flight) == (2, 1)
    complete(lane, a)
    assert lane.release() == [a, b, c]
    assert lane.release() == []
    assert (lane.blocked, lane.in_flight, len(lane)) == (0, 0, 3)


def test_watermark_when_acknowledged_out_of_order_then_stops_at_the_first_gap() -> None:
    lane = Lane("in", 0, epoch=1, start=5)
    a, b, c = slots = admit(lane, 5, 6, 7)
    complete(lane, *slots)
    lane.release()
    lane.acknowledge(b)
    lane.acknowledge(c)
    assert lane.watermark == 5
    lane.acknowledge(a)
    assert lane.watermark == 8
    assert (lane.settled, len(lane)) == (3, 0)


def test_watermark_when_offsets_have_gaps_then_passes_them_with_the_record_before() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    a, b = admit(lane, 3, 10)
    assert lane.watermark == 3
    complete(lane, a, b)
    for slot in lane.release():
        lane.acknowledge(slot)
    assert lane.watermark == 11
    lane.advance(20)  # transaction markers at the end
    assert lane.watermark == 20


def test_advance_when_records_are_held_then_leaves_the_watermark_below_them() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    admit(lane, 0)
    lane.advance(9)
    assert (lane.watermark, lane.position) == (0, 9)


def test_release_when_limit_is_reached_then_waits_for_settled_slots() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    a, b, c = slots = admit(lane, 0, 1, 2)
    complete(lane, *slots)
    assert lane.release(2) == [a, b]
    lane.acknowledge(b)  # acknowledged, but a crash would still deliver it again
    assert lane.release(2) == []
    assert lane.blocked == 0
    lane.acknowledge(a)
    assert lane.release(2) == [c]


def test_acknowledge_when_it_waits_behind_the_head_then_lets_go_of_its_payload() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    _, b = slots = admit(lane, 0, 1)
    complete(lane, *slots)
    lane.release()
    lane.acknowledge(b)
    record: object = b.record
    assert (record, b.outcome, b.state) == (None, None, ACKNOWLEDGED)
    assert len(lane) == 2


def test_drop_when_a_prefix_is_kept_then_watermark_ends_at_the_first_dropped() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    a, b, c, d = admit(lane, 0, 2, 4, 6)
    complete(lane, a, c)
    assert lane.drop(keep=2) == [c, d]
    assert lane.closed
    assert [slot.state for slot in (c, d)] == [DROPPED, DROPPED]
    assert not lane.complete(d, OUTCOME)
    complete(lane, b)
    for slot in lane.release():
        assert lane.acknowledge(slot)
    assert lane.watermark == 4
    lane.advance(100)
    assert lane.watermark == 4
    assert lane.position == 4  # where a successor has to fetch from


def test_drop_when_released_slots_are_cut_then_their_acknowledgement_changes_nothing() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    slots = admit(lane, 0, 1)
    complete(lane, *slots)
    lane.release()
    assert lane.drop(keep=0) == slots
    assert not lane.acknowledge(slots[0])
    assert (lane.watermark, len(lane), lane.unsettled) == (0, 0, 0)


def test_drop_when_a_cut_slot_was_acknowledged_then_its_credit_is_not_returned_twice() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    a, b, c = slots = admit(lane, 0, 1, 2)
    complete(lane, *slots)
    lane.release()
    assert lane.acknowledge(b)
    assert lane.drop(keep=1) == [c]
    assert lane.acknowledge(a)
    assert lane.watermark == 2  # b was acknowledged, c was dropped


def test_drop_when_called_again_with_less_then_the_watermark_still_never_falls() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    slots = admit(lane, 0, 1, 2)
    complete(lane, *slots)
    lane.release()
    lane.drop(keep=2)
    lane.acknowledge(slots[0])
    assert lane.watermark == 1
    assert lane.drop(keep=0) == [slots[1]]
    assert lane.watermark == 1


def test_drop_when_everything_is_kept_then_only_closes_the_lane() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    (slot,) = admit(lane, 0)
    assert lane.drop(keep=None) == []
    assert lane.closed and list(lane) == [slot]
    with pytest.raises(ValueError, match="is closed"):
        admit(lane, 1)


def test_admit_when_the_source_goes_backwards_then_refuses() -> None:
    lane = Lane("in", 3, epoch=1, start=0)
    admit(lane, 7)
    with pytest.raises(ValueError, match="in:3 expects offset 8 or later, was given 7"):
        admit(lane, 7)
    with pytest.raises(ValueError, match="cannot go back to 2"):
        lane.advance(2)


def test_slot_when_moved_out_of_turn_then_refuses() -> None:
    lane, other = Lane("in", 0, epoch=1, start=0), Lane("in", 0, epoch=2, start=0)
    (slot,) = admit(lane, 0)
    with pytest.raises(ValueError, match="acknowledged"):
        lane.acknowledge(slot)
    with pytest.raises(ValueError, match="completed"):
        other.complete(slot, OUTCOME)
    complete(lane, slot)
    with pytest.raises(ValueError, match=r"COMPLETED.* cannot be completed"):
        lane.complete(slot, OUTCOME)
    lane.release()
    lane.acknowledge(slot)
    with pytest.raises(ValueError, match=r"ACKNOWLEDGED.* cannot be acknowledged"):
        lane.acknowledge(slot)


def test_release_when_unordered_then_sends_what_is_completed_at_once() -> None:
    lane = Lane("in", 0, epoch=1, start=0, ordered=False)
    a, b, c = admit(lane, 0, 1, 2)
    complete(lane, c)
    assert lane.blocked == 0
    assert lane.release() == [c]
    lane.acknowledge(c)
    assert lane.watermark == 0
    complete(lane, b, a)
    assert lane.release() == [b, a]
    lane.acknowledge(a)
    assert lane.watermark == 1
    lane.acknowledge(b)
    assert lane.watermark == 3


def test_release_when_unordered_and_limited_then_keeps_a_place_for_the_head() -> None:
    lane = Lane("in", 0, epoch=1, start=0, ordered=False)
    a, b, c, d = admit(lane, 0, 1, 2, 3)
    complete(lane, b, c, d)
    assert lane.release(2) == [b]
    lane.acknowledge(b)
    assert lane.release(2) == []
    complete(lane, a)
    assert lane.release(2) == [a]
    assert (a.state, c.state) == (RELEASED, COMPLETED)
    lane.acknowledge(a)
    assert lane.release(2) == [c, d]


def test_release_when_closing_then_stops_at_the_fence_and_is_finished_when_that_is_settled() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    slots = admit(lane, 0, 1, 2, 3)
    complete(lane, *slots)
    lane.close(2)
    assert not lane.handed_on
    assert lane.release() == slots[:2]
    assert lane.handed_on and not lane.finished and lane.release() == []
    for slot in slots[:2]:
        lane.acknowledge(slot)
    assert lane.finished and len(lane) == 2 and lane.watermark == 2


def test_resume_when_suspended_then_goes_on_where_it_was_in_order() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    slots = admit(lane, 0, 1, 2, 3)
    complete(lane, slots[0], slots[1], slots[3])
    assert lane.release() == slots[:2]
    lane.suspend()
    lane.take_back([slots[1]])
    complete(lane, slots[2])
    assert lane.release() == [] and lane.unsettled == 1
    lane.acknowledge(slots[0])  # it was with the broker: that is so whoever owns the partition
    lane.resume(2)
    assert lane.epoch == 2 and lane.watermark == 1
    slots += admit(lane, 4)
    assert lane.release() == slots[1:4]


def test_lane_when_not_open_then_admits_nothing() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    for end in (lane.close, lane.suspend):
        end()
        with pytest.raises(ValueError, match="is closed"):
            admit(lane, 0)
        lane.advance(7)
        assert lane.position == 0


def test_lane_when_dropped_then_it_never_comes_back() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    admit(lane, 0)
    lane.suspend()
    assert len(lane.drop(0)) == 1
    for way in (lane.suspend, lane.close, lambda: lane.resume(2)):
        with pytest.raises(ValueError, match="was dropped"):
            way()


def test_lane_when_not_suspended_then_nothing_is_resumed_or_taken_back() -> None:
    lane = Lane("in", 0, epoch=1, start=0)
    slots = admit(lane, 0)
    complete(lane, *slots)
    lane.release()
    with pytest.raises(ValueError, match="not suspended"):
        lane.resume(2)
    with pytest.raises(ValueError, match="cannot be taken back"):
        lane.take_back(slots)


def test_release_when_unordered_and_closing_then_stops_at_the_fence() -> None:
    lane = Lane("in", 0, epoch=1, start=0, ordered=False)
    slots = admit(lane, 0, 1, 2, 3)
    complete(lane, slots[3], slots[2], slots[0])
    lane.close(3)
    assert lane.release() == [slots[2], slots[0]]
    lane.suspend()
    complete(lane, slots[1])
    assert lane.release() == []
    lane.resume(2)
    assert set(lane.release()) == {slots[1], slots[3]}
