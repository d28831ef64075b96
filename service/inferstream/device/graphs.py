"""CUDA graphs for small batches and for full ones: the kernels of a forward recorded once, launched as one.

A small batch takes the GPU less time than its hundred kernels take the host to launch.  A full one takes it longer, but
not than they take a launcher that waits for the interpreter's lock between them, beside other threads in Python.  A
graph launches them all at once, but it was recorded with a fixed number of tokens and documents: a batch is filled up
to it with dummies.  What that may cost, and so which batches run as a graph, is :func:`choose`.

All graphs are recorded and checked before the first document.  Recording one later would stall the stream it is meant
to keep busy, so a batch that no graph suits is launched kernel by kernel (eager), and nothing is ever thrown out.

All read the one slab ``inbox`` and write the one slab ``outbox``, and share the memory in between: they only ever
run one after the other, on the compute stream, and what a graph computed leaves that memory within the graph.
"""

from __future__ import annotations

import logging
import traceback
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from inferstream.device.failures import is_out_of_memory
from inferstream.device.forward import Forward, Shape
from inferstream.device.streams import Graph, Streams

log = logging.getLogger(__name__)

MAX_PADDING = 0.12
"""The share of a graph's tokens that may be dummies; above it, launching kernel by kernel is taken to be faster."""

FREE_PADDING = 256
"""So many dummies are always allowed, in tokens: below a few hundred tokens a forward takes as long as an empty one."""

LARGEST = 16_384
"""Tokens; from here on the kernels of common encoders run longer than a quiet host takes to launch them.

Beside threads in Python a host is several times slower (docs/gpu.md), and a backlog fills batches up to the budget but
for less than a document: so the budget itself has graphs as well, whatever it is.
"""

LONGEST = (128, 512)
"""The classes of the longest document, in tokens; beyond the last, the model's own limit."""

TOKENS_PER_DOCUMENT = 16
LEAST_DOCUMENTS = 32
"""A graph takes one document per so many of its tokens, but at least so many.

A place nobody needs costs thread blocks that find nothing to do, for each head and layer.
"""

TOKENS_PER_DOCUMENT_FULL = 32
"""As above, of the graphs for full batches, where there are more such places."""

SAME_COSINE = 0.999
"""What a row of a graph and of the eager forward have at least in common; differently rounded sums take little."""


