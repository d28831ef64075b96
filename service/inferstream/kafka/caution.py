"""The document that kills the process: found by going one document at a time after crashes that got nowhere.

A partition that has something to read is opened with ``attempts`` = n + 1 in its commit (see ``notes.py``), and
the first commit that moves its offset takes that away.  So n is how many processes in a row died, or were killed,
before they could commit anything of it.  From ``delivery.max_crash_attempts`` on, its first window is read one
document at a time, while nothing else runs in the process, and each is named in a commit before it is admitted: what
is still named when the partition is opened again is the one that was running when the process died.  It becomes a
dead letter unseen, before anything else is read.

A process that is killed from outside while it goes one at a time leaves an innocent document named: after n
crashes without progress that is the price, and a dead letter can be replayed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from aiokafka import TopicPartition

from inferstream.kafka.notes import Note
from inferstream.lanes import Lane


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the notes of the partitions opened now say.

    ``notes`` are to be committed with the starts; ``condemned`` are the offsets of documents that killed the
    process; ``suspected`` are the partitions to go through one document at a time.
    """

    notes: dict[TopicPartition, Note]
    condemned: dict[TopicPartition, int]
    suspected: set[TopicPartition]


def judge(
    found: Mapping[TopicPartition, Note], lagging: Collection[TopicPartition], max_attempts: int
) -> Verdict:
    """``found``: the note of every partition; ``lagging``: those with something to read."""
    notes = {
        tp: replace(note, attempts=note.attempts + 1) if tp in lagging else note for tp, note in found.items()
    }
    condemned = {tp: note.suspect for tp, note in found.items() if note.suspect is not None}
    # Once a culprit is found the others are not suspected of what it did.
    suspected = {tp for tp in lagging if found[tp].attempts >= max_attempts} if not condemned else set()
    return Verdict(notes, condemned, suspected)


class Caution:
    """Whose turn it is while documents go one at a time, and for how long."""

    def __init__(self, ends: Mapping[Lane, int], window: int) -> None:
        """Each lane up to its end, or for ``window`` documents: more were not in flight when the process died."""
        self._ends = ends
        self._left = dict.fromkeys(ends, window)
        self._turns = deque(ends)

    def turn(self) -> Lane | None:
        """The lane to take one document of; None when it is over."""
        while self._turns:
            lane = self._turns[0]
            if self._left[lane] > 0 and lane.position < self._ends[lane]:
                return lane
            self._turns.popleft()
        return None

    def took(self, lane: Lane) -> None:
        """One document of the lane was admitted, or there was none."""
        self._left[lane] -= 1
        self._turns.rotate(-1)
