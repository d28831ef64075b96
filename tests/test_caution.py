"""The notes in a commit's metadata, and what they say of documents that kill the process."""

from __future__ import annotations

import pytest
from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from inferstream.kafka.caution import Caution, judge
from inferstream.kafka.notes import Note
from inferstream.lanes import Lane

ONE, TWO = TopicPartition("in", 0), TopicPartition("in", 1)


@given(
    st.builds(
        Note,
        partitions=st.none() | st.integers(0, 10**6),
        attempts=st.integers(0, 1000),
        suspect=st.none() | st.integers(0, 2**63 - 1),
    )
)
def test_note_when_written_and_read_is_the_same(note: Note) -> None:
    assert Note.parse(str(note)) == note


@pytest.mark.parametrize(
    ("metadata", "note"),
    [
        (None, Note()),
        ("", Note()),
        ("partitions=8", Note(8)),
        ("someone else's", Note()),
        ("partitions=many;attempts=-1;suspect=", Note()),
        ("later=word;attempts=2", Note(None, 2)),
        ("partitions=\u0663", Note()),
    ],
)
def test_note_when_metadata_is_not_ours_says_nothing(metadata: str | None, note: Note) -> None:
    assert Note.parse(metadata) == note


def test_attempts_when_there_is_something_to_read_are_counted_up() -> None:
    verdict = judge({ONE: Note(2, 1), TWO: Note(2, 1)}, {ONE}, 3)

    assert verdict.notes == {ONE: Note(2, 2), TWO: Note(2, 1)}
    assert (verdict.condemned, verdict.suspected) == ({}, set())


def test_partition_when_processes_died_often_enough_is_suspected() -> None:
    verdict = judge({ONE: Note(2, 3), TWO: Note(2, 2)}, {ONE, TWO}, 3)

    assert verdict.suspected == {ONE}


def test_partition_when_it_has_nothing_to_read_is_not_suspected() -> None:
    assert judge({ONE: Note(2, 3)}, set(), 3).suspected == set()


def test_document_when_it_was_named_is_condemned_and_the_others_are_not_suspected() -> None:
    verdict = judge({ONE: Note(2, 4, 17), TWO: Note(2, 4)}, {ONE, TWO}, 3)

    assert verdict.condemned == {ONE: 17}
    assert verdict.suspected == set()
    assert verdict.notes[ONE].suspect == 17  # until its dead letter is settled


def test_turns_when_documents_go_one_at_a_time_change_between_lanes_and_end() -> None:
    first, second = Lane("in", 0, 1, 0), Lane("in", 1, 1, 0)
    caution = Caution({first: 2, second: 100}, window=3)
    turns = []
    while (lane := caution.turn()) is not None:
        turns.append(lane.partition)
        lane.advance(lane.position + 1)
        caution.took(lane)

    assert turns == [0, 1, 0, 1, 1]  # the first up to its end, the second for a window
