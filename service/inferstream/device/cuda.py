"""A GPU as a device: while one batch computes, the next are already in its memory and the last one's rows leave it.

    launcher thread   pack ──► slot's pinned slab
    h2d stream                   └ copy ─► slot's slab on the GPU ─┐ event
    compute stream                                                 └ forward ─► slot's rows on the GPU ─┐ event
    d2h stream                                                                                          └ copy ─┐ event
    waiter thread                                                                   sleeps, takes the rows ◄────┘

The streams are ordered by these three events per batch and by nothing else; nothing here waits for the whole GPU once
it is warm, but for what follows out of memory.  A slot's memory is allocated once, and used again only when its batch
has come back, which is after the last of its events: that one rule is why nothing in a slot is ever overwritten too
early.  It holds for a batch that failed half-way as well: it comes back when whatever part of it was queued has ended.

Rows are copied out of the slot's pinned slab by the waiter.  Handing the slab itself on would save a few hundred
kilobytes of copying per batch, and would tie the slot, and with it the GPU's next batch, to the threads that write
results.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from inferstream.batching import DEFAULT_MAX_ITEMS
from inferstream.device import Flight, Span
from inferstream.device.failures import first_line, is_out_of_memory, keep_for_ever
from inferstream.device.forward import Forward, Shape
from inferstream.device.graphs import Graphs
from inferstream.device.memory import fitting_tokens
from inferstream.device.streams import Event, Streams
from inferstream.errors import DeviceFailed, OutOfMemory, SettingsError

log = logging.getLogger(__name__)

PROBE_TOKENS = 8192
"""How large a batch memory is measured with: large enough that what does not grow with it matters little."""

RETRIES_EVERY = 256
"""Batches from one look at the allocator's retries to the next: PyTorch makes a dictionary of all it counts."""


class Slot:
    """Room for one batch on its way: made once, never moved, so that the GPU can copy without asking the host."""

    __slots__ = ("landed", "rows", "slab", "staged", "staged_array", "taken")

    def __init__(self, streams: Streams, size: int, items: int, width: int) -> None:
        self.staged = streams.array(size, dtype=torch.int32, pinned=True)
        self.staged_array = self.staged.numpy()
        self.slab = streams.array(size, dtype=torch.int32)
        self.rows = streams.array(items, width, dtype=torch.float32)
        self.landed = streams.array(items, width, dtype=torch.float32, pinned=True)
        self.taken = False


@dataclass(slots=True)
class Marks:
    """The events of a batch, in the order of its way."""

    staged: Event
    copied: Event
    began: Event
    computed: Event
    leaving: Event
    landed: Event


@dataclass(slots=True)
class Launched:
    """A batch under way.  ``end`` happens when all that was queued for it has ended; None: nothing was."""

    slot: int
    count: int
    marks: Marks | None = None
    queued: tuple[float, float] = (0.0, 0.0)  # from when to when the host was at it
    end: Event | None = None
    error: BaseException | None = None


