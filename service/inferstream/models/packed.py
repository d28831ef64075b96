"""Padding-free execution: a batch is one row of tokens, and no token in it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inferstream.device.forward import Shape, run_once
from inferstream.models import attention
from inferstream.models.attention import Packing, equal_runs
from inferstream.models.padded import takes_types
from inferstream.models.pooling import Head
from inferstream.models.positions import OFFSET_POSITIONS
from inferstream.models.tokenizer import Tokens

ARCHITECTURES = frozenset(
    (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "distilbert",
        "modernbert",
        "llama",
        "qwen2",
        "qwen3",
        "gpt2",
    )
)
"""Model types whose layers take everything about their neighbours from the attention function.

Only these are run packed, and only after :mod:`inferstream.models.execution` has tried them: a model that computes
attention by itself (MPNet, DeBERTa) takes a registered function without complaint and then lets documents see each
other.
"""

MOVING_ROTATIONS = frozenset(("dynamic", "longrope"))
"""Kinds of rotary embedding that change with the longest document of a batch, and are read back to find it."""

LONGEST_AT_LEAST = 2
"""The flash kernel takes a longest of 1 for decoding, which allows no empty documents; an upper bound is enough."""


def why_not(model: Any) -> str | None:
    """Why the model cannot run packed where it is now; None if it may be tried."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        return f"{config.model_type} is not known to run packed"
    if not MOVING_ROTATIONS.isdisjoint(_rotations(getattr(config, "rope_parameters", None) or {})):
        return "its rotary embedding depends on the longest document of a batch"
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            return f"the packed kernel has no {str(parameter.dtype).removeprefix('torch.')}"
        if torch.cuda.get_device_capability(parameter.device) < (8, 0):
            return "the packed kernel needs a GPU of compute capability 8.0 or later"
    elif parameter.device.type != "cpu":
        return f"there is no packed kernel for {parameter.device.type}"
    return None


