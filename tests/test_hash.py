"""``builtin:hash``: the same text gives the same vector, whatever it was batched with."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from inferstream.documents import Document, Prepared, Reason, Rejected
from inferstream.tasks.hash import HashRunner, HashTask, digest, hash_vectors


def hash_task(long_documents: Any = "truncate", max_length: int = 4, max_chunks: int = 3) -> HashTask:
    return HashTask(max_length, long_documents, max_chunks, lambda vector: {"embedding": vector})


def test_vector_when_texts_are_equal_is_equal_and_of_unit_length() -> None:
    task = hash_task()
    texts = ["a", "b", "a", "", "\ud800", "東京"]
    prepared = task.prepare([Document(str(n), text) for n, text in enumerate(texts)])

    rows = HashRunner().run([one.chunks[0] for one in prepared if isinstance(one, Prepared)])

    assert rows.shape == (6, 8) and rows.dtype == np.float32
    assert rows[0].tolist() == rows[2].tolist() != rows[1].tolist()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(rows[5:], hash_vectors([digest("東京")]))


def test_vector_when_computed_anywhere_is_this() -> None:
    [row] = hash_vectors([digest("hello")])

    np.testing.assert_allclose(row, EXPECTED, atol=1e-6)


EXPECTED = [0.015941, 0.060363, 0.177382, -0.135331, -0.095092, -0.670028, 0.642235, -0.275461]


def test_vector_when_there_is_a_pair_depends_on_both() -> None:
    assert len({digest("a"), digest("a", "b"), digest("a", ""), digest("a", "c")}) == 4


def test_prepare_when_a_text_is_long_treats_it_as_configured() -> None:
    long = Document("1", "0123456789" * 3)  # 8 tokens of 4 characters

    [truncated] = hash_task("truncate").prepare([long])
    [rejected] = hash_task("reject").prepare([long])
    [chunked] = hash_task("chunk").prepare([long])
    [too_many] = hash_task("chunk", max_chunks=1).prepare([long])

    assert isinstance(truncated, Prepared) and truncated.truncated and truncated.lengths == (4,)
    assert isinstance(rejected, Rejected) and rejected.reason is Reason.TOO_LONG
    assert isinstance(chunked, Prepared) and chunked.lengths == (4, 4) and not chunked.truncated
    assert isinstance(too_many, Rejected) and too_many.reason is Reason.TOO_LONG


def test_prepare_when_a_text_just_fits_is_not_truncated() -> None:
    [fits, too_long] = hash_task().prepare([Document("1", "x" * 15), Document("2", "x" * 16)])

    assert isinstance(fits, Prepared) and fits.lengths == (4,) and not fits.truncated
    assert isinstance(too_long, Prepared) and too_long.lengths == (4,) and too_long.truncated


def test_output_when_chunked_is_the_mean_at_unit_length() -> None:
    task = hash_task("chunk")
    [prepared] = task.prepare([Document("1", "0123456789" * 3)])
    assert isinstance(prepared, Prepared)
    rows = HashRunner().run(prepared.chunks)

    vector = task.output(prepared, rows)["embedding"]

    mean = rows.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize("size", [200])
def test_prepare_and_run_when_texts_are_short_cost_microseconds(size: int) -> None:
    """A goal of 3 µs on a quiet machine; ten times that means that something is wrong."""
    task, runner = hash_task(max_length=8192), HashRunner()
    documents = [Document(str(n), "x" * size) for n in range(2000)]
    best = float("inf")
    for _ in range(3):
        started = time.thread_time()
        prepared = task.prepare(documents)
        runner.run([one.chunks[0] for one in prepared if isinstance(one, Prepared)])
        best = min(best, time.thread_time() - started)

    assert best / len(documents) < 30e-6
