"""The memory model: how many tokens fit, and the ceilings that out of memory lowers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferstream.device.memory import RAISE, Ceilings, fitting_tokens

GIB = 1 << 30
lengths = st.integers(1, 8192)


def test_fitting_tokens_when_a_batch_was_measured_leaves_a_fifth_of_the_memory_free() -> None:
    assert fitting_tokens(10 * GIB, peak_bytes=1 * GIB, tokens=8192) == 8 * 8192


@pytest.mark.parametrize(("free", "peak"), [(0, 1 << 20), (1 << 20, 0), (10, 1 << 30)])
def test_fitting_tokens_when_numbers_are_odd_is_still_at_least_one(free: int, peak: int) -> None:
    assert fitting_tokens(free, peak, 100) >= 1


def test_ceiling_when_memory_ran_out_is_half_the_batch_for_its_length_class_only() -> None:
    ceilings = Ceilings(32_768)

    assert ceilings.out_of_memory(longest=500, tokens=32_000) == 16_000
    assert ceilings.of(500) == ceilings.of(450) == 16_000  # one class
    assert ceilings.of(100) == 32_768
    assert ceilings.lowered


def test_ceiling_when_memory_runs_out_again_and_again_is_halved_and_never_below_one() -> None:
    ceilings = Ceilings(1024)

    lowered = [ceilings.out_of_memory(100, ceilings.of(100)) for _ in range(12)]

    assert lowered == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 1, 1]


def test_ceiling_when_several_batches_in_flight_do_not_fit_is_halved_once() -> None:
    ceilings = Ceilings(1024)

    assert [ceilings.out_of_memory(100, 1024) for _ in range(3)] == [512, 512, 512]


def test_ceiling_when_long_pieces_do_not_fit_alone_stays_for_the_others() -> None:
    ceilings = Ceilings(1024)
    ceilings.out_of_memory(100, 400)

    assert ceilings.out_of_memory(100, 1000) == 200


def test_ceiling_when_a_batch_fits_rises_by_half_a_percent_of_the_budget_until_it_is_forgotten() -> None:
    ceilings = Ceilings(10_000)
    ceilings.out_of_memory(100, 10_000)

    ceilings.fitted(100)
    after_one = ceilings.of(100)
    ceilings.fitted(2000)  # another class learns nothing
    for _ in range(98):
        ceilings.fitted(100)
    nearly = ceilings.of(100)
    ceilings.fitted(100)

    assert after_one == 5050
    assert nearly == 9950
    assert ceilings.of(100) == 10_000 and not ceilings.lowered


@given(st.lists(st.tuples(st.booleans(), lengths, st.integers(1, 65_536)), max_size=60))
def test_ceilings_whatever_happens_stay_between_one_and_the_budget(
    events: list[tuple[bool, int, int]],
) -> None:
    ceilings = Ceilings(32_768)
    for failed, longest, tokens in events:
        before = ceilings.of(longest)
        if failed:
            assert ceilings.out_of_memory(longest, tokens) <= min(before, max(1, tokens // 2))
        else:
            ceilings.fitted(longest)
            assert before <= ceilings.of(longest) <= before + 32_768 * RAISE + 1
        assert 1 <= ceilings.of(longest) <= ceilings.budget