class CudaDevice:
    """One GPU behind :class:`inferstream.device.Device`.

    While nothing else is launched it is an :class:`inferstream.device.Runner` as well, to warm up with.
    ``max_tokens`` is the token budget that was asked for, or less where memory holds less: a batch above it may be
    launched, and then runs out of memory or not.  ``tokens_per_s`` is the rate at which a full batch of the longest
    pieces was computed at start, the slowest kind there is.  ``graphs`` bounds the number of CUDA graphs, 0 for none.
    ``max_length`` in tokens is the longest piece there can be; ``vocabulary``: ids from 0 to below it are valid.

    Raises SettingsError when not even one longest piece fits the memory, DeviceFailed when the GPU does not work.
    """

    lanes = 1

    def __init__(
        self,
        forward: Forward,
        streams: Streams,
        *,
        max_tokens: int,
        max_length: int,
        max_items: int = DEFAULT_MAX_ITEMS,
        slots: int = 3,
        graphs: int = 0,
        vocabulary: int = 1,
    ) -> None:
        self.name = streams.name
        self.slots = slots
        self.width = forward.width
        self.padded = forward.padded
        self._forward = forward
        self._streams = streams
        self._launched: SimpleQueue[Launched | None] = SimpleQueue()
        self._dead: DeviceFailed | None = None
        self._previous: Launched | None = None
        self._clock = Clock()
        self._until_look = RETRIES_EVERY
        max_tokens = max(max_tokens, max_length)
        try:
            streams.enter_thread()
            # The weights came over the default stream, which our streams do not wait for by themselves.
            streams.settle()
            size = forward.slab_size(max_tokens, max_items)
            self._slots = [Slot(streams, size, max_items, forward.width) for _ in range(slots)]
            fitting = self._measure(max_tokens, max_items, max_length)
            self._graphs = Graphs(
                forward,
                streams,
                most=graphs,
                max_tokens=max_tokens,
                max_items=max_items,
                max_length=max_length,
                fitting_tokens=fitting,
                vocabulary=vocabulary,
            )
            if self._graphs.shapes:  # they keep memory that no other batch can use
                fitting = self._measure(max_tokens, max_items, max_length)
            self.max_tokens = min(max_tokens, fitting)
            self.tokens_per_s = self._rate(min(max_items, self.max_tokens // max_length), max_length)
            self._retries = streams.allocation_retries()
        except (RuntimeError, OutOfMemory) as error:
            if is_out_of_memory(error):
                raise SettingsError(
                    f"model.max_length: a document of {max_length} tokens does not fit the memory of {self.name} "
                    f"beside the model ({first_line(error)}); lower it or batch.max_tokens, or free the GPU's memory"
                ) from error
            if not isinstance(error, torch.AcceleratorError):
                raise
            keep_for_ever((self, error))  # whose frames hold what was being made
            raise DeviceFailed(f"{self.name} failed while it was warmed up: {first_line(error)}") from error
        if self.max_tokens < max_tokens:
            log.warning(
                "the GPU's memory holds smaller batches than asked for",
                extra={"asked_tokens": max_tokens, "max_tokens": self.max_tokens},
            )

    # ---- the launcher thread

    def launch(self, slot: int, items: Sequence[Any]) -> None:
        room = self._slots[slot]
        if room.taken:
            raise ValueError(f"slot {slot} holds a batch that has not come back")
        batch = Launched(slot, len(items))
        room.taken = True
        if self._dead is None:
            self._try_to_queue(batch, items)
        self._launched.put(batch)

    def _try_to_queue(self, batch: Launched, items: Sequence[Any]) -> None:
        """Queue the batch; what it raises is in ``batch.error``, what the GPU died of in ``_dead``."""
        try:
            self._streams.enter_thread()
            started = time.monotonic()
            self._queue(batch, items)
            batch.queued = started, time.monotonic()
            return
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the forward that failed
            batch.error = OutOfMemory(first_line(error)) if is_out_of_memory(error) else error
        try:
            # Whatever part of the batch was queued still uses the slot.
            streams = self._streams
            streams.compute.follow(streams.h2d.record())
            streams.d2h.follow(streams.compute.record())
            batch.end = streams.d2h.record()
            if isinstance(batch.error, OutOfMemory):
                streams.give_back_memory()
        except BaseException as error:  # recording an event fails only where nothing works any more
            self._die(error)

    def _queue(self, batch: Launched, items: Sequence[Any]) -> None:
        streams, forward, room = self._streams, self._forward, self._slots[batch.slot]
        count = batch.count
        shape = forward.shape([len(item) for item in items])
        capacity = self._graphs.choose(shape)
        size = self._size(capacity or shape)
        if size > len(room.staged) or count > len(room.rows):
            raise ValueError(
                f"a batch of {count} pieces and {shape.tokens} tokens is larger than a staging slot"
            )
        forward.pack(items, room.staged_array[:size], capacity)
        slab, rows = room.slab[:size], room.rows[:count]

        def compute() -> None:
            if capacity is not None:
                self._graphs.run(capacity, slab, rows)
            else:
                rows.copy_(forward.forward(slab, shape))

        staged = streams.h2d.record()
        streams.h2d.copy(slab, room.staged[:size])
        copied = streams.h2d.record()
        streams.compute.follow(copied)
        began = streams.compute.record()
        streams.compute.run(compute)
        computed = streams.compute.record()
        streams.d2h.follow(computed)
        leaving = streams.d2h.record()
        streams.d2h.copy(room.landed[:count], rows)
        landed = streams.d2h.record()
        batch.marks = Marks(staged, copied, began, computed, leaving, landed)
        batch.end = landed

    def _size(self, shape: Shape) -> int:
        """How much of a slab a batch of the shape needs: no more is copied."""
        return self._forward.slab_size(shape.tokens, shape.count)

    # ---- the waiter thread

    def wait(self) -> Flight | None:
        batch = self._launched.get()
        if batch is None:
            self._launched.put(None)  # whoever waits again is told again
            return None
        flight = self._land(batch)
        self._slots[batch.slot].taken = False
        return flight

    def _land(self, batch: Launched) -> Flight:
        if self._dead is None and batch.end is not None:
            try:
                self._streams.enter_thread()
                batch.end.wait()
                self._look_at_retries()
                if batch.marks is not None and batch.error is None:
                    return self._landed(batch, batch.marks)
            except BaseException as error:  # a batch's own errors were raised when it was launched
                self._die(error)
        self._previous = None  # what a batch that failed took of the stream is nobody's idle time
        return Flight(batch.slot, None, self._dead or batch.error, 0.0)

    def _landed(self, batch: Launched, marks: Marks) -> Flight:
        now = time.monotonic()
        rows = self._slots[batch.slot].landed[: batch.count].numpy().copy()
        before = self._previous.marks if self._previous is not None else None
        idle_s = 0.0 if before is None else marks.began.after(before.computed)
        self._previous = batch
        spans = (Span("launcher thread", "launch", *batch.queued), *self._clock.spans(marks, now))
        return Flight(batch.slot, rows, None, marks.computed.after(marks.began), idle_s, spans=spans)

    def _die(self, error: BaseException) -> None:
        """An error that the GPU keeps giving, whatever is asked of it: only a new process gets a new context."""
        if self._dead is None:
            keep_for_ever((self._slots, self._graphs))
            self._dead = DeviceFailed(f"{self.name} failed for good: {first_line(error)}")

    def _look_at_retries(self) -> None:
        """What the allocator does not tell is told in the log, now and then."""
        self._until_look -= 1
        if self._until_look:
            return
        self._until_look = RETRIES_EVERY
        retries, before = self._streams.allocation_retries(), self._retries
        if retries > before:
            self._retries = retries
            log.warning(
                "the GPU's memory was short: the allocator stopped the GPU to give back what it did not use",
                extra={"retries": retries - before, "batches": RETRIES_EVERY},
            )

    # ---- start and end

    def enter_thread(self) -> None:
        self._streams.enter_thread()

    def run(self, items: Sequence[Any]) -> np.ndarray:
        """In batches within ``max_tokens``, as the stage would send them."""
        rows: list[np.ndarray] = []
        batch: list[Any] = []
        longest = total = 0
        for item in items:
            length = len(item)
            longest, total = max(longest, length), total + length
            if batch and ((len(batch) + 1) * longest if self.padded else total) > self.max_tokens:
                rows.append(self._rows(batch))
                batch, longest, total = [], length, length
            batch.append(item)
        return np.concatenate([*rows, self._rows(batch)])

    def close(self) -> None:
        """Batches launched before this still end, and :meth:`wait` gives them before None.

        Never blocks: a batch that hangs on the GPU keeps the waiter, and nothing else.
        """
        self._launched.put(None)

    def _measure(self, max_tokens: int, max_items: int, max_length: int) -> int:
        """How many tokens fit the memory, from a batch of the longest pieces, whose bytes per token are the most."""
        tokens = min(max_tokens, PROBE_TOKENS)
        count = min(max_items, max(1, tokens // max_length))
        while True:
            try:
                return self._probe(count, max_length)
            except (RuntimeError, OutOfMemory) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)
            self._streams.give_back_memory()
            count //= 2

    def _probe(self, count: int, max_length: int) -> int:
        forward, streams = self._forward, self._streams
        items = [np.zeros(max_length, dtype=np.int32)] * count
        shape = forward.shape([max_length] * count)
        room = self._slots[0]
        forward.pack(items, room.staged_array)

        def compute() -> None:
            room.rows[:count].copy_(forward.forward(room.slab, shape))

        streams.h2d.copy(room.slab, room.staged)
        streams.settle()
        streams.compute.run(compute)  # once before it is measured: the libraries' own workspaces stay
        streams.settle()
        peak = streams.peak_bytes(compute)
        streams.settle()
        streams.give_back_memory()
        free = streams.free_bytes()
        fitting = fitting_tokens(free, peak, shape.tokens)
        log.info(
            "the memory of a batch was measured",
            extra={"bytes_per_token": peak // shape.tokens, "free_bytes": free, "fitting_tokens": fitting},
        )
        return max(fitting, max_length)

    def _rate(self, count: int, length: int) -> float:
        """Tokens per second of a batch of ``count`` pieces, all the way to the GPU and back; the first warms it up.

        If such a batch does not fit, because memory was estimated from a smaller one, ``max_tokens`` is lowered.
        """
        while True:
            items = [np.zeros(length, dtype=np.int32)] * count
            try:
                self._alone(items)
                return count * length / max(self._alone(items).busy_s, 1e-9)
            except OutOfMemory:
                if count == 1:
                    raise
            count //= 2
            self.max_tokens = count * length

    def _rows(self, items: Sequence[Any]) -> np.ndarray:
        rows = self._alone(items).rows
        assert rows is not None
        return rows

    def _alone(self, items: Sequence[Any]) -> Flight:
        """One batch to the GPU and back, in the calling thread; only while nothing else is launched."""
        self.launch(0, items)
        flight = self.wait()
        assert flight is not None
        if flight.error is not None:
            raise flight.error
        self._previous = None  # the wait for the first document is nobody's idle time
        return flight


class Clock:
    """Puts the events of batches, which only know their distances, on the host's clock.

    Distances between neighbours are exact, but a chain of them drifts from the host's clock.  A batch cannot land
    later than it is seen to have landed, and of many that are waited for, some are seen at once: so the chain is
    moved by how far the nearest of the last ``WINDOW`` was from that.
    """

    WINDOW = 256

    def __init__(self) -> None:
        self._staged: Event | None = None
        self._staged_s = 0.0
        self._late: deque[float] = deque()

    def spans(self, marks: Marks, now: float) -> tuple[Span, ...]:
        """The batch's copies and its forward, in seconds of the clock of ``now``, when it was seen to have landed."""
        lasted = marks.landed.after(marks.staged)
        staged_s = now - lasted
        if self._staged is not None:
            staged_s = self._staged_s + marks.staged.after(self._staged)
        late = now - (staged_s + lasted)
        self._late.append(late)
        if late < 0 or len(self._late) >= self.WINDOW:
            staged_s += min(self._late)
            self._late.clear()
        self._staged, self._staged_s = marks.staged, staged_s

        def at(event: Event) -> float:
            return staged_s + event.after(marks.staged)

        return (
            Span("h2d stream", "h2d", staged_s, at(marks.copied)),
            Span("compute stream", "compute", at(marks.began), at(marks.computed)),
            Span("d2h stream", "d2h", at(marks.leaving), staged_s + lasted),
        )
