"""Warms a model up and measures what a document costs: the compute threads must leave room for the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from inferstream.device import Runner
from inferstream.documents import Document, Prepared
from inferstream.tasks import Task

T = TypeVar("T")

WORDS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192)
"""Words of the sample documents: many short ones and a few long ones, as most collections are."""

REPEATS = 5  # of what takes microseconds


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU seconds per sample document on one thread, and tokens per second of one compute thread."""

    prepare_s: float
    compute_s: float
    finish_s: float
    tokens_per_s: float

    def compute_threads(self, cores: int) -> int:
        """How many of the cores compute, so that the others prepare and finish as fast as these compute."""
        whole = self.prepare_s + self.compute_s + self.finish_s
        return max(1, round(cores * self.compute_s / whole))


def warm_up(task: Task, runner: Runner) -> Costs:
    """Run sample documents through the task and the runner, as a compute thread would; takes two batches."""
    return in_thread(lambda: _measure(task, runner))


def sample_documents() -> list[Document]:
    words = [
        "the",
        "reader",
        "opens",
        "a",
        "file",
        "and",
        "returns",
        "each",
        "line",
        "until",
        "none",
        "is",
        "left",
    ]
    return [
        Document(str(n), " ".join(words[(n + at) % len(words)] for at in range(count)))
        for n, count in enumerate(WORDS)
    ]


def _measure(task: Task, runner: Runner) -> Costs:
    import orjson  # what is else in this module serves tests/gpu, which does without it

    runner.enter_thread()
    documents = sample_documents()
    prepared = [answer for answer in task.prepare(documents) if isinstance(answer, Prepared)]
    items = [chunk for answer in prepared for chunk in answer.chunks]
    runner.run(items[:2])  # what is paid once: code paths, workspaces

    prepare_s = cpu_seconds(lambda: task.prepare(documents), REPEATS)
    rows: list[np.ndarray] = []
    compute_s = cpu_seconds(lambda: rows.append(runner.run(items)), 1)

    def finish() -> None:
        at = 0
        for answer in prepared:
            output = task.output(answer, rows[0][at : at + len(answer.chunks)])
            orjson.dumps(output, option=orjson.OPT_SERIALIZE_NUMPY)
            at += len(answer.chunks)

    finish()
    finish_s = cpu_seconds(finish, REPEATS)
    count = len(documents)
    tokens = sum(answer.tokens for answer in prepared)
    return Costs(prepare_s / count, compute_s / count, finish_s / count, tokens / max(compute_s, 1e-9))


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of the calling thread that one call of ``work`` takes, on average."""
    started = time.thread_time()
    for _ in range(repeats):
        work()
    return (time.thread_time() - started) / repeats


def in_thread(work: Callable[[], T]) -> T:
    """Run in a thread of its own, whose thread count a runner may set without touching the caller's."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="warm-up", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
