"""A GPU that is not one: its streams do what is queued as late and in as odd an order as the events allow.

What is queued is kept per stream and done in steps, each the next operation of some stream, which ``choose`` picks:
before and after every call a few, and while the host waits for an event, as many as it takes.  A copy is two steps,
half of it each, so that others can come in between.  Time is counted in steps.  The memory is the host's, the numbers
are real: what is read too early or overwritten too early is wrong in the results.

``deaf`` leaves out dependencies, each a pair: (``compute``, ``h2d``) is a compute stream that does not wait for the
events of the h2d stream, (``host``, ``d2h``) a host that does not wait for those of the d2h stream, and
(``host``, ``all``) one that does not settle.  A test that still passes then was no test.

Not like a GPU: kernels are one step each, nothing runs side by side, and a graph is the calls that made it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from inferstream.device import Flight

STEPS = (*(0,) * 16, 1, 2, 5, 100)

Choose = Callable[[int], int]
"""Given n, a number from 0 to below n."""


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.at: float | None = None

    def wait(self) -> None:
        streams = self.stream.streams
        with streams.lock:
            streams.check()
            if ("host", self.stream.name) in streams.deaf:
                return
        if streams.hanging is not None:
            streams.hanging.wait()
        with streams.lock:
            while self.at is None:
                assert streams.step(), "waits for an event that can never happen"
                streams.check()
            streams.some_steps()

    def after(self, earlier: FakeEvent) -> float:
        assert self.at is not None and earlier.at is not None, (
            "an event's time was read before it had happened"
        )
        assert self.at >= earlier.at, "events in the wrong order"
        return self.at - earlier.at


class FakeStream:
    def __init__(self, streams: FakeStreams, name: str) -> None:
        self.streams = streams
        self.name = name
        self.queue: deque[tuple[FakeEvent | None, Callable[[], None]]] = deque()

    def run(self, work: Callable[[], None]) -> None:
        streams = self.streams
        with streams.lock:
            streams.check()
            number, streams.runs = streams.runs, streams.runs + 1
            error = streams.refused.pop(number, None)
            if error is not None:
                streams.queued(
                    self, work
                )  # the host stopped half-way: what it had launched by then still runs
                raise error
            streams.queued(self, work)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype
        assert target.is_contiguous() and source.is_contiguous()
        target, source = target.view(-1), source.view(-1)
        half = len(source) // 2
        with self.streams.lock:
            self.streams.check()
            self.queue.append((None, lambda: _copy(target[half:], source[half:])))
            self.streams.queued(self, lambda: _copy(target[:half], source[:half]))

    def follow(self, event: FakeEvent) -> None:
        with self.streams.lock:
            self.streams.check()
            if (self.name, event.stream.name) not in self.streams.deaf:
                self.queue.append((event, lambda: None))
            self.streams.some_steps()

    def record(self) -> FakeEvent:
        event = FakeEvent(self)

        def happen() -> None:
            event.at = self.streams.now

        with self.streams.lock:
            self.streams.queued(self, happen)
        return event


class FakeGraph:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            self.work()


class FakeStreams:
    """``refused``: number of the ``run`` → what it raises.  ``break_graph`` may spoil what ``capture`` records.

    ``waits`` is what ``run_unwaited`` raises, and ``retries`` what the allocator is said to have done.

    ``died`` is raised by every call from then on, as a GPU does whose context is poisoned.  ``hanging`` set to an
    event makes the device do nothing until it is set.
    """

    name = "fake:0"

    def __init__(self, choose: Choose | None = None, deaf: Collection[tuple[str, str]] = ()) -> None:
        self.choose = choose or (lambda n: 0)
        self.deaf = frozenset(deaf)
        self.lock = threading.RLock()
        self.now = 0.0
        self.runs = 0
        self.refused: dict[int, BaseException] = {}
        self.died: BaseException | None = None
        self.hanging: threading.Event | None = None
        self.settled = 0
        self.emptied = 0
        self.retries = 0
        self.waits: BaseException | None = None
        self.free = 1 << 30
        self.bytes_per_run = 1 << 20
        self.arrays: list[Tensor] = []
        self.graphs: list[FakeGraph] = []
        self.break_graph: Callable[[Callable[[], None]], Callable[[], None]] | None = None
        self.default = FakeStream(self, "default")
        self.h2d = FakeStream(self, "h2d")
        self.compute = FakeStream(self, "compute")
        self.d2h = FakeStream(self, "d2h")
        self.streams = (self.default, self.h2d, self.compute, self.d2h)

    def enter_thread(self) -> None:
        self.check()

    def array(self, *size: int, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        made = torch.full(size, 77, dtype=dtype)  # as memory is: full of what was there before
        self.arrays.append(made)
        return made

    def settle(self) -> None:
        self.settled += 1
        with self.lock:
            self.check()
            while ("host", "all") not in self.deaf and any(stream.queue for stream in self.streams):
                assert self.step(), "streams wait for each other for ever"

    def run_unwaited(self, work: Callable[[], None]) -> None:
        if self.waits is not None:
            raise self.waits
        self.compute.run(work)

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        self.check()
        recorded = work if self.break_graph is None else self.break_graph(work)
        self.graphs.append(FakeGraph(recorded))
        return self.graphs[-1]

    def peak_bytes(self, work: Callable[[], None]) -> int:
        self.compute.run(work)
        return self.bytes_per_run

    def free_bytes(self) -> int:
        return self.free

    def give_back_memory(self) -> None:
        self.check()
        self.emptied += 1

    def allocation_retries(self) -> int:
        self.check()
        return self.retries

    # ---- what a device does

    def check(self) -> None:
        if self.died is not None:
            raise self.died

    def queued(self, stream: FakeStream, work: Callable[[], None]) -> None:
        self.check()
        stream.queue.append((None, work))
        self.some_steps()

    def some_steps(self) -> None:
        """As many as ``choose`` likes; mostly none, as a device that is far behind, and sometimes all there are."""
        for _ in range(STEPS[self.choose(len(STEPS))]):
            if not self.step():
                return

    def step(self) -> bool:
        """Do the next operation of one stream; False if none can go on."""
        ready = [
            stream
            for stream in self.streams
            if stream.queue and ((event := stream.queue[0][0]) is None or event.at is not None)
        ]
        if not ready:
            return False
        stream = ready[self.choose(len(ready))]
        self.now += 1 + self.choose(3)
        _, work = stream.queue.popleft()
        with torch.inference_mode():
            work()
        return True


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


class ToyForward:
    """A model whose row is made of its piece's tokens, its length and a weight, and that minds what it reads.

    A row, float32 [4]: weight x sum of the tokens, the length, the first token, the last.  The slab holds the count,
    the tokens' number, a checksum, the bounds and the tokens.  A slab that is not what ``pack`` wrote, all of it, is
    noted in ``torn``: on a GPU, bounds from one batch and tokens of another read beyond their memory.
    """

    width = 4
    padded = False

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.torn = 0
        self.packed: list[Any] = []

    def slab_size(self, max_tokens: int, max_items: int) -> int:
        return 4 + 2 * max_items + max_tokens

    def shape(self, lengths: Any) -> Any:
        from inferstream.device.forward import Shape

        return Shape(len(lengths), sum(lengths), max(lengths))

    def pack(self, items: Any, slab: Any, capacity: Any = None) -> Any:
        shape = capacity or self.shape([len(item) for item in items])
        for item in items:
            if isinstance(item, Poison):
                raise item.error
        self.packed.append(capacity)
        slab[:] = -1
        bounds = [0]
        for item in items:
            bounds.append(bounds[-1] + len(item))
        used = bounds[-1]
        bounds += [shape.tokens] * (shape.count + 1 - len(bounds))
        start = 4 + shape.count + 1
        slab[0], slab[1] = shape.count, shape.tokens
        slab[4:start] = bounds
        slab[start : start + shape.tokens] = 0
        for item, at in zip(items, bounds, strict=False):
            slab[start + at : start + at + len(item)] = item
        slab[2] = used
        slab[3] = int(slab[4 : start + shape.tokens].sum()) % 65_521
        return shape

    def forward(self, slab: Tensor, shape: Any) -> Tensor:
        start = 4 + shape.count + 1
        end = start + shape.tokens
        whole = [shape.count, shape.tokens]
        rows = torch.zeros(shape.count, 4)
        if slab[:2].tolist() != whole or int(slab[4:end].sum()) % 65_521 != int(slab[3]):
            self.torn += 1
            return rows
        bounds = slab[4:start].tolist()
        for n, (first, last) in enumerate(pairwise(bounds)):
            tokens = slab[start + first : start + last].float()
            if len(tokens):
                rows[n] = torch.tensor(
                    [self.weight * float(tokens.sum()), len(tokens), tokens[0], tokens[-1]]
                )
        return rows

    def row(self, item: Any) -> list[float]:
        """What ``forward`` has to give for a piece."""
        return [self.weight * float(sum(item)), float(len(item)), float(item[0]), float(item[-1])]


class Poison(list[int]):
    """A piece that raises when it is packed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([1])
        self.error = error


def check_times(flights: Sequence[Flight]) -> None:
    """Of batches that a CUDA device gave: their steps are there and in order, and ``busy_s`` is the forward's."""
    for flight in flights:
        assert [span.step for span in flight.spans] == ["launch", "h2d", "compute", "d2h"]
        launch, h2d, compute, d2h = flight.spans
        assert 0 < launch.start <= launch.end
        on_device = [h2d.start, h2d.end, compute.start, compute.end, d2h.start, d2h.end]
        assert on_device == sorted(on_device)
        assert abs(flight.busy_s - (compute.end - compute.start)) <= 1e-6
