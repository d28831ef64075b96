"""Devices that stand in for others, and one that watches another."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from inferstream.device import Device, Flight
from inferstream.documents import Document, Prepared, Rejected
from inferstream.tasks import Task


@dataclass(frozen=True, slots=True)
class Span:
    """A batch on the device, in seconds on its own clock."""

    start: float
    end: float
    items: int


class PacedDevice:
    """Computes nothing and takes the time of a device that does ``tokens_per_s`` tokens a second.

    Like a CUDA stream it works through what is staged without being asked: a batch starts when it was launched
    or when its predecessor ended, whichever is later, on the device's own clock.  The thread that stands for
    the stream only has to tell of the ends, so its own delays (the interpreter's lock, the sleep's precision)
    cost slack and not time, as with a real device.  Items are ``(payload, tokens)``; rows are ``width`` zeros.
    """

    def __init__(self, tokens_per_s: float, width: int, slots: int = 3) -> None:
        self.name = "paced"
        self.slots = slots
        self.lanes = 1
        self.padded = False
        self.max_tokens: int | None = None
        self.spans: list[Span] = []
        self.tokens_per_s = tokens_per_s
        self._rows = np.zeros((1, width), dtype=np.float32)
        self._rows[0, 0] = 1.0
        self._free_at = 0.0
        self._staged: SimpleQueue[tuple[int, int, float, float] | None] = SimpleQueue()
        self._flights: SimpleQueue[Flight | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._stream, name="paced-stream", daemon=True)
        self._thread.start()

    def launch(self, slot: int, items: Sequence[Any]) -> None:
        start = max(time.perf_counter(), self._free_at)
        self._free_at = start + sum(tokens for _, tokens in items) / self.tokens_per_s
        self._staged.put((slot, len(items), start, self._free_at))

    def wait(self) -> Flight | None:
        flight = self._flights.get()
        if flight is None:
            self._flights.put(None)
        return flight

    def close(self) -> None:
        self._staged.put(None)
        self._thread.join()
        self._flights.put(None)

    def idle_ratio(self, skipped: float = 0.05) -> float:
        """The share of the time without a batch, between the first and last ``skipped`` of the documents."""
        return idle_ratio(self.spans, skipped)

    def _stream(self) -> None:
        while (staged := self._staged.get()) is not None:
            slot, count, start, end = staged
            time.sleep(max(0.0, end - time.perf_counter()))
            self.spans.append(Span(start, end, count))
            self._flights.put(
                Flight(slot, np.broadcast_to(self._rows, (count, self._rows.shape[1])), None, end - start)
            )


def idle_ratio(spans: Sequence[Span], skipped: float) -> float:
    """The share of the time that no span covers; spans do not overlap.  nan for fewer than two that count."""
    total = sum(span.items for span in spans)
    counted: list[Span] = []
    done = 0
    for span in spans:
        done += span.items
        if skipped * total < done <= (1 - skipped) * total:
            counted.append(span)
    if len(counted) < 2:
        return float("nan")
    busy = sum(span.end - span.start for span in counted)
    return 1 - busy / (counted[-1].end - counted[0].start)


class CountedTask:
    """A task whose items carry their number of tokens, for :class:`PacedDevice`."""

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.model = task.model
        self._task = task
        self.output = task.output

    def prepare(self, documents: Sequence[Document]) -> list[Prepared | Rejected]:
        return [self._counted(answer) for answer in self._task.prepare(documents)]

    @staticmethod
    def _counted(answer: Prepared | Rejected) -> Prepared | Rejected:
        if isinstance(answer, Rejected):
            return answer
        chunks = tuple(zip(answer.chunks, answer.lengths, strict=True))
        return Prepared(answer.document, chunks, answer.lengths, answer.truncated, answer.weight)


class WatchedDevice:
    """Another device, and how long each of its batches took in ``batch_s`` (seconds)."""

    def __init__(self, device: Device) -> None:
        self.name = device.name
        self.slots = device.slots
        self.lanes = device.lanes
        self.padded = device.padded
        self.max_tokens = device.max_tokens
        self.batch_s: list[float] = []
        self.launch = device.launch
        self.close = device.close
        self._device = device

    def wait(self) -> Flight | None:
        flight = self._device.wait()
        if flight is not None:
            self.batch_s.append(flight.occupied_s)
        return flight
