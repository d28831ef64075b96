"""The bounds of promise 4 and the eligibility of lanes, step by step."""

from __future__ import annotations

import pytest

from inferstream.credit import Credit


def credit(
    documents: int = 100,
    size: int = 100_000,
    tokens: int = 10_000,
    share: float = 0.5,
    fetch_bytes: int | None = None,
    lanes: str = "ab",
) -> Credit[str]:
    made: Credit[str] = Credit(documents, size, tokens, share, fetch_bytes)
    for lane in lanes:
        made.open_lane(lane)
    return made


def take(held: Credit[str], lane: str, count: int, weight: int = 1) -> None:
    for _ in range(count):
        held.take(lane, weight)


def test_max_records_when_nothing_is_held_then_is_the_documents_bound() -> None:
    assert credit().max_records() == 100


def test_max_records_when_documents_are_held_then_is_what_is_left() -> None:
    held = credit()
    take(held, "a", 30)
    take(held, "b", 30)
    assert held.max_records() == 40


def test_max_records_when_less_than_a_mean_record_fits_then_is_one() -> None:
    held = credit(documents=10, size=1000)
    for _ in range(400):
        held.take("a", 400)
        held.give("a", 400)
    held.take("a", 400)
    held.take("b", 400)
    assert held.max_records() == 1


def test_max_records_when_documents_are_large_then_follows_their_recent_mean() -> None:
    held = credit(documents=1000, size=1_000_000)
    for _ in range(400):
        held.take("a", 10_000)
        held.give("a", 10_000)
    assert 99 <= held.max_records() <= 101


def test_max_records_when_results_are_heavier_than_records_then_counts_what_they_end_with() -> None:
    held = credit(documents=1000, size=1_000_000)
    for _ in range(400):
        held.take("a", 100)
        held.reweigh("a", 100, 10_000)
        held.give("a", 10_000)
    assert 99 <= held.max_records() <= 101


def test_max_records_when_tokens_run_short_then_follows_their_recent_mean() -> None:
    held = credit(documents=1000, tokens=10_000)
    for _ in range(400):
        held.take("a", 1)
        held.reweigh("a", 1, 1, 500)
        held.give("a", 1, 500)
    assert 19 <= held.max_records() <= 21


@pytest.mark.parametrize("bound", ["documents", "bytes", "tokens"])
def test_eligible_when_the_credit_is_exhausted_then_only_lanes_that_hold_nothing(bound: str) -> None:
    held = credit(documents=4, lanes="abc", share=1.0)
    take(held, "a", 1)
    take(held, "b", 3 if bound == "documents" else 1)
    if bound == "bytes":
        held.reweigh("b", 1, 100_000)
    if bound == "tokens":
        held.reweigh("b", 1, 1, 10_000)
    assert held.exhausted and held.max_records() == 0
    assert [lane for lane in "abc" if held.eligible(lane)] == ["c"]
    assert held.poll_limit("abc") == (["c"], 1)
    take(held, "c", 1)
    assert held.poll_limit("abc") == ([], 0)


def test_eligible_when_a_lane_is_at_its_share_then_leaves_the_rest_to_the_others() -> None:
    held = credit()
    take(held, "a", 50)
    assert not held.eligible("a") and held.eligible("b")
    assert held.poll_limit("ab") == (["b"], 50)
    held.give("a", 1)
    assert held.eligible("a")


def test_eligible_when_a_lane_holds_its_share_of_bytes_then_is_not_polled() -> None:
    held = credit()
    held.take("a", 50_000)
    assert held.poll_limit("ab")[0] == ["b"]


def test_poll_limit_when_a_lane_is_just_below_its_share_then_polls_stay_worth_their_while() -> None:
    held = credit(documents=1000)
    take(held, "a", 499)
    assert held.poll_limit("ab") == (["a", "b"], 62)  # an eighth of the share, not 1


def test_poll_limit_when_few_bytes_are_left_then_lanes_take_turns() -> None:
    held = credit(size=1000, fetch_bytes=300, lanes="abcd", share=1.0)
    held.take("a", 350)
    polled = [held.poll_limit("abcd")[0] for _ in range(4)]
    assert [len(lanes) for lanes in polled] == [2, 2, 2, 2]
    assert {lane for lanes in polled for lane in lanes} == set("abcd")
    held.take("b", 400)
    assert [held.poll_limit("abcd")[0] for _ in range(4)] in (
        [["a"], ["b"], ["c"], ["d"]],
        [["b"], ["c"], ["d"], ["a"]],
        [["c"], ["d"], ["a"], ["b"]],
        [["d"], ["a"], ["b"], ["c"]],
    )


def test_take_when_a_document_is_heavier_than_the_bound_then_is_admitted_and_closes_the_gate() -> None:
    held = credit(size=1000)
    held.take("a", 5000)
    assert held.poll_limit("ab") == (["b"], 1)
    held.give("a", 5000)
    assert held.poll_limit("ab")[0] == ["a", "b"]


def test_close_lane_when_it_holds_credit_then_returns_it_and_ignores_late_returns() -> None:
    held = credit()
    held.take("a", 10)
    held.reweigh("a", 10, 30, 7)
    held.close_lane("a")
    held.give("a", 30, 7)
    held.reweigh("a", 30, 40, 1)
    held.close_lane("a")
    assert (held.documents, held.bytes, held.tokens) == (0, 0, 0)
    assert not held.eligible("a")
    assert held.poll_limit("ab")[0] == ["b"]
    with pytest.raises(KeyError):
        held.take("a", 1)


def test_open_lane_when_it_is_open_then_refuses() -> None:
    with pytest.raises(ValueError, match="open already"):
        credit().open_lane("a")


def test_slow_head_when_the_others_go_on_then_they_are_never_stalled() -> None:
    """Lane a's head never ends; b to d are polled and finished.  They keep the greater part of the credit."""
    held = credit(documents=80, lanes="abcd")
    for _ in range(50):
        eligible, limit = held.poll_limit("abcd")
        for lane in eligible:
            take(held, lane, limit // len(eligible))
        for lane in "bcd":
            for _ in range(held.held(lane)):
                held.give(lane, 1)
    assert held.held("a") <= 40 + 5
    eligible, limit = held.poll_limit("abcd")
    assert eligible == ["b", "c", "d"]
    assert limit >= 35


def test_slow_heads_when_they_hold_everything_then_the_others_go_on_by_their_reserve() -> None:
    held = credit(documents=10, lanes="abcd")
    take(held, "a", 5)
    take(held, "b", 5)
    finished = dict.fromkeys("cd", 0)
    for _ in range(20):
        eligible, limit = held.poll_limit("abcd")
        assert eligible and limit == 1
        take(held, eligible[0], 1)
        if not held.poll_limit("abcd")[0]:
            for lane in "cd":
                held.give(lane, 1)
                finished[lane] += 1
    assert finished == {"c": 10, "d": 10}


@pytest.mark.parametrize(
    "bounds", [(0, 1, 1, 0.5), (1, 0, 1, 0.5), (1, 1, 0, 0.5), (1, 1, 1, 0.0), (1, 1, 1, 1.5)]
)
def test_credit_when_a_bound_makes_no_sense_then_refuses(bounds: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        Credit(*bounds)
