"""The policy that forms batches: examples, random loads, and what docs/batching.md says of the simulation."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.batching import ArrivalOrder, FullestClass, simulate
from inferstream.batching import Item, Window, length_class


def window_of(
    lengths: Sequence[int], max_tokens: int, padded: bool = True, max_items: int = 100, lanes: int = 1
) -> Window:
    window = Window(max_tokens, padded=padded, max_items=max_items, lanes=lanes)
    for index, length in enumerate(lengths):
        window.add(Item(owner=index % 3, index=index, length=length, ready_at=float(index), payload=None))
    return window


def lengths(batch: list[Item]) -> list[int]:
    return [item.length for item in batch]


def cost(batch: list[Item], padded: bool) -> int:
    return len(batch) * max(lengths(batch)) if padded else sum(lengths(batch))


def test_form_when_the_window_is_empty_then_gives_nothing() -> None:
    window = Window(100)
    assert window.form() == [] and window.form(arrival=True) == []
    assert window.oldest is None and len(window) == 0


def test_form_when_lengths_are_mixed_then_takes_the_class_of_the_oldest_first() -> None:
    window = window_of([10, 100, 10, 100, 10, 100], max_tokens=300)
    assert lengths(window.form()) == [10, 10, 10]
    assert lengths(window.form()) == [100, 100, 100]


def test_form_when_a_full_class_is_older_then_leaves_the_others_waiting() -> None:
    window = window_of([100, 10, 100, 10, 100, 10], max_tokens=300)
    assert lengths(window.form()) == [100, 100, 100]
    assert lengths(window.form()) == [10, 10, 10]


def test_form_when_the_class_does_not_fill_the_budget_then_widens_to_the_nearest_classes() -> None:
    window = window_of([60, 200, 45, 70, 9], max_tokens=210)
    assert lengths(window.form()) == [60, 70, 45]


def test_form_when_a_longer_piece_does_not_fit_then_shorter_ones_still_do() -> None:
    window = window_of([40, 200, 9, 9], max_tokens=160)
    assert lengths(window.form()) == [40, 9, 9]


def test_form_when_one_piece_is_longer_than_the_budget_then_it_goes_alone() -> None:
    window = window_of([500, 10], max_tokens=100)
    assert lengths(window.form()) == [500]
    window = window_of([500, 500], max_tokens=100, padded=False)
    assert lengths(window.form()) == [500]


def test_form_when_max_items_is_reached_then_stops() -> None:
    window = window_of([1] * 10, max_tokens=1000, max_items=4)
    assert [len(window.form()) for _ in range(3)] == [4, 4, 2]


def test_form_when_the_engine_is_padding_free_then_takes_arrival_order() -> None:
    window = window_of([10, 70, 20, 50], max_tokens=100, padded=False)
    assert lengths(window.form()) == [10, 70, 20]
    assert lengths(window.form()) == [50]


def test_form_when_several_lanes_share_what_waits_then_each_gets_a_part_until_it_is_too_little() -> None:
    window = window_of([10] * 15, max_tokens=100, padded=False, lanes=2)
    formed = []
    while batch := window.form():
        formed.append(sum(lengths(batch)))
    assert formed == [70, 40, 20, 20]


@pytest.mark.parametrize("padded", [True, False])
def test_form_when_there_is_a_budget_for_every_lane_then_fills_it(padded: bool) -> None:
    assert len(window_of([10] * 20, max_tokens=100, padded=padded, lanes=2).form()) == 10
    assert len(window_of([10] * 19, max_tokens=100, padded=padded, lanes=2).form()) < 10


def test_form_when_too_little_waits_to_be_shared_then_takes_all_of_it() -> None:
    assert lengths(window_of([8, 8, 7], max_tokens=100, lanes=2, padded=False).form()) == [8, 8, 7]
    assert lengths(window_of([13, 13], max_tokens=100, lanes=2, padded=False).form()) == [13]


def test_form_when_the_oldest_is_longer_than_a_share_then_it_goes_alone() -> None:
    window = window_of([90, 10, 10], max_tokens=100, lanes=2, padded=False)
    assert [lengths(window.form()) for _ in range(2)] == [[90], [10, 10]]


def test_form_when_closing_then_takes_arrival_order_within_the_padded_budget() -> None:
    window = window_of([10, 70, 20, 50], max_tokens=140)
    assert lengths(window.form(arrival=True)) == [10, 70]
    assert lengths(window.form(arrival=True)) == [20, 50]


def test_form_when_the_budget_was_lowered_then_the_next_batch_obeys() -> None:
    window = window_of([10] * 20, max_tokens=100)
    assert len(window.form()) == 10
    window.max_tokens = 50
    assert len(window.form()) == 5


def test_discard_when_owners_are_dropped_then_their_pieces_alone_are_gone() -> None:
    window = window_of([10, 300, 20, 11, 310, 21], max_tokens=10_000)
    gone = window.discard(lambda item: item.owner == 1)
    assert [item.index for item in gone] == [1, 4]
    assert (len(window), window.tokens) == (4, 62)
    assert sorted(item.index for item in window.form()) == [0, 2, 3, 5]


def test_wait_s_when_the_window_is_not_full_then_lingers_from_the_oldest() -> None:
    window = Window(100)
    assert window.wait_s(7.0, 0.005) == math.inf
    window.add(Item("a", 0, 30, 7.0, None))
    window.add(Item("b", 0, 60, 7.004, None))
    assert not window.full
    assert window.wait_s(7.001, 0.005) == pytest.approx(0.004)
    assert window.wait_s(7.006, 0.005) == 0.0
    window.add(Item("c", 0, 10, 7.004, None))
    assert window.full
    assert window.wait_s(7.001, 0.005) == 0.0


def test_wait_s_when_the_number_of_pieces_is_reached_then_does_not_linger() -> None:
    assert window_of([1, 1], max_tokens=100, max_items=2).wait_s(0.0, 1.0) == 0.0


@pytest.mark.parametrize(("max_tokens", "max_items", "lanes"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_window_when_a_bound_makes_no_sense_then_refuses(max_tokens: int, max_items: int, lanes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Window(max_tokens, max_items=max_items, lanes=lanes)


def test_length_class_when_lengths_grow_then_grows_and_is_at_most_a_quarter_wide() -> None:
    classes = [length_class(length) for length in range(20_000)]
    assert classes == sorted(classes)
    assert set(classes) == set(range(classes[-1] + 1))
    first: dict[int, int] = {}
    for length, number in enumerate(classes):
        assert length < 1.25 * first.setdefault(number, length) or length < 4


some_lengths = st.lists(st.integers(1, 40) | st.sampled_from([1, 100, 5000]), max_size=60)
operations = st.lists(
    some_lengths
    | st.sampled_from(["form", "form", "arrival"])
    | st.integers(0, 4).map(lambda owner: (owner,)),
    max_size=30,
)


@example(
    steps=[[10, 1, 1, 1, 1, 1, 1, 1, 1, 33], "form", [1, 1, 1, 1, 1, 1, 1, 32, 33, 32]],
    max_tokens=160,
    max_items=5,
    padded=True,
    lanes=1,
)
@settings(max_examples=300, deadline=None)
@given(operations, st.integers(1, 400), st.integers(1, 20), st.booleans(), st.integers(1, 4))
def test_window_when_load_is_random_then_its_promises_hold(
    steps: list[list[int] | str | tuple[int]], max_tokens: int, max_items: int, padded: bool, lanes: int
) -> None:
    """Never above budget, anchored on the oldest, each piece exactly once, counts right."""
    window = Window(max_tokens, padded=padded, max_items=max_items, lanes=lanes)
    waiting: list[Item] = []  # in arrival order
    added: list[Item] = []
    taken: list[Item] = []
    for step in [*steps, *["form"] * 2000]:
        if isinstance(step, list):
            for length in step:
                item = Item(len(added) % 5, len(added), length, float(len(added)), None)
                window.add(item)
                added.append(item)
                waiting.append(item)
        elif isinstance(step, tuple):
            gone = window.discard(lambda item, step=step: item.owner == step[0])  # type: ignore[misc]  # lambda default
            assert gone == [item for item in waiting if item.owner == step[0]]
            waiting = [item for item in waiting if item.owner != step[0]]
            taken += gone
        else:
            batch = window.form(arrival=step == "arrival")
            assert bool(batch) == bool(waiting)
            if not batch:
                break
            assert batch[0] is waiting[0]
            assert len(batch) == 1 or cost(batch, padded) <= max_tokens
            assert len(batch) <= max_items
            if step == "arrival" or not padded:
                assert batch == waiting[: len(batch)]
            left = [item for item in waiting if item not in batch]
            tokens = sum(lengths(waiting))
            shared = lanes > 1 and tokens < lanes * max_tokens
            # Shared or not, no lane gets less than its part, but for one piece and what the padding takes.
            if shared and left and len(batch) < max_items and not padded:
                part = min(max_tokens, tokens / lanes)
                assert cost(batch, False) + left[0].length > part
            if not shared and len(batch) < max_items and not (step == "arrival" and padded):
                # Nothing that was first in line would have fitted.
                in_line: dict[int, int] = {}
                for item in left:
                    in_line.setdefault(Window.class_of(item.length) if padded else 0, item.length)
                for length in in_line.values():
                    more = (
                        max(length, *lengths(batch)) * (len(batch) + 1)
                        if padded
                        else cost(batch, False) + length
                    )
                    assert more > max_tokens
            taken += batch
            waiting = left
        assert len(window) == len(waiting)
        assert window.tokens == sum(lengths(waiting))
        assert window.oldest is (waiting[0] if waiting else None)
        assert {item.index for item in window} == {item.index for item in waiting}
    assert not waiting
    assert sorted(item.index for item in taken) == list(range(len(added)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=80), st.booleans(), st.booleans())
def test_form_when_long_pieces_have_a_lower_limit_then_no_batch_is_above_that_of_its_longest(
    waiting: list[int], padded: bool, arrival: bool
) -> None:
    def limit(longest: int) -> int:
        return 100 if longest >= 64 else 300

    window = window_of(waiting, max_tokens=400, padded=padded)
    window.limit = limit
    formed = 0
    while batch := window.form(arrival=arrival):
        assert len(batch) == 1 or cost(batch, padded) <= limit(max(lengths(batch)))
        formed += len(batch)
    assert formed == len(waiting)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=80), st.integers(1, 200))
def test_form_when_younger_pieces_keep_coming_then_the_oldest_are_not_starved(
    first: list[int], odd: int
) -> None:
    """However many pieces of another length arrive, what waited at position k is gone after k + 1 batches."""
    window = window_of(first, max_tokens=400)
    waiting = set(range(len(first)))
    for formed in range(len(first)):
        for _ in range(20):
            window.add(Item("late", -1, odd, 0.0, None))
        waiting -= {item.index for item in window.form()}
        assert formed not in waiting


def test_simulation_when_rules_are_compared_then_anchoring_is_as_fast_and_blocks_less() -> None:
    """What docs/batching.md says about the rules, at a window of 16 budgets, on fewer documents."""
    arrival = simulate(ArrivalOrder, True, 16, 300)
    fullest = simulate(FullestClass, True, 16, 300)
    anchored = simulate(Window, True, 16, 300)
    assert anchored.speed > 3 * arrival.speed
    assert anchored.speed > 0.97 * fullest.speed
    assert anchored.efficiency > 0.85
    assert anchored.blocked < 0.5 * fullest.blocked
    assert anchored.longest_wait < 0.5 * fullest.longest_wait


def seconds_to_the_end(lengths: Sequence[int], lanes: int, *, shared: bool) -> float:
    """Until the last batch of these documents ends, on ``lanes`` lanes with one more batch staged."""
    window = window_of(lengths, max_tokens=2048, padded=False, lanes=lanes if shared else 1)
    staged: deque[float] = deque()
    ends: list[float] = []
    now = 0.0
    while True:
        while len(staged) + len(ends) <= lanes and (batch := window.form()):
            staged.append(0.0025 + 0.0002 * cost(batch, False))
        while staged and len(ends) < lanes:
            heapq.heappush(ends, now + staged.popleft())
        if not ends:
            return now
        now = heapq.heappop(ends)


@pytest.mark.parametrize(
    ("documents", "lanes", "at_most"), [(30, 2, 0.9), (100, 2, 0.95), (30, 4, 0.6), (100, 4, 0.9)]
)
def test_simulation_when_lanes_share_the_end_then_it_is_over_sooner(
    documents: int, lanes: int, at_most: float
) -> None:
    """What docs/batching.md says of sharing; the lengths are like those of real documents."""
    chance = random.Random(1)
    ratios = []
    for _ in range(40):
        sizes = [min(256, max(3, round(chance.lognormvariate(4.2, 0.9)))) for _ in range(documents)]
        whole, shared = (seconds_to_the_end(sizes, lanes, shared=shared) for shared in (False, True))
        ratios.append(shared / whole)
    assert statistics.median(ratios) < at_most
    assert max(ratios) < 1.15
