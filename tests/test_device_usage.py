"""Where a device's time went: each part of a gap is put to what the oldest document of its batch waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferstream.device import Flight, Span
from inferstream.device.usage import Usage


def flight(began: float, idle_s: float, busy_s: float = 1.0, stalled_s: float = 0.0) -> Flight:
    spans = (Span("a", "h2d", began - 1, began), Span("b", "compute", began, began + busy_s))
    return Flight(0, None, None, busy_s, idle_s, stalled_s, spans)


@pytest.mark.parametrize(
    ("admitted", "ready", "launched", "idle"),
    [
        (0, 0, 0, {"launch": 10.0}),  # a backlog: the batch was launched before the gap began
        (0, 0, 96, {"batch": 6.0, "launch": 4.0}),
        (0, 93, 96, {"prepare": 3.0, "batch": 3.0, "launch": 4.0}),
        (91, 93, 96, {"prepare": 2.0, "batch": 3.0, "launch": 4.0}),  # a trickle: one second without input
        (99.5, 99.75, 100, {"prepare": 0.25, "batch": 0.25}),
        (100, 100, 100, {}),
        (100.5, 100.5, 100.5, {}),  # a clock that errs puts nothing below zero
    ],
)
def test_add_when_the_device_was_idle_from_90_to_100_then_each_part_has_its_reason(
    admitted: float, ready: float, launched: float, idle: dict[str, float]
) -> None:
    usage = Usage()

    usage.add(flight(began=100, idle_s=10), admitted, ready, launched)

    assert {reason: s for reason, s in usage.idle_s.items() if s} == pytest.approx(idle)
    assert usage.busy_s == 1.0


def test_add_when_a_thread_had_no_core_then_that_is_told_apart() -> None:
    usage = Usage()

    usage.add(flight(began=100, idle_s=0, busy_s=3, stalled_s=2), 0, 0, 0)

    assert usage.busy_s == 3
    assert {reason: s for reason, s in usage.idle_s.items() if s} == {"core": 2}


def test_add_when_the_place_of_the_gap_is_not_known_then_it_is_not_guessed() -> None:
    usage = Usage()

    usage.add(Flight(0, None, None, 2.0, idle_s=1.0), 0, 0, 0)

    assert (usage.busy_s, sum(usage.idle_s.values())) == (2.0, 0.0)


@given(
    times=st.lists(st.floats(0, 200), min_size=3, max_size=3).map(sorted),
    idle_s=st.floats(0, 100),
)
def test_add_of_any_times_then_the_parts_are_the_gap_from_the_admission_on(
    times: list[float], idle_s: float
) -> None:
    usage = Usage()

    usage.add(flight(began=200, idle_s=idle_s), *times)

    expected = max(0.0, 200 - max(times[0], 200 - idle_s))
    assert all(s >= 0 for s in usage.idle_s.values())
    assert sum(usage.idle_s.values()) == pytest.approx(expected)
