"""The device stage: staging slots, a launcher thread and a waiter thread in front of any Device.

    event loop --launch()--> launcher thread --Device.launch--> device --Device.wait--> waiter thread
         ^________________________ call_soon_threadsafe ______________________________________|

The event loop never touches the device.  It only knows which slots are free: a batch is formed when one is
(late binding), so a batch waits on the device's doorstep for at most ``slots - lanes`` others.

A batch that raises is halved until the one bad item is alone; its mates run again.  Out of memory does the
same and tells the pipeline to lower the token budget.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from inferstream.batching import Item
from inferstream.device import Device, Flight
from inferstream.device.usage import Usage
from inferstream.errors import DeviceFailed, OutOfMemory
from inferstream.telemetry.timeline import Timeline

READY_AT = attrgetter("ready_at")


class Outcomes(Protocol):
    """Who hears of the batches' ends, on the event loop."""

    def batch_done(self, items: Sequence[Item], rows: np.ndarray) -> None: ...

    def item_failed(self, item: Item, error: BaseException) -> None: ...

    def out_of_memory(self, items: Sequence[Item]) -> None: ...

    def slot_freed(self) -> None: ...

    def device_failed(self, error: BaseException) -> None: ...


@dataclass(slots=True)
class _Running:
    items: list[Item]
    number: int  # of the batch, in the order of launching
    since: float
    oldest: Item


class DeviceStage:
    """Keeps every staging slot of one device filled; all methods belong to the event loop.

    ``usage`` is where the device's time went; ``occupied_s`` is how long batches kept its lanes, in seconds, summed
    over them.  ``tokens`` and ``items`` are what it computed, and ``flops`` what that takes a model of which
    ``flops_of`` knows the floating-point operations for a piece of so many tokens.
    """

    def __init__(
        self,
        device: Device,
        outcomes: Outcomes,
        loop: asyncio.AbstractEventLoop,
        timeline: Timeline,
        flops_of: Callable[[int], float] | None = None,
    ) -> None:
        self._device = device
        self._outcomes = outcomes
        self._loop = loop
        self._timeline = timeline
        self._flops_of = flops_of
        self._free = list(range(device.slots))
        self._running: dict[int, _Running] = {}
        self._again: deque[list[Item]] = deque()  # halves of failed batches; they go before new ones
        self._launches: SimpleQueue[tuple[int, list[Item]] | None] = SimpleQueue()
        self.usage = Usage()
        self.occupied_s = self.flops = 0.0
        self._launched = 0
        self.tokens = 0
        self.items = 0
        self.batches = 0
        self._threads = [
            threading.Thread(target=self._launcher, name="device-launcher", daemon=True),
            threading.Thread(target=self._waiter, name="device-waiter", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def fill_ratio(self) -> float:
        return len(self._running) / self._device.slots

    @property
    def busy_s(self) -> float:
        return self.usage.busy_s

    @property
    def pieces(self) -> int:
        """How many pieces are on the device or staged for it."""
        return sum(len(running.items) for running in self._running.values())

    @property
    def lanes(self) -> int:
        return self._device.lanes

    @property
    def idle(self) -> bool:
        return not self._running and not self._again

    def busy_since(self) -> float | None:
        """When the oldest batch that is still on the device was launched (monotonic seconds)."""
        return min((running.since for running in self._running.values()), default=None)

    def next_retry(self) -> list[Item] | None:
        """A half of a failed batch that has to run again, if there is one."""
        return self._again.popleft() if self._again else None

    def discard(self, unwanted: Callable[[Item], bool]) -> None:
        """Forget retries whose documents were dropped."""
        kept = ([item for item in items if not unwanted(item)] for items in self._again)
        self._again = deque(items for items in kept if items)

    def launch(self, items: list[Item]) -> None:
        """Hand a batch to the launcher; needs a free slot."""
        slot = self._free.pop()
        now = time.monotonic()
        oldest = min(items, key=READY_AT)
        self._running[slot] = _Running(items, self._launched, now, oldest)
        self._timeline.span("window", "wait", oldest.ready_at, now, batch=self._launched)
        self._launched += 1
        self._launches.put((slot, items))

    def close(self, timeout_s: float) -> None:
        """End the threads; a batch that does not end within ``timeout_s`` is abandoned (daemon threads)."""
        self._launches.put(None)
        closer = threading.Thread(target=self._close_device, name="device-closer", daemon=True)
        closer.start()
        for thread in (closer, *self._threads):
            thread.join(timeout_s)

    def _close_device(self) -> None:
        self._threads[0].join()  # batches that wait for the launcher come before the device's end
        self._device.close()

    def _launcher(self) -> None:
        while (work := self._launches.get()) is not None:
            slot, items = work
            try:
                self._device.launch(slot, [item.payload for item in items])
            except BaseException as error:  # a device that raises here broke its own protocol
                self._post(Flight(slot, None, DeviceFailed(f"the device refused a launch: {error!r}"), 0.0))

    def _waiter(self) -> None:
        try:
            while (flight := self._device.wait()) is not None:
                self._post(flight)
        except BaseException as error:  # without this thread no batch would ever end
            self._call(self._outcomes.device_failed, DeviceFailed(f"waiting for the device raised {error!r}"))

    def _post(self, flight: Flight) -> None:
        self._call(self._settle, flight)

    def _call(self, callback: Callable[[Any], None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:  # the loop is closed: the process is ending
            return

    def _settle(self, flight: Flight) -> None:
        """On the event loop, which would only log what this raises: the batch's documents would wait for ever."""
        try:
            self._ended(flight)
        except Exception as error:
            self._outcomes.device_failed(error)

    def _ended(self, flight: Flight) -> None:
        batch = self._running.pop(flight.slot)
        items = batch.items
        self._free.append(flight.slot)
        ready_at, admitted_at = batch.oldest.ready_at, batch.oldest.admitted_at
        self.usage.add(flight, ready_at if admitted_at is None else admitted_at, ready_at, batch.since)
        self.occupied_s += flight.occupied_s
        lengths = [item.length for item in items]
        tokens = sum(lengths)
        for span in flight.spans:
            self._timeline.span(*span, batch=batch.number, documents=len(items), tokens=tokens)
        if flight.error is None and flight.rows is not None and len(flight.rows) == len(items):
            self.batches += 1
            self.items += len(items)
            self.tokens += tokens
            if self._flops_of is not None:
                self.flops += sum(map(self._flops_of, lengths))
            self._outcomes.batch_done(items, flight.rows)
        elif isinstance(flight.error, DeviceFailed):
            self._outcomes.device_failed(flight.error)
        else:
            error = flight.error or RuntimeError("the device did not give a row for each item")
            if isinstance(error, OutOfMemory):
                self._outcomes.out_of_memory(items)
            if len(items) == 1:
                self._outcomes.item_failed(items[0], error)
            else:
                middle = len(items) // 2
                self._again.append(items[:middle])
                self._again.append(items[middle:])
        self._outcomes.slot_freed()
