"""Where a device's time goes: computing, or idle while a document waited, and what that document waited for.

A lane of a device (a GPU's compute stream, a compute thread) computes one batch after the other.  The gap before a
batch is the device's fault, or that of what is before it, only as far as there was a document that it could have
computed.  Batches are formed of the oldest documents and computed in the order in which they were launched, so while a
gap lasted no document was older than the oldest of the batch that ended it: that document's way says, for every part of
the gap, what was missing.

    admitted ──── prepare ──── ready ──── batch ──── launched ──── launch ──── began
              read, being tokenised    prepared, in the window,    packed, copied, queued
                                       lingering

What is before its admission is idle for want of input and counted nowhere: it is what is left of the lanes' time.  So a
backlog is judged by all of it, and a trickle is not called idle.  ``batch`` holds the linger, which is waited for on
purpose (``batch.linger_ms``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from inferstream.device import Flight

WaitedFor = Literal["prepare", "batch", "launch", "core"]
WAITED_FOR: Final[tuple[WaitedFor, ...]] = ("prepare", "batch", "launch", "core")
"""``core``: a batch was begun and its thread had no core or not the interpreter's lock, by the thread's CPU clock; a
GPU's stream cannot tell, see docs/gpu.md on the gaps within a batch."""


def _idle() -> dict[WaitedFor, float]:
    return dict.fromkeys(WAITED_FOR, 0.0)


@dataclass(slots=True)
class Usage:
    """Seconds since the start, summed over the lanes of a device; belongs to the event loop.

    ``busy_s`` is as ``Flight.busy_s``: time on the compute stream, or CPU time of the compute threads.
    """

    busy_s: float = 0.0
    idle_s: dict[WaitedFor, float] = field(default_factory=_idle)

    def add(self, flight: Flight, admitted_at: float, ready_at: float, launched_at: float) -> None:
        """A batch has ended.  The times, in monotonic seconds, are its oldest document's and its own.

        A gap's length is exact; where its parts lie within it is as exact as the flight's place on the host's clock.
        """
        self.busy_s += flight.busy_s
        self.idle_s["core"] += flight.stalled_s
        began = next((span.start for span in flight.spans if span.step == "compute"), None)
        if began is None or flight.idle_s <= 0.0:
            return
        gap = began - flight.idle_s
        idle_s = self.idle_s
        idle_s["launch"] += max(0.0, began - max(launched_at, gap))
        idle_s["batch"] += max(0.0, min(launched_at, began) - max(ready_at, gap))
        idle_s["prepare"] += max(0.0, min(ready_at, began) - max(admitted_at, gap))
