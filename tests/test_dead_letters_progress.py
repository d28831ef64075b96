"""What a replay's commit says: the letters that are done, and nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferstream.documents import Headers
from inferstream.tools.dead_letters import letter_of
from inferstream.tools.dead_letters_progress import MAX_METADATA, Progress, UnknownProgress
from inferstream.tools.dead_letters_reading import Page
from inferstream.tools.dead_letters_replay import METADATA_RESERVE, _fitting, _pass_gaps
from tests.test_dead_letters import FakeRecord

marks = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12)), max_size=40)


@given(st.integers(0, 50), marks)
def test_progress_when_marked_then_it_is_the_set_of_what_was_marked(
    start: int, stretches: list[tuple[int, int]]
) -> None:
    progress, done = Progress(start), set(range(start))
    for first, length in stretches:
        progress.mark(first, first + length)
        done |= set(range(first, first + length))
    assert [progress.done(offset) for offset in range(-1, 140)] == [
        offset in done or offset < 0 for offset in range(-1, 140)
    ]
    assert progress.watermark == next(offset for offset in range(200) if offset not in done)
    edges = [progress.watermark, *(edge for run in progress.runs for edge in run)]
    assert edges == sorted(set(edges))


@given(st.integers(0, 1 << 62), marks)
def test_progress_when_committed_and_read_again_then_it_is_the_same(
    start: int, stretches: list[tuple[int, int]]
) -> None:
    progress = Progress(start)
    for first, length in stretches:
        progress.mark(start + first, start + first + length)
    metadata = progress.metadata()
    assert Progress.of(progress.watermark, metadata) == progress
    assert bool(metadata) == bool(progress.runs)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
def test_progress_when_every_so_many_are_done_at_random_then_it_reads_back_and_takes_little(
    share: float,
) -> None:
    chance, progress = random.Random(9), Progress(1000)
    for offset in range(1001, 21_000):
        if chance.random() < share:
            progress.mark(offset, offset + 1)
    metadata = progress.metadata()
    assert Progress.of(1000, metadata) == progress
    assert len(metadata) < MAX_METADATA


def test_progress_when_the_stretches_are_long_then_their_length_costs_nothing() -> None:
    progress = Progress(0)
    progress.mark(10_000_000, 900_000_000)
    progress.mark(1_000_000_000, 1 << 40)
    assert len(progress.metadata()) < 64
    assert Progress.of(0, progress.metadata()) == progress


@pytest.mark.parametrize(
    "metadata", ["partitions=4", "replay/2:rAA", "replay/1:", "replay/1:x", "replay/1:r!", "replay/1:rAAAA"]
)
def test_progress_when_the_metadata_is_not_of_this_form_then_it_is_unknown(metadata: str) -> None:
    with pytest.raises(UnknownProgress):
        Progress.of(0, metadata)


@given(st.text(alphabet="abcxyzABC019-_=", max_size=60))
def test_progress_when_the_metadata_is_damaged_then_it_is_unknown_or_read_but_never_worse(text: str) -> None:
    for form in "rb":
        try:
            Progress.of(5, f"replay/1:{form}{text}")
        except UnknownProgress:
            continue


def page(start: int, stop: int, offsets: list[int]) -> Page:
    none: Headers = ()
    return Page(0, start, stop, [letter_of(FakeRecord(headers=none, offset=offset)) for offset in offsets])


def test_gaps_when_they_follow_a_letter_that_is_done_then_they_are_done_too() -> None:
    progress = Progress(4)
    progress.mark(5, 6)
    progress.mark(9, 10)
    _pass_gaps(progress, page(4, 14, [5, 7, 9, 11]))
    assert progress == Progress(7, [(9, 11)])
    progress.mark(7, 8)
    progress.mark(11, 12)
    _pass_gaps(progress, page(4, 14, [5, 7, 9, 11]))
    assert progress == Progress(14)


@settings(max_examples=20, deadline=None)  # each at the bound, where encoding takes its tens of milliseconds
@given(st.integers(0, 1 << 30))
def test_fitting_when_the_commit_has_no_room_for_a_page_then_it_is_cut_to_what_has(seed: int) -> None:
    chance, progress = random.Random(seed), Progress(0)
    # Just before the bound, in the manner that takes the most: at random.
    for offset in range(1, 24_000 + chance.randrange(600)):
        if chance.random() < 0.5:
            progress.mark(offset, offset + 1)
    start = progress.runs[-1][1] + 1
    offsets = sorted(chance.sample(range(start, start + 1000), 400))
    whole = page(start, start + 1000, list(range(start, start + 1000)))
    letters = [each for each in whole.letters if each.record.offset in set(offsets)]
    fitting = _fitting(progress, whole, letters)
    assert list(fitting) == letters[: len(fitting)]
    # Whatever part of them is refused, what is done can be committed.
    for each in fitting:
        if chance.random() < 0.9:
            progress.mark(each.record.offset, each.record.offset + 1)
    _pass_gaps(progress, whole)
    if fitting:
        assert len(progress.metadata()) <= MAX_METADATA - METADATA_RESERVE // 2