def _rotations(parameters: dict[str, Any]) -> set[str]:
    """The kinds of rotary embedding in a ``rope_parameters``, which may hold one set for each kind of layer."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(each.get("rope_type")) for each in (parameters, *nested)}


def activate_in_place(model: Any) -> None:
    """Let GELU write over its input, the widest tensor of a layer, which nothing reads any more.

    On a CPU a second one of that size (12 MB of 2,048 of MiniLM's tokens) goes through the caches once more, and
    its pages are often fresh from the system.
    """
    from transformers.activations import GELUActivation

    gelus: list[Any] = [module for module in model.modules() if isinstance(module, GELUActivation)]
    for each in gelus:
        if each.act is functional.gelu:
            each.act = _gelu_in_place


def _gelu_in_place(hidden: Tensor) -> Tensor:
    return functional.gelu(hidden, out=hidden)  # type: ignore[call-arg]  # it does take it


class PackedForward:
    """A transformer and its head behind :class:`inferstream.device.forward.Forward`, without padding.

    The slab holds, one behind the other, for a shape of T tokens: ids [T], positions [T], token types [T] if the
    model has them, and the pieces' bounds [entries + 1].  There are more entries than pieces: the dummies that fill a
    capacity need up to ``ceil(T / longest)``, and entries nobody needs are empty pieces at the end of the row.

    ``head`` has to be on the model's device.  ``pad_id`` is the model's padding id.  ``type_ids``: the model's
    tokenizer gives token types.
    """

    padded = False

    def __init__(self, model: Any, head: Head, *, pad_id: int = 0, type_ids: bool = False) -> None:
        self._model = model
        self._head = head
        self._pad_id = pad_id
        self._counted = model.config.model_type in OFFSET_POSITIONS
        self._typed = takes_types(model, type_ids=type_ids)
        self._columns = 3 if self._typed else 2
        if model.device.type == "cuda":
            attention.without_plans()
        elif model.device.type == "cpu":
            activate_in_place(model)
        attention.install()
        # It reads two ids back from the device in every forward, to warn of padding that there is none of.
        model.warn_if_padding_and_no_attention_mask = lambda *_: None
        self.use()
        self.width = run_once(self, [np.zeros(1, dtype=np.int32)], model.device).shape[1]

    def use(self) -> None:
        """Make the model attend as this forward needs it: its weights may be shared with another one."""
        self._model.set_attn_implementation(attention.PACKED)

    def slab_size(self, max_tokens: int, max_items: int) -> int:
        return (
            self._columns * max_tokens + max_items + max_tokens + 1
        )  # bounds: at worst, dummies of one token

    def shape(self, lengths: Sequence[int]) -> Shape:
        return Shape(len(lengths), sum(lengths), max(lengths))

    def pack(self, items: Sequence[Any], slab: np.ndarray, capacity: Shape | None = None) -> Shape:
        rows = [item.ids if isinstance(item, Tokens) else item for item in items]
        lengths = [len(row) for row in rows]
        shape = capacity or self.shape(lengths)
        ids, positions, types, bounds = self._parts(slab, shape)
        used = sum(lengths)
        filled = len(rows)
        np.concatenate(rows, out=ids[:used])
        bounds[0] = 0
        np.cumsum(lengths, out=bounds[1 : filled + 1])
        if used < shape.tokens:
            # Every token of the row belongs to a piece: what lies beyond the last bound may be written over its end.
            ids[used:] = 0
            ends = np.arange(used + shape.longest, shape.tokens + shape.longest, shape.longest)
            bounds[filled + 1 : filled + 1 + len(ends)] = np.minimum(ends, shape.tokens)
            filled += len(ends)
        bounds[filled + 1 :] = shape.tokens
        sizes = np.diff(bounds)
        positions[:] = np.arange(shape.tokens, dtype=np.int32)
        positions -= np.repeat(bounds[:-1], sizes)
        if self._counted:
            self._count(ids, positions, bounds, sizes)
        if types is not None:
            types[:] = 0
            if any(isinstance(item, Tokens) for item in items):
                of_items = [item.types if isinstance(item, Tokens) else np.zeros_like(item) for item in items]
                np.concatenate(of_items, out=types[:used])
        return shape

    @torch.inference_mode()
    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        ids, positions, types, bounds = self._parts(slab, shape)
        packing = Packing(bounds, max(shape.longest, LONGEST_AT_LEAST))
        if slab.device.type == "cpu":
            packing.runs = equal_runs(bounds.numpy())
        inputs = {"input_ids": ids[None], "position_ids": positions[None]}
        if types is not None:
            inputs["token_type_ids"] = types[None]
        hidden: Tensor = self._model(**inputs, packing=packing).last_hidden_state[0]
        return self._head.packed(hidden, bounds, shape.count)

    def _parts(self, slab: Any, shape: Shape) -> tuple[Any, Any, Any, Any]:
        """Ids, positions, types (None if the model has none) and bounds in the slab, an array or a tensor."""
        tokens = shape.tokens
        at = self._columns * tokens
        entries = shape.count + _dummies(tokens, shape.longest)
        types = slab[2 * tokens : at] if self._typed else None
        return slab[:tokens], slab[tokens : 2 * tokens], types, slab[at : at + entries + 1]

    def _count(self, ids: np.ndarray, positions: np.ndarray, bounds: np.ndarray, sizes: np.ndarray) -> None:
        """Positions as RoBERTa counts them, also where a text holds the padding token."""
        real = ids != self._pad_id
        if not real.all():
            counted = np.cumsum(real, dtype=np.int32)
            before = np.concatenate((np.zeros(1, dtype=np.int32), counted))[bounds[:-1]]
            positions[:] = (counted - np.repeat(before, sizes)) * real - 1
        positions += self._pad_id + 1


def _dummies(tokens: int, longest: int) -> int:
    """How many pieces of at most ``longest`` tokens fill any part of ``tokens``."""
    return -(-tokens // longest)
