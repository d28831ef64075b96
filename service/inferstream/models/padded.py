"""Padded execution: documents side by side, filled up to the longest.  Every model can do it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inferstream.device.forward import Shape, run_once
from inferstream.models import attention
from inferstream.models.pooling import Head
from inferstream.models.tokenizer import Tokens


class Mask(Enum):
    """How the model is told what is padding.  The first two are made on the device, in the form the layers use.

    A mask of four dimensions is taken by transformers as it is.  One of two dimensions is worked up by the model, which
    any model can, but most read it back from the device to see whether there is padding at all.
    """

    KEYS = "keys"  # every token sees all of its document
    CAUSAL = "causal"  # every token sees those before it; the padding is behind all of them
    FLAT = "flat"  # int64 [documents, tokens]


LAYERS = frozenset(("full_attention", "sliding_attention"))
"""The kinds of layers of which it is known here who sees whom."""


def takes_four_dimensions(model: Any) -> bool:
    """Whether a mask made here is the model's own for documents of any length, which no short trial can show.

    A configuration that names no kinds of layers and yet a window (Mistral) leaves to the code which layers have it.
    """
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None:
        return getattr(model.config, "sliding_window", None) is None
    return LAYERS.issuperset(kinds) and ("sliding_attention" in kinds) == (_window(model) is not None)


def _window(model: Any) -> int | None:
    """How far a token of the layers with a window sees, itself included; None if all layers see everything.

    From the layers, which all count alike; configurations do not (ModernBERT's leaves the token itself out).
    """
    windows = (getattr(module, "sliding_window", None) for module in model.modules())
    return next((window for window in windows if window), None)


def takes_types(model: Any, *, type_ids: bool) -> bool:
    """Whether the model is given token types always.

    Models with a table of a few types take none for zeros.  For others (XLNet) none and zeros differ, and they get what
    sentence-transformers gives them: types if their tokenizer makes any (``type_ids``).
    """
    wanted = type_ids or bool(getattr(model.config, "type_vocab_size", 0))
    return wanted and "token_type_ids" in inspect.signature(model.forward).parameters


class PaddedForward:
    """A transformer and its head behind :class:`inferstream.device.forward.Forward`, with padding on the right.

    The slab holds, one behind the other, for a shape of n pieces and a longest of S tokens: lengths [n], ids [n, S],
    token types [n, S] if the model has them.

    ``head`` has to be on the model's device.  ``pad_id`` is the model's padding id.  ``type_ids``: the model's
    tokenizer gives token types.  Which ``mask`` suits a model is found out by
    :mod:`inferstream.models.execution`.
    """

    padded = True

    def __init__(
        self, model: Any, head: Head, *, pad_id: int = 0, type_ids: bool = False, mask: Mask = Mask.KEYS
    ) -> None:
        self._model = model
        self._head = head
        self._pad_id = pad_id
        self._attention = model.config._attn_implementation
        self._typed = takes_types(model, type_ids=type_ids)
        self._window = _window(model)
        self.mask = mask
        if model.device.type == "cuda":
            attention.without_plans()
        self.width = run_once(self, [np.zeros(1, dtype=np.int32)], model.device).shape[1]

    def use(self) -> None:
        """Make the model attend as this forward needs it: its weights may be shared with another one."""
        if self._model.config._attn_implementation != self._attention:
            self._model.set_attn_implementation(self._attention)

    def slab_size(self, max_tokens: int, max_items: int) -> int:
        return max_items + (2 if self._typed else 1) * max_tokens

    def shape(self, lengths: Sequence[int]) -> Shape:
        return Shape(len(lengths), len(lengths) * max(lengths), max(lengths))

    def pack(self, items: Sequence[Any], slab: np.ndarray, capacity: Shape | None = None) -> Shape:
        sizes = [len(item) for item in items]
        shape = capacity or self.shape(sizes)
        lengths, ids, types = self._parts(slab, shape)
        lengths[: len(items)] = sizes
        lengths[len(items) :] = 1  # dummies: a document without any token would see nothing, which is NaN
        ids[:] = self._pad_id
        if types is not None:
            types[:] = 0
        for row, item in enumerate(items):
            if isinstance(item, Tokens):
                if types is not None:
                    types[row, : len(item)] = item.types
                item = item.ids
            ids[row, : len(item)] = item
        return shape

    @torch.inference_mode()
    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        lengths, ids, types = self._parts(slab, shape)
        inputs: dict[str, Any] = {"input_ids": ids.long()}  # not every model takes int32
        if types is not None:
            inputs["token_type_ids"] = types.long()
        # On a CPU the lengths are at hand, and attention without a mask is the faster one.
        if slab.device.type != "cpu" or int(lengths.numpy().min()) < shape.longest:
            inputs["attention_mask"] = self._mask(lengths, shape.longest)
        hidden: Tensor = self._model(**inputs).last_hidden_state
        return self._head(hidden, lengths)

    def _parts(self, slab: Any, shape: Shape) -> tuple[Any, Any, Any]:
        """Lengths, ids and types (None if the model has none) in the slab, an array or a tensor."""
        count, longest = shape.count, shape.longest
        at = count + count * longest
        ids = slab[count:at].reshape(count, longest)
        types = slab[at : at + count * longest].reshape(count, longest) if self._typed else None
        return slab[:count], ids, types

    def _mask(self, lengths: Tensor, longest: int) -> Tensor | dict[str, Tensor]:
        """The attention mask, or one for each kind of layer where some see a window only."""
        positions = torch.arange(longest, device=lengths.device)
        real = positions < lengths[:, None]
        if self.mask is Mask.FLAT:
            return real.long()
        behind = positions[:, None] - positions
        seen = real[:, None, None, :] if self.mask is Mask.KEYS else (behind >= 0)[None, None]
        if self._window is None:
            return self._as_attention_takes_it(seen)
        near = (behind.abs() if self.mask is Mask.KEYS else behind) < self._window
        return {
            "full_attention": self._as_attention_takes_it(seen),
            "sliding_attention": self._as_attention_takes_it(seen & near),
        }

    def _as_attention_takes_it(self, seen: Tensor) -> Tensor:
        """Bool for PyTorch's attention; models that compute it by themselves add the mask to the scores."""
        if self._attention != "eager":
            return seen
        added = torch.zeros(seen.shape, dtype=self._model.dtype, device=seen.device)
        return added.masked_fill(~seen, torch.finfo(self._model.dtype).min)
