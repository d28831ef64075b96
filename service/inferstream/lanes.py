"""The ledger: one lane per input partition and assignment epoch, one slot per record.

A lane answers three questions: what may be sent next, in order (:meth:`Lane.release`); how far is everything
safe (:attr:`Lane.watermark`, the only offset that is ever committed); what is lost if the lane ends now
(:meth:`Lane.drop`).  It is pure: no clock, no I/O, no locks; every method is called on the event loop.

A slot goes ADMITTED -> COMPLETED -> RELEASED -> ACKNOWLEDGED, or ends DROPPED from any but the last.

A lane whose partition is revoked goes open -> closing (:meth:`Lane.close`) -> suspended (:meth:`Lane.suspend`) and
then either on (:meth:`Lane.resume`) or out (:meth:`Lane.drop`).  Its ``fence`` says how far it releases: everything
while it is open, the prefix that fits the time while it is closing, nothing while it is suspended.

**Why nothing is lost** (promise 1: offset o is committed only when every record fetched before o has been
acknowledged as a result or a dead letter).  The fields that carry the proof:

``_held``
    every admitted slot that is neither settled nor forgotten, in fetched order.  ``admit`` appends only
    offsets >= ``position`` and then sets ``position`` past them, so the offsets in ``_held`` strictly
    increase and all lie below ``position`` (A).  Slots leave it in two ways only: ``acknowledge`` pops the
    head while the head is ACKNOWLEDGED (it is then *settled*), ``drop`` cuts the tail.
``position``
    no record in [``position``, infinity) has been admitted (B).  It moves past offsets without a slot only by
    ``advance``, whose caller vouches that the source will never hand over a record there.
``watermark``
    the offset of ``_held[0]``, or ``position`` when nothing is held.

*Claim*: every record fetched below the watermark is acknowledged.  Take an admitted slot s with
s.offset < watermark.  It is not in ``_held``: the head has the smallest offset there, or nothing is held (A).
So s was popped or cut.  Only an ACKNOWLEDGED slot is popped.  When ``drop`` cuts the tail, ``position`` is
set back to the first cut slot that is not acknowledged and the lane is closed for good (``resume`` refuses it), so
that neither ``admit`` nor ``advance`` raises ``position`` again: a cut slot that is not acknowledged lies at or
past ``position``.  As the watermark never exceeds ``position`` (A), s was not one of those either.  ``close``,
``suspend``, ``take_back`` and ``resume`` change neither ``_held`` nor ``position``.

*The watermark never falls*: popping the head uncovers a larger offset, or ``position``, which is larger than
any held offset (A); ``admit`` and ``advance`` only raise ``position``; ``drop`` either leaves the head in
place, or cuts it, and then the new ``position`` is the head's own offset, as a head is never ACKNOWLEDGED.

*Order* (promise 2): ``_queue`` holds the un-released slots in fetched order, and ``release`` takes from its
head only, so an ordered lane hands over each slot once and in fetched order.  What ``take_back`` returns to
it was not handed on, and takes its old place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

from inferstream.documents import Outgoing, Prepared, Record

ADMITTED: Final = 0
COMPLETED: Final = 1
RELEASED: Final = 2
ACKNOWLEDGED: Final = 3
DROPPED: Final = 4

_OPEN: Final = 1 << 63  # past every offset
_SUSPENDED: Final = -1  # before every offset

# What stands in Slot.record once the slot is acknowledged.  Typed Any so that the field itself stays a plain
# Record: nobody reads the record of an acknowledged slot, and every other reader is spared a None check.
_GONE: Final[Any] = None


class Slot:
    """One admitted record on its way to the broker's acknowledgement.

    ``weight`` (bytes) and ``tokens`` are what the slot holds of the shared credit at the moment; whoever
    changes the credit changes them.  ``prepared`` is set until COMPLETED, and for a document of several chunks
    so is ``rows``, one per chunk, None until it is there; ``outcome`` is set from COMPLETED until ACKNOWLEDGED.
    What is not needed any more is let go at once, because the slot may have to stay behind an un-acknowledged
    head while its credit is already someone else's.
    """

    __slots__ = ("lane", "offset", "outcome", "prepared", "record", "rows", "state", "tokens", "weight")

    def __init__(self, lane: Lane, record: Record, offset: int, weight: int) -> None:
        self.lane = lane
        self.record = record
        self.offset = offset
        self.weight = weight
        self.tokens = 0
        self.prepared: Prepared | None = None
        self.rows: list[Any] | None = None
        self.outcome: Outgoing | None = None
        self.state = ADMITTED

    def __repr__(self) -> str:
        names = ("ADMITTED", "COMPLETED", "RELEASED", "ACKNOWLEDGED", "DROPPED")
        return f"Slot({self.lane.topic}:{self.lane.partition}:{self.offset} {names[self.state]})"


class Lane:
    """The ordered ledger of one input partition in one assignment epoch.

    ``start`` is the first offset that will be fetched.  With ``ordered=False`` (``delivery.order: none``)
    slots are released as they complete; the proof of the watermark holds as it is: it does not need order.
    """

    __slots__ = (
        "_completed",
        "_held",
        "_queue",
        "closed",
        "epoch",
        "fence",
        "ordered",
        "partition",
        "position",
        "released",
        "settled",
        "topic",
    )

    def __init__(self, topic: str, partition: int, epoch: int, start: int, *, ordered: bool = True) -> None:
        self.topic = topic
        self.partition = partition
        self.epoch = epoch
        self.ordered = ordered
        self.position = start
        """The next offset the source will hand over; after :meth:`drop`, the first offset to fetch again."""
        self.closed = False
        """Whether it was dropped: it never opens again."""
        self.fence = _OPEN
        """Slots at or past this offset are not released; unless it is past every offset, nothing is admitted."""
        self.released = 0
        """How many slots were released, less those dropped or taken back after it."""
        self.settled = 0
        """How many slots were settled.  ``released`` minus what ``settled`` was when the last commit was made
        is what a crash would deliver again."""
        self._held: deque[Slot] = deque()
        # What release() takes from: in an ordered lane every un-released slot, else the completed ones.
        self._queue: deque[Slot] = deque()
        self._completed = 0  # slots that are COMPLETED

    # -- from the source -----------------------------------------------------------------------------------

    def admit(self, record: Record, weight: int) -> Slot:
        """Append a fetched record that holds ``weight`` bytes of credit.

        ValueError if the lane is not open or the offset lies before ``position``: the source went backwards.
        """
        offset = record.offset
        if self.fence != _OPEN or offset < self.position:
            state = "is closed" if self.fence != _OPEN else f"expects offset {self.position} or later"
            raise ValueError(f"lane {self.topic}:{self.partition} {state}, was given {offset}")
        slot = Slot(self, record, offset, weight)
        self._held.append(slot)
        if self.ordered:
            self._queue.append(slot)
        self.position = offset + 1
        return slot

    def advance(self, position: int) -> None:
        """Note that the source moved to ``position`` without records (control records, compaction gaps).

        ``position`` must not lie before the lane's (ValueError).  A lane that is not open ignores it.
        """
        if self.fence != _OPEN:
            return
        if position < self.position:
            raise ValueError(
                f"lane {self.topic}:{self.partition} is at {self.position}, cannot go back to {position}"
            )
        self.position = position

    # -- from the pipeline ---------------------------------------------------------------------------------

    def complete(self, slot: Slot, outcome: Outgoing) -> bool:
        """Give the slot its one outcome, in any order.

        False, and no effect, if the slot was dropped meanwhile.  ValueError on a second outcome or a slot of
        another lane.
        """
        if slot.lane is not self or slot.state != ADMITTED:
            if slot.lane is self and slot.state == DROPPED:
                return False
            raise ValueError(f"{slot!r} cannot be completed in {self!r}")
        slot.prepared = None
        if slot.rows:
            slot.rows = []  # not None: a worker thread may still come with a row of a chunked document
        slot.outcome = outcome
        slot.state = COMPLETED
        self._completed += 1
        if not self.ordered:
            self._queue.append(slot)
        return True

    def release(self, limit: int | None = None) -> list[Slot]:
        """Take the completed head run, in order; each slot is returned once.

        ``limit`` (at least 1) is the most slots that may be released and not settled at once; None is no
        limit.  An unordered lane keeps the last place for its head, without which nothing would ever settle;
        so its limit has to be its own, not the rest of one that is shared between lanes.
        """
        queue, fence = self._queue, self.fence
        room = len(queue) if limit is None else limit - self.unsettled
        run: list[Slot] = []
        if self.ordered:
            while room > 0 and queue and queue[0].state == COMPLETED and queue[0].offset < fence:
                run.append(queue.popleft())
                room -= 1
        elif queue and self._held[0].offset < fence:
            head = self._held[0]
            if limit is not None and head.state == ADMITTED:
                room -= 1
            elif head.state == COMPLETED and 0 < room < len(queue):
                queue.remove(head)
                queue.appendleft(head)
            behind: list[Slot] = []
            while room > 0 and queue:
                slot = queue.popleft()
                if slot.offset < fence:
                    run.append(slot)
                    room -= 1
                else:
                    behind.append(slot)
            queue.extendleft(reversed(behind))
        for slot in run:
            slot.state = RELEASED
        self._completed -= len(run)
        self.released += len(run)
        return run

    def acknowledge(self, slot: Slot) -> bool:
        """Note that the broker has the slot's outcome, in any order, and settle the acknowledged head run.

        True when the slot's credit is to be given back: False for a slot that was dropped after its release,
        whose credit went back then.  ValueError for a slot that was not released, or a second time.
        """
        if slot.lane is not self or slot.state != RELEASED:
            if slot.lane is self and slot.state == DROPPED:
                return False
            raise ValueError(f"{slot!r} cannot be acknowledged in {self!r}")
        slot.state = ACKNOWLEDGED
        slot.record = _GONE
        slot.outcome = None
        held = self._held
        while held and held[0].state == ACKNOWLEDGED:
            held.popleft()
            self.settled += 1
        return True

    # -- closing -------------------------------------------------------------------------------------------

    def close(self, keep: int | None = None) -> None:
        """Admit nothing more, and release no slot after the first ``keep`` held ones (None: all may go).

        The others stay, for :meth:`resume` or :meth:`drop`.
        """
        self._require_alive()
        if keep is None or keep >= len(self._held):
            self.fence = self.position
        else:
            self.fence = self._held[keep].offset

    def suspend(self) -> None:
        """Release nothing more until :meth:`resume`; what is completed meanwhile waits in its slot."""
        self._require_alive()
        self.fence = _SUSPENDED

    def take_back(self, slots: Iterable[Slot]) -> None:
        """Return released slots that were handed to nobody; only while the lane is suspended (ValueError).

        They are released again, in their old places.
        """
        for slot in slots:
            if not self.suspended or slot.lane is not self or slot.state != RELEASED:
                raise ValueError(f"{slot!r} cannot be taken back by {self!r}")
            slot.state = COMPLETED
            self.released -= 1
            self._completed += 1
        first = ADMITTED if self.ordered else COMPLETED
        self._queue = deque(slot for slot in self._held if first <= slot.state <= COMPLETED)

    def resume(self, epoch: int) -> None:
        """Go on where the lane was suspended, in a later epoch.

        The caller vouches that nobody else had the partition meanwhile, and that the source goes on at
        ``position``.  ValueError unless the lane is suspended.
        """
        self._require_alive()
        if not self.suspended:
            raise ValueError(f"{self!r} is not suspended")
        self.epoch = epoch
        self.fence = _OPEN

    def _require_alive(self) -> None:
        if self.closed:
            raise ValueError(f"{self!r} was dropped")

    def drop(self, keep: int | None) -> list[Slot]:
        """Close the lane for good and forget every slot after the first ``keep`` held ones (None keeps all).

        Returns the forgotten slots that were not acknowledged, so that their credit is given back; the
        watermark never passes the first of them.  A forgotten slot may have been released: what becomes of it
        is no longer this lane's to commit.  May be called again with a smaller ``keep`` as time runs out.
        """
        self.closed = True
        self.fence = self.position
        held = self._held
        if keep is None or keep >= len(held):
            return []
        dropped: list[Slot] = []
        for _ in range(len(held) - keep):
            slot = held.pop()
            if slot.state in (RELEASED, ACKNOWLEDGED):
                self.released -= 1
            if slot.state == ACKNOWLEDGED:
                continue
            if slot.state == COMPLETED:
                self._completed -= 1
            slot.state = DROPPED
            dropped.append(slot)
        if dropped:
            dropped.reverse()
            self.position = self.fence = dropped[0].offset
            self._queue = deque(slot for slot in self._queue if slot.state != DROPPED)
        return dropped

    # -- what is true now ----------------------------------------------------------------------------------

    @property
    def watermark(self) -> int:
        """The next offset that is safe to commit; monotone."""
        return self._held[0].offset if self._held else self.position

    @property
    def suspended(self) -> bool:
        """Whether nothing is released until :meth:`resume`."""
        return self.fence == _SUSPENDED

    @property
    def finished(self) -> bool:
        """Whether all that a closing lane releases is settled."""
        return self.watermark >= self.fence

    @property
    def handed_on(self) -> bool:
        """Whether all that a closing lane releases is released."""
        for slot in self._held:
            if slot.offset >= self.fence:
                break
            if slot.state < RELEASED:
                return False
        return True

    @property
    def unsettled(self) -> int:
        """Slots released and not settled, among them those acknowledged behind an un-acknowledged one."""
        return self.released - self.settled

    @property
    def in_flight(self) -> int:
        """Slots without an outcome yet."""
        return len(self._held) - self._completed - self.unsettled

    @property
    def blocked(self) -> int:
        """Slots completed that wait behind one that is not: time and memory spent, nothing to send.

        Costs one step per slot that could be released: next to nothing after a :meth:`release`.
        """
        run = 0
        for slot in self._queue:
            if slot.state != COMPLETED:
                break
            run += 1
        return self._completed - run

    def __len__(self) -> int:
        """Slots held: admitted and neither settled nor dropped."""
        return len(self._held)

    def __iter__(self) -> Iterator[Slot]:
        """The held slots in fetched order; do not change the lane meanwhile."""
        return iter(self._held)

    def __repr__(self) -> str:
        state = ", dropped" if self.closed else ", suspended" if self.suspended else ""
        return (
            f"Lane({self.topic}:{self.partition} epoch {self.epoch}, watermark {self.watermark}, "
            f"position {self.position}, {len(self._held)} held{state})"
        )
