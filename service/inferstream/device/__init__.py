"""Devices: what runs a batch, behind one short protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch that has ended: its rows (shape [items, width], float32) or the error it raised.

    ``busy_s`` is the time it occupied the device, in seconds, and ``idle_s`` how long the device had stood idle
    when it began (0.0 where nobody knows).  ``spans`` are what was done with it and when: (``h2d``, ``compute`` or
    ``d2h``, start, end), in seconds on the clock of ``time.monotonic``; empty where nobody measures them.
    """

    slot: int
    rows: np.ndarray | None
    error: BaseException | None
    busy_s: float
    idle_s: float = 0.0
    spans: tuple[tuple[str, float, float], ...] = ()


class Device(Protocol):
    """What the device stage needs of a device.

    A device has ``slots`` staging slots; each carries one batch at a time, so while one batch computes the
    next ones are already staged behind it.  A slot is free again when its batch came back from :meth:`wait`, and
    is not launched into before.  ``lanes`` is how many batches compute side by side.
    """

    name: str
    slots: int
    lanes: int

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
    """A model as a device runs it: items in, one row per item out."""

    def run(self, items: Sequence[Any]) -> np.ndarray:
        """Forward and pool the items (what ``Prepared.chunks`` holds); rows [len(items), width], float32.

        Raises OutOfMemory, or whatever the model raises.
        """
        ...

    def enter_thread(self) -> None:
        """Called once in each compute thread before its first batch (sets its thread count)."""
        ...
