"""The demo's last screen: what the topics hold, where the time went, what was found."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from inferstream.tools.demo_ledger import DeadLetter
from inferstream.tools.demo_nearest import Neighbour

WIDTH = 100
SHOWN_MISSING = 5
SMALL_SHARE = 0.005  # a stage that took less of the work is not worth a line


@dataclass(frozen=True, slots=True)
class Killed:
    """The worker that was killed with -9 when ``answered`` documents had answers, and the one after it."""

    pid: int
    answered: int
    successor: int


@dataclass(frozen=True, slots=True)
class Found:
    """A question with the docstrings nearest to it; ``summaries`` are their first sentences by name."""

    question: str
    neighbours: Sequence[Neighbour]
    summaries: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything there is to report.

    ``records_in`` is what the input topic holds, of which ``questions`` and ``poisoned`` are not docstrings.
    ``rate`` is the mean over the time in which a worker ran, in documents per second.  ``phases`` add up to
    ``elapsed_s``; ``stages`` are the seconds the worker's stages worked, side by side.
    """

    records_in: int
    questions: int
    poisoned: int
    results: int
    dead: Sequence[DeadLetter]
    missing: Sequence[str]
    twice: int
    killed: Killed | None
    rate: float
    elapsed_s: float
    phases: Sequence[tuple[str, float]]
    stages: Mapping[str, float]
    found: Sequence[Found]


def report(outcome: Outcome) -> str:
    """The last screen as text."""
    return "\n".join(
        [
            "",
            f"counted from the topics, after {outcome.elapsed_s:.0f} s",
            *_counts(outcome),
            "",
            "where the time went",
            *_times(outcome),
            "",
            "questions, answered by the nearest docstrings (cosine)",
            *_answers(outcome.found),
            "",
            "try next",
            "  inferstream demo --ask 'how do I measure how long a function takes?'",
            "  inferstream run --kafka.bootstrap-servers HOST:9092 --input.topics documents "
            "--output.topic embeddings",
        ]
    )


def _counts(outcome: Outcome) -> Iterator[str]:
    docstrings = outcome.records_in - outcome.questions - outcome.poisoned
    kinds = f"{docstrings:,} docstrings, {outcome.questions} questions, {outcome.poisoned} poisoned documents"
    yield _count("in", outcome.records_in, kinds)
    yield _count("results", outcome.results, f"{outcome.rate:.0f} a second")
    yield _count("dead letters", len(outcome.dead), "")
    for letter in outcome.dead:
        partition, offset = letter.place
        yield f"  {'':23}{letter.reason}: {letter.name} (partition {partition}, offset {offset})"
    yield _count("missing", len(outcome.missing), _names(outcome.missing))
    yield _count("delivered twice", outcome.twice, _crash(outcome.killed))


def _count(name: str, number: int, note: str) -> str:
    return f"  {name:<15}{number:>6,}  {note}".rstrip()


def _names(missing: Sequence[str]) -> str:
    shown = ", ".join(missing[:SHOWN_MISSING])
    return shown if len(missing) <= SHOWN_MISSING else f"{shown} and {len(missing) - SHOWN_MISSING:,} more"


def _crash(killed: Killed | None) -> str:
    if killed is None:
        return ""
    return (
        f"worker {killed.pid} was killed with -9 at {killed.answered:,} answers; "
        f"worker {killed.successor} went on from the committed offsets"
    )


def _times(outcome: Outcome) -> Iterator[str]:
    width = max((len(name) for name, _ in outcome.phases), default=0)
    for name, seconds in outcome.phases:
        yield f"  {name:<{width}}  {seconds:5.1f} s"
    whole = sum(outcome.stages.values())
    if whole <= 0:
        return
    shares = sorted(outcome.stages.items(), key=lambda item: -item[1])
    listed = (f"{name} {seconds:.1f} s" for name, seconds in shares if seconds >= SMALL_SHARE * whole)
    yield f"  {'the stages worked':<{width}}  {', '.join(listed)}"


def _answers(found: Sequence[Found]) -> Iterator[str]:
    for each in found:
        yield f"  {each.question}"
        names = max((len(neighbour.name) for neighbour in each.neighbours), default=0)
        for neighbour in each.neighbours:
            head = f"    {neighbour.cosine:.2f}  {neighbour.name:<{names}}  "
            summary = textwrap.shorten(
                each.summaries.get(neighbour.name, ""), max(20, WIDTH - len(head)), placeholder=" …"
            )
            yield (head + summary).rstrip()
