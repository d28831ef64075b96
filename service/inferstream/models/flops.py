"""How many floating-point operations a forward takes, from the model's shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Flops:
    """The matrix products of a transformer: a multiplication and an addition are two operations.

    ``per_token`` are those with weights.  Attention compares a token with every one that it sees and sums over
    them, 2 x width operations each: ``layers`` holds each layer's width and its window (how far a token sees, itself
    included; None: as far as the text goes).  ``causal``: it sees only those before it.

    Norms, activations, the look-up of embeddings and what follows the last layer are not counted, as is usual (PaLM,
    arXiv 2204.02311, appendix B).
    """

    per_token: float
    layers: tuple[tuple[int, int | None], ...]
    causal: bool = False
    of: Callable[[int], float] = field(init=False, compare=False, repr=False)
    """The operations of a piece of so many tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", functools.cache(self._of))

    def _of(self, length: int) -> float:
        pairs = sum(width * self._pairs(length, window) for width, window in self.layers)
        return length * self.per_token + 4.0 * pairs

    def _pairs(self, length: int, window: int | None) -> int:
        """How many pairs of a token and one that it sees there are."""
        reach = length if window is None else min(length, window)
        before = reach * (reach + 1) // 2 + (length - reach) * reach
        return before if self.causal else 2 * before - length


def flops_of(model: Any) -> Flops | None:
    """Of a transformers model; None where its shape does not tell.

    So it is with mixtures of experts (a token goes through some of them), layers that share weights, attention by
    relative positions with products of its own, and weights outside of plain linear layers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config = model.config
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None) is not None:
        return None  # which layers have the window, only the code knows
    kinds = kinds or ["full_attention"] * layers
    if len(kinds) != layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        return None
    if getattr(config, "num_hidden_groups", None) or getattr(config, "relative_attention", False):
        return None
    known: set[int] = set()
    per_token = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            known.add(id(module.weight))
            per_token += 0.0 if "pooler" in name.split(".") else 2.0 * module.weight.numel()
        elif isinstance(module, nn.Embedding):
            known.add(id(module.weight))
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
    if not per_token or any("expert" in name or id(weight) not in known for name, weight in weights):
        return None
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    modules = list(model.modules())
    window = next((found for module in modules if (found := getattr(module, "sliding_window", None))), None)
    causal = getattr(config, "is_causal", True) and any(getattr(m, "is_causal", False) for m in modules)
    return Flops(
        per_token,
        tuple((width, window if kind == "sliding_attention" else None) for kind in kinds),
        bool(causal),
    )
