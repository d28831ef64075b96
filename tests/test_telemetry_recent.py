"""What grew in the last seconds, and which stage held the others back."""

from __future__ import annotations

import pytest

from inferstream.telemetry.recent import LIMITS, RECENT_S, Growth, Limits

NOTHING = {"prepare": 0, "device": 0, "finish": 0, "publish": 0, "commit": 0}


def test_growth_when_read_every_second_then_it_is_of_the_last_seconds_only() -> None:
    growth = Growth()
    seen = [growth.read(second, second * 2.0, min(second, 10)) for second in range(41)]

    assert seen[0] == (0, 0, 0)
    assert seen[5] == (5, 10, 5)
    assert seen[40] == (RECENT_S, 2 * RECENT_S, 0)


def test_growth_when_a_reading_comes_late_then_its_seconds_are_the_true_ones() -> None:
    growth = Growth()
    growth.read(0, 0)
    growth.read(1, 1)

    assert growth.read(100, 50) == (99, 49)


@pytest.mark.parametrize(
    ("behind", "waiting", "stage"),
    [
        ([], {"device": 500}, "input"),
        ([True, True], {"device": 500}, "poll"),
        ([False], {}, "poll"),
        ([True, False], {"device": 500, "prepare": 40}, "device"),
        ([False], {"device": 60, "prepare": 2000}, "prepare"),
        ([False], {"device": 60, "publish": 900}, "publish"),
        ([False], {"finish": 900, "publish": 80}, "finish"),
        ([False], {"device": 1, "commit": 700}, "commit"),
    ],
)
def test_judge_then_it_is_the_stage_before_which_documents_stand(
    behind: list[bool], waiting: dict[str, int], stage: str
) -> None:
    assert Limits().judge(0, behind, NOTHING | waiting) == stage


def test_shares_when_the_limit_changes_then_they_are_those_of_the_last_seconds() -> None:
    limits = Limits()
    assert set(limits.shares().values()) == {0.0}
    for second in range(30):
        limits.judge(second, [], NOTHING)
    for second in range(30, 36):
        limits.judge(second, [False], NOTHING | {"device": 9})

    shares = limits.shares()

    assert tuple(shares) == LIMITS
    assert shares["device"] == pytest.approx(6 / 15)
    assert shares["input"] == pytest.approx(9 / 15)
    assert sum(shares.values()) == pytest.approx(1)
