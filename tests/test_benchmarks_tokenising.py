"""The benchmark of tokenising compares ways that give the same."""

from __future__ import annotations

import numpy as np

from benchmarks.tokenising import chunks_of, list_share, rates, rows_of, ways
from inferstream.pipeline import CHUNK_BYTES, CHUNK_RECORDS

TEXTS = ["a short one", "", "word " * 400, *(f"text number {n}" for n in range(300))]


def test_ways_when_compared_then_each_gives_the_rows_of_every_text() -> None:
    chunks = chunks_of(TEXTS)
    expected = [row for chunk in chunks for row in rows_of(chunk)]
    with ways(2) as all_ways:
        for name, way in all_ways.items():
            found = [row for rows in way(chunks) for row in rows]
            assert len(found) == len(TEXTS), name
            assert all(map(np.array_equal, found, expected)), name


def test_chunks_when_made_then_none_is_larger_than_a_workers() -> None:
    chunks = chunks_of(["x" * 40_000] * 3 + ["y"] * 1000)
    assert [text for chunk in chunks for text in chunk] == ["x" * 40_000] * 3 + ["y"] * 1000
    assert all(len(chunk) <= CHUNK_RECORDS and sum(map(len, chunk)) <= CHUNK_BYTES for chunk in chunks)


def test_measures_when_run_then_every_way_has_every_round() -> None:
    chunks = chunks_of(TEXTS[:20])
    assert {name: len(values) for name, values in rates(chunks, 2, 1).items()} == {
        "1 thread": 2,
        "1 threads": 2,
        "1 processes": 2,
    }
    assert len(list_share(chunks, 2)) == 2
