"""What a device asks of a model: one int32 slab in, one row per piece out, and nothing on the host in between.

A batch crosses to the device as ONE array.  What the kernels need beyond it (how many pieces, how many tokens, the
longest) is known on the host when the batch is written, travels as a ``Shape``, and is never read back from the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What a batch in a slab looks like.  Hashable: graphs are kept by it.

    ``count`` pieces; ``tokens`` of them all (packed: their sum; padded: count times longest); the ``longest`` in
    tokens.
    """

    count: int
    tokens: int
    longest: int


class Forward(Protocol):
    """A model that reads a batch from one int32 slab and gives one row per piece, without any host synchronisation.

    ``width`` is a row's; ``padded`` says what a batch costs: count times longest (True) or the sum of its tokens
    (False).
    """

    width: int
    padded: bool

    def slab_size(self, max_tokens: int, max_items: int) -> int:
        """How many int32 elements any batch within the budget needs.

        A single piece longer than ``max_tokens`` counts as the budget.
        """
        ...

    def shape(self, lengths: Sequence[int]) -> Shape:
        """The shape of a batch of pieces of these lengths in tokens, each at least one."""
        ...

    def pack(self, items: Sequence[Any], slab: np.ndarray, capacity: Shape | None = None) -> Shape:
        """Write the pieces into slab (int32 [≥ slab_size]) and give the shape they have there.

        A piece is an int32 array [tokens] or a ``models.tokenizer.Tokens``.  With ``capacity`` (a graph's static
        shape, at least the batch's in each part) the rest is filled with dummy pieces of at most capacity.longest
        tokens, and ``capacity`` is what is given back; the rows beyond the items' are then to be ignored.
        """
        ...

    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        """The pieces' rows, float32 [shape.count, width], on the slab's device: pooled, normalised, cast.

        slab is int32 on the model's device, as ``pack`` wrote it.  Launches only: no .item(), no nonzero, no allocation
        whose size depends on values, no sync.  May be called under torch.cuda.graph capture where shape is a capacity.
        """
        ...


def run_once(forward: Forward, items: Sequence[Any], device: torch.device | None = None) -> Tensor:
    """The rows of ``items`` as one batch, float32 [items, width], in a slab made for it.

    ``device`` is the model's, by default the CPU.
    """
    shape = forward.shape([len(item) for item in items])
    slab = np.empty(forward.slab_size(shape.tokens, shape.count), dtype=np.int32)
    shape = forward.pack(items, slab)
    return forward.forward(torch.from_numpy(slab).to(device or "cpu"), shape)
