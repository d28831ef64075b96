"""Keeps a device's slots full from one thread and takes its flights in another, as the stage does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from inferstream.batching import Item, Window
from inferstream.device import Device, Flight


@dataclass(frozen=True, slots=True)
class Fed:
    """What a device did in a measurement; times in seconds, ``latency_s`` from a batch's launch to its rows."""

    batches: int
    documents: int
    tokens: int
    seconds: float
    busy_s: float
    idle_s: float
    latency_s: float

    @property
    def documents_per_s(self) -> float:
        return self.documents / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def idle_ratio(self) -> float:
        """The share of the compute stream's time between batches."""
        return self.idle_s / (self.idle_s + self.busy_s) if self.busy_s else 0.0


def feed(device: Device, batches: Sequence[Sequence[Any]], seconds: float) -> Fed:
    """Launch ``batches`` round and round for about ``seconds``, after one round that is not measured.

    Raises what a batch or the device raised.
    """
    for items in batches:
        _one(device, items)
    free: SimpleQueue[int] = SimpleQueue()
    for slot in range(device.slots):
        free.put(slot)
    flights: list[tuple[Flight, float]] = []
    launched: dict[int, float] = {}
    work: SimpleQueue[bool] = SimpleQueue()  # True for each launched batch, False at the end

    def take() -> None:
        while work.get() and (flight := device.wait()) is not None:
            flights.append((flight, time.perf_counter() - launched[flight.slot]))
            free.put(flight.slot)

    waiter = threading.Thread(target=take, name="bench-waiter", daemon=True)
    waiter.start()
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        slot = free.get()
        launched[slot] = time.perf_counter()
        device.launch(slot, batches[count % len(batches)])
        work.put(True)
        count += 1
    work.put(False)
    waiter.join()
    lasted = time.perf_counter() - started
    for flight, _ in flights:
        if flight.error is not None:
            raise flight.error
    ran = [batches[n % len(batches)] for n in range(count)]
    return Fed(
        batches=count,
        documents=sum(map(len, ran)),
        tokens=sum(len(item) for items in ran for item in items),
        seconds=lasted,
        busy_s=sum(flight.busy_s for flight, _ in flights),
        idle_s=sum(
            flight.idle_s for flight, _ in flights[1:]
        ),  # the first waited for the measurement to begin
        latency_s=sorted(latency for _, latency in flights)[len(flights) // 2],
    )


@contextmanager
def busy_in_python() -> Iterator[None]:
    """Beside a thread that holds the interpreter's lock as long as it may, as those that parse and serialise do."""
    ending = threading.Event()

    def count() -> None:
        n = 0
        while not ending.is_set():
            for _ in range(1000):
                n += 1

    thread = threading.Thread(target=count, name="bench-busy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def kernel_seconds(events: Iterable[Any]) -> float:
    """How long kernels ran on the stream that computes, of the events that PyTorch's profiler (Kineto) gives.

    Copies between the host and the GPU have streams of their own; those on this one are part of the forward.  The
    stream is the one with the most; what overlaps counts once.
    """
    streams: dict[int, list[tuple[int, int]]] = {}
    for event in events:
        if "CUDA" in str(event.device_type()) and not event.is_user_annotation():
            start = event.start_ns()
            span = (start, start + event.duration_ns())
            streams.setdefault(event.device_resource_id(), []).append(span)

    def covered(spans: list[tuple[int, int]]) -> int:
        total = until = 0
        for start, end in sorted(spans):
            total += max(0, end - max(start, until))
            until = max(until, end)
        return total

    return max(map(covered, streams.values()), default=0) / 1e9


def _one(device: Device, items: Sequence[Any]) -> None:
    device.launch(0, items)
    flight = device.wait()
    assert flight is not None
    if flight.error is not None:
        raise flight.error


def fixed(length: int, tokens: int, batches: int, vocabulary: int) -> list[list[np.ndarray]]:
    """Batches of documents of one length, each of ``tokens`` in all."""
    random = np.random.default_rng(0)
    count = max(1, tokens // length)
    return [
        [random.integers(1, vocabulary, length, dtype=np.int32) for _ in range(count)] for _ in range(batches)
    ]


def mixed(count: int, longest: int, vocabulary: int) -> list[np.ndarray]:
    """Documents with log-normal lengths, median 60 tokens, sigma 1, as in docs/batching.md."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(60), 1.0, count).astype(int), 3, longest)
    return [random.integers(1, vocabulary, int(length), dtype=np.int32) for length in lengths]


def batched(documents: Sequence[np.ndarray], max_tokens: int, *, padded: bool) -> list[list[np.ndarray]]:
    """The batches that the worker would form of a backlog of these documents, full ones only."""
    window = Window(max_tokens, padded=padded)
    found: list[list[np.ndarray]] = []
    waiting = iter(documents)
    while True:
        for document in waiting:
            window.add(Item(None, 0, len(document), 0.0, document))
            if window.tokens >= 16 * max_tokens:
                break
        if not window.full:
            return found
        found.append([item.payload for item in window.form()])
