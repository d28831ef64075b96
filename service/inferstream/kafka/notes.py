"""What travels with a committed offset, as its metadata: ``partitions=8;attempts=2;suspect=4711``.

``partitions``
    how many partitions the topic had when the group first read it: one that was born later is read from its
    beginning.
``attempts``
    how many assignments in a row found records to read and ended without the offset moving: the process died,
    and perhaps of the first of them.
``suspect``
    the offset of the one document that is being processed while all others wait; found by the next owner, it
    is the one that killed the process.

Readers ignore words they do not know, so that a later version may add some.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """A commit's metadata, parsed."""

    partitions: int | None = None
    attempts: int = 0
    suspect: int | None = None

    @classmethod
    def parse(cls, metadata: str | None) -> Note:
        """Read what a commit carried; what is not ours, or garbled, says nothing."""
        found: dict[str, int] = {}
        for word in (metadata or "").split(";"):
            name, _, value = word.partition("=")
            if value.isascii() and value.isdigit():
                found[name] = int(value)
        return cls(found.get("partitions"), found.get("attempts", 0), found.get("suspect"))

    def __str__(self) -> str:
        words = [] if self.partitions is None else [f"partitions={self.partitions}"]
        if self.attempts:
            words.append(f"attempts={self.attempts}")
        if self.suspect is not None:
            words.append(f"suspect={self.suspect}")
        return ";".join(words)