def capacities(max_tokens: int, max_items: int, max_length: int) -> list[Shape]:
    """The shapes worth a graph, smallest first.

    Steps of ``FREE_PADDING``, then of an eighth of a power of two, so that neighbours are less than ``MAX_PADDING``
    apart, and ``max_tokens`` itself; each for every class of the longest document.
    """
    if max_tokens < FREE_PADDING:
        return []
    sizes: list[int] = []
    size = FREE_PADDING
    while size <= min(max_tokens, LARGEST):
        sizes.append(size)
        size += max(FREE_PADDING, (1 << (size.bit_length() - 1)) // 8)
    if sizes[-1] < max_tokens:
        sizes.append(max_tokens)
    classes = [longest for longest in LONGEST if longest < max_length]
    classes.append(min(max_length, max_tokens))

    def places(tokens: int) -> int:
        each = TOKENS_PER_DOCUMENT if tokens <= LARGEST else TOKENS_PER_DOCUMENT_FULL
        return min(max_items, max(LEAST_DOCUMENTS, tokens // each))

    return [
        Shape(places(tokens), tokens, longest)
        for tokens in sizes
        for longest in sorted({min(longest, tokens) for longest in classes})
    ]


def planned(
    max_tokens: int, max_items: int, max_length: int, *, most: int, fitting_tokens: int
) -> list[Shape]:
    """Which of the ``capacities`` are recorded, at most ``most`` of them, smallest first.

    Those for full batches go before the smallest, which go before the others.  ``fitting_tokens`` is how many tokens
    the memory holds at once.  What graphs compute in between has memory of its own, as large as the largest of them
    needs, and a batch that runs eagerly needs as much again: so none has more than half of that.
    """
    found = [
        each for each in capacities(max_tokens, max_items, max_length) if each.tokens <= fitting_tokens // 2
    ]
    full = [each for each in found if each.tokens == max_tokens][:most]
    return [each for each in found if each not in full][: most - len(full)] + full


def choose(shape: Shape, available: Sequence[Shape]) -> Shape | None:
    """The graph that a batch of ``shape`` runs in, of those in ``available`` (by tokens); None: eager.

    The one with the fewest tokens, then the shortest longest document, into which the batch fits and that does not
    hold too many dummies.
    """
    for capacity in available[bisect_left(available, shape.tokens, key=lambda each: each.tokens) :]:
        padding = capacity.tokens - shape.tokens
        if padding > FREE_PADDING and padding > MAX_PADDING * capacity.tokens:
            return None
        if shape.longest <= capacity.longest and shape.count <= capacity.count:
            return capacity
    return None


class Graphs:
    """The graphs of one forward on one device; ``shapes`` are those there are, empty if there are none.

    ``most`` bounds their number, ``fitting_tokens`` their size: how many tokens the memory holds at once.
    ``vocabulary``: ids from 0 to below it are valid.
    """

    def __init__(
        self,
        forward: Forward,
        streams: Streams,
        *,
        most: int,
        max_tokens: int,
        max_items: int,
        max_length: int,
        fitting_tokens: int,
        vocabulary: int,
    ) -> None:
        self._forward = forward
        self._streams = streams
        self._vocabulary = vocabulary
        self._graphs: dict[Shape, Graph] = {}
        self.shapes: list[Shape] = []
        if forward.padded:
            return  # a padded batch has a length and a width, and few would come close to both of a graph's
        shapes = planned(max_tokens, max_items, max_length, most=most, fitting_tokens=fitting_tokens)
        if not shapes:
            return
        size = max(forward.slab_size(each.tokens, each.count) for each in shapes)
        count = max(each.count for each in shapes)
        self._staged = streams.array(size, dtype=torch.int32, pinned=True)
        self._inbox = streams.array(size, dtype=torch.int32)
        self._outbox = streams.array(count, forward.width, dtype=torch.float32)
        self._landed = streams.array(2 * count * forward.width, dtype=torch.float32, pinned=True)
        self._record(shapes)

    def choose(self, shape: Shape) -> Shape | None:
        """The shape to fill a batch up to; None: it runs eagerly."""
        return choose(shape, self.shapes) if self.shapes else None

    def run(self, capacity: Shape, slab: Tensor, rows: Tensor) -> None:
        """Within the compute stream's ``run``: a batch in ``slab`` int32, filled up to ``capacity``, to ``rows``."""
        self._inbox[: len(slab)].copy_(slab)  # one inbox for every slot: a graph knows one address
        self._graphs[capacity].replay()
        rows.copy_(self._outbox[: len(rows)])

    def _record(self, shapes: Iterable[Shape]) -> None:
        """Each is checked against the eager forward; there are none if one differs or cannot be recorded.

        Only where memory is out a smaller one may fit; as they share memory, those there are then are checked once
        more.  The largest comes first: what it needs in between holds the others,
        while each that is larger than those before it would get memory of its own.
        """
        random = np.random.default_rng(0)
        why: dict[str, object] | None = None
        try:
            for capacity in sorted(shapes, key=_size, reverse=True):
                try:
                    self._capture(capacity, random)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    why = {"capacity": str(capacity), "why": f"{type(error).__name__}: {str(error)[:200]}"}
                    traceback.clear_frames(error.__traceback__)  # they hold the forward's tensors
                    self._streams.settle()
                    self._streams.give_back_memory()
                    continue
                self._must_agree(capacity, random)
                insort(self.shapes, capacity, key=_size)
            if why is not None:
                for capacity in self.shapes:
                    self._must_agree(capacity, random)
        except Exception as error:
            why = {"capacity": str(capacity), "why": f"{type(error).__name__}: {str(error)[:200]}"}
            self._graphs.clear()
            self.shapes.clear()
        finally:
            self._streams.settle()
        if why is None:
            log.info("CUDA graphs recorded", extra={"graphs": len(self.shapes)})
        elif self.shapes:
            log.warning("fewer CUDA graphs than planned", extra={"graphs": len(self.shapes), **why})
        else:
            log.warning("no CUDA graphs: batches are launched kernel by kernel, which is slower", extra=why)

    def _must_agree(self, capacity: Shape, random: np.random.Generator) -> None:
        alike = self._check(capacity, random)
        if not alike >= SAME_COSINE:
            raise ArithmeticError(f"its rows differ from the eager ones: cosine {alike:.4f}")

    def _capture(self, capacity: Shape, random: np.random.Generator) -> None:
        count, forward = capacity.count, self._forward

        def work() -> None:
            self._outbox[:count].copy_(forward.forward(self._inbox, capacity))

        self._stage(self._sample(capacity, random), capacity, self._inbox)
        self._streams.compute.run(work)  # what a kernel does once, at its first launch, must not be recorded
        self._streams.run_unwaited(work)
        self._streams.settle()
        self._graphs[capacity] = self._streams.capture(work)

    def _check(self, capacity: Shape, random: np.random.Generator) -> float:
        """The least cosine between the rows of the graph and of the eager forward, of documents it has not seen."""
        streams, forward = self._streams, self._forward
        items = self._sample(capacity, random)
        rows = streams.array(2, len(items), forward.width, dtype=torch.float32)
        landed = self._landed[: rows.numel()].view(rows.shape)
        slab = torch.empty_like(self._inbox)
        shape = self._stage(items, None, slab)
        streams.compute.run(lambda: _copy(rows[0], forward.forward(slab, shape)))
        streams.settle()
        self._stage(items, capacity, slab)
        streams.compute.run(lambda: self.run(capacity, slab, rows[1]))
        streams.settle()
        streams.d2h.copy(landed, rows)
        streams.settle()
        return float(torch.nn.functional.cosine_similarity(landed[0], landed[1]).min())

    def _sample(self, capacity: Shape, random: np.random.Generator) -> list[np.ndarray]:
        """Documents of random tokens that do not quite fill the capacity, the longest of them as long as can be."""
        longest = min(capacity.longest, capacity.tokens)
        items = [random.integers(0, self._vocabulary, longest, dtype=np.int32)]
        room = capacity.tokens - longest
        while len(items) < capacity.count - 1 and room > 3:
            length = int(random.integers(1, min(longest, room) + 1))
            items.append(random.integers(0, self._vocabulary, length, dtype=np.int32))
            room -= length
        return items

    def _stage(self, items: Sequence[np.ndarray], capacity: Shape | None, target: Tensor) -> Shape:
        """The documents in a slab on the device, which must have nothing to do."""
        shape = self._forward.pack(items, self._staged.numpy(), capacity)
        self._streams.h2d.copy(target, self._staged)
        self._streams.settle()
        return shape


def _size(shape: Shape) -> tuple[int, int]:
    return shape.tokens, shape.longest


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
