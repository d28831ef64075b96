"""What the demo counts from the topics: which input got an answer, and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where an input record lies on the input topic."""

    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A refused document; ``name`` is its key."""

    name: str
    place: Place
    reason: str


class Ledger:
    """The records that were sent, and the answers that have been read so far.

    An input counts by its place on the input topic, not by its key, so that neither equal keys nor a document
    without an id can hide a loss.  ``vectors`` holds the embedding of each name, as it came first.
    """

    def __init__(self) -> None:
        self.sent: dict[Place, str] = {}
        self.vectors: dict[str, np.ndarray] = {}
        self.dead: dict[Place, DeadLetter] = {}
        self.newest: tuple[str, np.ndarray] | None = None
        self._results: Counter[Place] = Counter()
        self._dead_read = 0

    def result(self, name: str, place: Place, vector: np.ndarray) -> None:
        self._results[place] += 1
        self.vectors.setdefault(name, vector)
        self.newest = (name, vector)

    def dead_letter(self, letter: DeadLetter) -> None:
        self._dead_read += 1
        self.dead.setdefault(letter.place, letter)

    @property
    def results(self) -> int:
        """Inputs that have a result, each counted once."""
        return len(self._results)

    @property
    def answered(self) -> int:
        """Inputs that have a result or a dead letter, each counted once."""
        return len(self._results) + sum(place not in self._results for place in self.dead)

    @property
    def read(self) -> int:
        """Answers read so far, repeats included."""
        return self._results.total() + self._dead_read

    @property
    def twice(self) -> int:
        """Answers beyond the first one of an input."""
        return self.read - self.answered

    def missing(self) -> list[str]:
        """The names of the inputs without any answer, in the order in which they were sent."""
        return [
            name for place, name in self.sent.items() if place not in self._results and place not in self.dead
        ]
