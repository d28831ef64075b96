"""What is in the transaction, and what waits for the next: the ledger of ``delivery.guarantee: exactly-once``.

Transactions follow each other; each goes through a tick of four steps:

    open     released slots are sent as they come
    closed   no more go in: what is released now waits; what went in is being published, its offsets added
    ended    known to be committed or aborted: :meth:`committed` or :meth:`aborted`
    opened   :meth:`open`: what was aborted is sent again and what waited is sent, in the order of release

Pure: no clock, no I/O; every method is called on the event loop.

**Why each result is visible exactly once, in order** (promises 2 and 3).  A reader with ``read_committed`` sees what
committed transactions hold.  Let a lane's slots be s1, s2, ... in fetched order, as it releases them.

* A transaction's offset for a lane is the one after the lane's last slot in it, and every earlier slot of the lane
  is in it or in one that was committed before: ``add`` keeps the order of release, a closed transaction takes
  nothing more, and one that was aborted comes back whole and in order, before what waited.  So results and offset
  are committed together, and the next owner, who starts at that offset, repeats none of them and skips none.
* It may be committed only when ``published`` says that all of it is with the brokers, so it holds no gap.
* ``committed`` and ``aborted`` are told by the brokers, never guessed; until then its slots are held here, with
  result and credit, and nothing of them is sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from inferstream.lanes import DROPPED, Lane, Slot


class Ticks:
    """The slots of one worker that are released and not known to be committed."""

    __slots__ = ("_inside", "_unpublished", "_waiting", "closed")

    def __init__(self) -> None:
        self._inside: list[Slot] = []  # in the transaction, in the order of release
        self._waiting: deque[Slot] = deque()  # released since it was closed, in that order
        self._unpublished = 0  # how many of those inside the brokers have not acknowledged
        self.closed = True
        """Whether nothing can be added at the moment; so it is until the first :meth:`open`."""

    def add(self, slots: Sequence[Slot]) -> bool:
        """Take released slots; True if they are in the transaction and are to be sent now."""
        if self.closed:
            self._waiting.extend(slots)
            return False
        self._inside.extend(slots)
        self._unpublished += len(slots)
        return True

    def acknowledged(self, count: int) -> None:
        """The brokers have ``count`` more of the slots inside."""
        if count > self._unpublished:
            raise ValueError(f"{count} slots acknowledged, {self._unpublished} are on their way")
        self._unpublished -= count

    @property
    def published(self) -> bool:
        """Whether the brokers have all that is inside."""
        return not self._unpublished

    def close(self) -> None:
        """Let nothing more in."""
        self.closed = True

    def marks(self) -> dict[Lane, int]:
        """The next offset of each lane that has slots inside: what the transaction commits with them."""
        return {slot.lane: slot.offset + 1 for slot in self._inside}

    def alive(self) -> set[Lane]:
        """The lanes that wait for what is inside: not those that all of it was dropped of."""
        return {slot.lane for slot in self._inside if slot.state != DROPPED}

    def committed(self) -> list[Slot]:
        """The transaction is known to be committed; gives its slots, in order."""
        if not self.closed or self._unpublished:
            raise ValueError("only what is closed and published can have been committed")
        done, self._inside = self._inside, []
        return done

    def aborted(self) -> None:
        """The transaction is known to be aborted: its slots wait again, first."""
        self.closed = True
        self._waiting.extendleft(reversed(self._inside))
        self._inside = []

    def open(self) -> list[Slot]:
        """Begin the next transaction with what waits; gives it, to be sent in this order.

        Slots that were dropped while they waited are forgotten: their epoch has ended.
        """
        if self._inside:
            raise ValueError("the last transaction has not ended")
        self._inside = [slot for slot in self._waiting if slot.state != DROPPED]
        self._waiting.clear()
        self._unpublished = len(self._inside)
        self.closed = False
        return list(self._inside)

    def withdraw(self) -> list[Slot]:
        """Let go of what waits and was dropped, or is of a suspended lane; gives the latter, to be taken back.

        What is inside ends with the transaction.
        """
        back = [slot for slot in self._waiting if slot.lane.suspended]
        self._waiting = deque(
            slot for slot in self._waiting if slot.state != DROPPED and not slot.lane.suspended
        )
        return back

    def __len__(self) -> int:
        return len(self._inside) + len(self._waiting)

    @property
    def inside(self) -> int:
        """How many slots the transaction holds."""
        return len(self._inside)
