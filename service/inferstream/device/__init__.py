"""Devices: what runs a batch, behind one short protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np


class Span(NamedTuple):
    """One step of a batch on ``track`` (a compute thread, a stream), in monotonic seconds."""

    track: str
    step: Literal["launch", "h2d", "compute", "d2h"]
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch that has ended: its rows (shape [items, width], float32) or the error it raised.

    ``busy_s`` is the time the device computed for it, in seconds, ``idle_s`` how long its lane of the device had stood
    idle when it began, and ``stalled_s`` how long it had begun and could not compute (both 0.0 where nobody knows).
    ``spans`` are its steps, as far as they are measured.
    """

    slot: int
    rows: np.ndarray | None
    error: BaseException | None
    busy_s: float
    idle_s: float = 0.0
    stalled_s: float = 0.0
    spans: tuple[Span, ...] = ()

    @property
    def occupied_s(self) -> float:
        """How long the batch kept its lane of the device, in seconds: on a CPU others may run meanwhile."""
        return next((span.end - span.start for span in self.spans if span.step == "compute"), self.busy_s)


class Device(Protocol):
    """What the device stage needs of a device.

    A device has ``slots`` staging slots; each carries one batch at a time, so while one batch computes the
    next ones are already staged behind it.  A slot is free again when its batch came back from :meth:`wait`, and
    is not launched into before.  ``lanes`` is how many batches compute side by side.  A batch costs the sum of its
    tokens, or, if ``padded``, count x longest.  ``max_tokens`` is the most of them that its memory holds, None where
    nobody knows.
    """

    name: str
    slots: int
    lanes: int
    padded: bool

    @property
    def max_tokens(self) -> int | None: ...

    def launch(self, slot: int, items: Sequence[Any]) -> None:
        """Stage the batch in the slot and queue its work.  Called by the launcher thread only.

        Errors of the batch come back through :meth:`wait`, never from here.
        """
        ...

    def wait(self) -> Flight | None:
        """Block until a batch ends; None after :meth:`close`.  Called by the waiter thread only."""
        ...

    def close(self) -> None:
        """Let running batches end, stop the device's threads and wake :meth:`wait`."""
        ...


class Runner(Protocol):
    """A model as a device runs it: items in, one row per item out; ``padded`` as a device's."""

    padded: bool

    def run(self, items: Sequence[Any]) -> np.ndarray:
        """Forward and pool the items (what ``Prepared.chunks`` holds); rows [len(items), width], float32.

        Raises OutOfMemory, or whatever the model raises.
        """
        ...

    def enter_thread(self) -> None:
        """Called once in each compute thread before its first batch (sets its thread count)."""
        ...
