"""How the benchmark of rebalances reads a run."""

from __future__ import annotations

from benchmarks.rebalance import Result, Window, longest_pause, repeats


def even(partition: int, start: float, end: float, step: float = 0.5) -> list[Result]:
    count = int((end - start) / step)
    return [Result(partition, int(start / step) + n, start + n * step) for n in range(count)]


def test_longest_pause_when_one_partition_stands_still_then_it_is_that_ones() -> None:
    results = even(0, 0, 100) + even(1, 0, 50) + even(1, 57, 100)
    assert longest_pause(results, Window("dies", 50, 80)) == 7.5
    assert longest_pause(results, Window("joins", 0, 50)) == 0.5, "the last result came before the death"


def test_longest_pause_when_only_repeats_come_then_it_goes_on() -> None:
    results = [*even(0, 0, 10), Result(0, 19, 12.0), *even(0, 14, 20)]
    assert longest_pause(results, Window("leaves", 8, 20)) == 4.5


def test_repeats_then_they_are_of_the_window_in_which_they_came() -> None:
    results = [Result(0, 1, 1.0), Result(0, 2, 2.0), Result(0, 1, 3.0), Result(1, 1, 3.5), Result(0, 2, 9.0)]
    assert repeats(results, Window("dies", 2.5, 5.0)) == 1
    assert repeats(results, Window("leaves", 0.0, 2.5)) == 0
