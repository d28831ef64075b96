"""Runs an encoder on batches of token ids on a CPU: one vector per text, equal whatever it was batched with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from inferstream.device.forward import Forward, run_once
from inferstream.errors import OutOfMemory

PACKED_GROUP_TOKENS = {torch.float32: 2048, torch.bfloat16: 1024}
PADDED_GROUP_TOKENS = {torch.float32: 512, torch.bfloat16: 1024}
"""How many tokens one forward holds on a CPU, padding included.

A batch is sorted by length and run in groups.  Padded, a small group has little padding; packed, its size hardly
matters.  Measured with MiniLM on real documents of 101 tokens on average (at most 256), tokens per second of one
thread on an Intel Xeon with AVX-512 and without AMX, where bfloat16 is the slower type; the best of 20 passes in
float32, of 3 in bfloat16:

| tokens | padded float32 | packed float32 | padded bfloat16 | packed bfloat16 |
|-------:|---------------:|---------------:|----------------:|----------------:|
|    512 |          4,597 |          4,910 |           2,781 |           2,849 |
|  1,024 |          4,432 |          4,816 |           2,696 |           2,867 |
|  2,048 |          3,922 |          4,999 |           2,520 |           2,721 |
"""


class Encoder:
    """A model behind :class:`inferstream.device.Runner`.

    Several threads may run it at once over the same weights.  ``width`` is the size of its vectors;
    ``normalizes``: they have unit length.  A batch is run in groups of at most ``group_tokens``, by default
    what measured best for the forward and the weights' ``dtype``.
    """

    def __init__(
        self,
        forward: Forward,
        dtype: torch.dtype = torch.float32,
        *,
        normalizes: bool = False,
        group_tokens: int | None = None,
    ) -> None:
        self.forward = forward
        self.width = forward.width
        self.normalizes = normalizes
        usual = PADDED_GROUP_TOKENS if forward.padded else PACKED_GROUP_TOKENS
        self.padded = forward.padded
        self._group_tokens = group_tokens or usual.get(dtype, usual[torch.float32])

    @property
    def execution(self) -> str:
        """``packed`` or ``padded``."""
        return "padded" if self.padded else "packed"

    def enter_thread(self) -> None:
        """One core per compute thread: the thread count of torch belongs to the thread that sets it."""
        torch.set_num_threads(1)

    def run(self, items: Sequence[Any]) -> np.ndarray:
        """Rows of ``items`` (int32 arrays [tokens] or ``models.tokenizer.Tokens``), [items, width], float32.

        Raises OutOfMemory, or whatever the model raises.  A row may hold values that are not finite.
        """
        rows = np.empty((len(items), self.width), dtype=np.float32)
        lengths = [len(item) for item in items]
        try:
            for group in self._groups(lengths):
                rows[group] = run_once(self.forward, [items[n] for n in group]).numpy()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemory(str(error)) from error
        except RuntimeError as error:
            if "allocate memory" in str(error):  # the CPU allocator has no error type of its own
                raise OutOfMemory(str(error)) from error
            raise
        return rows

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in groups of similar length, each at most ``group_tokens`` as the forward counts them.

        A batch is sorted by length also where nothing is padded: equal lengths side by side are one attention.
        """
        group: list[int] = []
        tokens = 0
        for n in sorted(range(len(lengths)), key=lengths.__getitem__):
            length = lengths[n]
            tokens = (len(group) + 1) * length if self.forward.padded else tokens + length
            if group and tokens > self._group_tokens:
                yield group
                group, tokens = [], length
            group.append(n)
        if group:
            yield group
