"""From token vectors to one vector per text, as the model's sentence-transformers files say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inferstream.errors import ModelError
from inferstream.models.files import read_json

LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The boolean keys of older files, in the order in which several modes are concatenated."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": functional.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": functional.silu,
}


@dataclass(frozen=True, slots=True)
class Head:
    """What follows the transformer: pooling modes, then steps on the pooled vectors, all in float32.

    ``truncate_dim`` keeps the first so many dimensions of the end.  ``normalizes``: the result has unit
    length.  Nothing here waits for the device: no size depends on a value.
    """

    modes: tuple[str, ...] = ("mean",)
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    normalizes: bool = False
    truncate_dim: int | None = None

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """``hidden`` [texts, tokens, width], right-padded; ``lengths`` [texts] → [texts, width]."""
        return self._finish([pool(mode, hidden, lengths) for mode in self.modes])

    def packed(self, hidden: Tensor, bounds: Tensor, count: int) -> Tensor:
        """``hidden`` [T, width] of texts one behind the other; ``bounds`` as in :func:`pool_packed` → the first
        ``count`` of them, [count, width].
        """
        return self._finish([pool_packed(mode, hidden, bounds)[:count] for mode in self.modes])

    def to(self, device: torch.device) -> Head:
        """The same head with its weights on the device."""
        steps = tuple(step.to(device) if isinstance(step, Dense) else step for step in self.steps)
        return replace(self, steps=steps)

    def _finish(self, pooled: list[Tensor]) -> Tensor:
        vectors = torch.cat(pooled, dim=-1)
        for step in self.steps:
            vectors = step(vectors)
        return vectors[:, : self.truncate_dim]


def pool(mode: str, hidden: Tensor, lengths: Tensor) -> Tensor:
    """One vector per text in float32, shape [texts, width], whatever stands in the padding."""
    if mode == "cls":
        return hidden[:, 0].float()
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    hidden = hidden.float()
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    padding = (positions >= lengths[:, None])[:, :, None]
    if mode == "max":
        return hidden.masked_fill(padding, float("-inf")).amax(dim=1)
    # Filled, not multiplied by a mask: what stands in the padding need not be finite, and NaN * 0 is NaN.
    hidden = hidden.masked_fill(padding, 0.0)
    if mode == "weightedmean":
        hidden = hidden * (positions + 1.0)[:, None]
    return hidden.sum(dim=1) / _divisors(mode, lengths)


def pool_packed(mode: str, hidden: Tensor, bounds: Tensor) -> Tensor:
    """One vector per text in float32, shape [texts, width], from ``hidden`` [T, width].

    ``bounds`` int32 [texts + 1] are the texts' first tokens and T.  A text of no token gets a vector that means
    nothing.
    """
    tokens = len(hidden)
    starts, ends = bounds[:-1], bounds[1:]
    if mode == "cls":
        return hidden.index_select(0, starts.clamp(max=tokens - 1)).float()
    if mode == "lasttoken":
        return hidden.index_select(0, (ends - 1).clamp(min=0)).float()
    hidden = hidden.float().contiguous()
    index = torch.arange(tokens, dtype=bounds.dtype, device=hidden.device)
    if mode == "weightedmean":
        text = torch.searchsorted(ends, index, right=True, out_int32=True).clamp(max=len(ends) - 1)
        hidden = hidden * (index - starts.index_select(0, text) + 1.0)[:, None]
    # A bag is a text's tokens in order: sums without atomics, so the same in every run, and a value that is
    # not finite stays in its own text.
    kind = "max" if mode == "max" else "sum"
    bags = functional.embedding_bag(index, hidden, bounds, mode=kind, include_last_offset=True)
    return bags if mode == "max" else bags / _divisors(mode, ends - starts)


def _divisors(mode: str, lengths: Tensor) -> Tensor:
    """What the sum of a text's tokens is divided by, float32 [texts, 1]."""
    counts = lengths[:, None].float()
    if mode == "mean":
        return counts
    if mode == "mean_sqrt_len_tokens":
        return counts.sqrt()
    if mode == "weightedmean":
        return counts * (counts + 1) / 2
    raise ValueError(mode)


def load_head(folder: Path, modules: list[dict[str, Any]], truncate_dim: int | None) -> Head:
    """Read the modules after the transformer.  Raises ModelError naming what is not supported."""
    modes: tuple[str, ...] | None = None
    steps: list[Callable[[Tensor], Tensor]] = []
    normalizes = False
    for module in modules:
        kind = str(module["type"])
        name = kind.rsplit(".", 1)[-1]
        path = folder / str(module.get("path", ""))
        if not kind.startswith("sentence_transformers."):
            raise ModelError(f"the model needs code of its own ({kind}), which is never run")
        if name == "Pooling" and modes is None and not steps:
            modes = _modes(read_json(path / "config.json"), path)
        elif name == "Normalize":
            _only_sentence_embedding(read_json(path / "config.json", missing={}), kind)
            steps.append(_normalize)
            normalizes = True
        elif name == "Dense":
            steps.append(_dense(path))
            normalizes = False
        elif name != "Dropout":
            raise ModelError(f"the model's module {kind} is not supported")
    if modes is None:
        raise ModelError("the model has no pooling module")
    return Head(modes, tuple(steps), normalizes and truncate_dim is None, truncate_dim)


def _modes(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    found = config.get("pooling_mode")
    if found is None:
        found = [mode for key, mode in LEGACY_MODES.items() if config.get(key)] or ["mean"]
    modes = (found,) if isinstance(found, str) else tuple(found)
    for mode in modes:
        if mode not in LEGACY_MODES.values():
            raise ModelError(f"the pooling mode {mode!r} of {path} is not supported")
    return modes


def pools_prompt(folder: Path, modules: list[dict[str, Any]]) -> bool:
    """Whether the tokens of a prompt are pooled as well (they are, unless the model says otherwise)."""
    paths = [folder / str(m.get("path", "")) for m in modules if str(m["type"]).endswith(".Pooling")]
    return all(read_json(path / "config.json").get("include_prompt", True) for path in paths)


def _normalize(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, p=2.0, dim=-1)


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer and its activation; ``weight`` [out, in] and ``bias`` [out] are float32."""

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.activation(functional.linear(vectors, self.weight, self.bias))

    def to(self, device: torch.device) -> Dense:
        bias = None if self.bias is None else self.bias.to(device)
        return Dense(self.weight.to(device), bias, self.activation)


def _dense(path: Path) -> Dense:
    config = read_json(path / "config.json")
    kind = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = ACTIVATIONS.get(kind.rsplit(".", 1)[-1]) if kind.startswith("torch.nn.") else None
    if activation is None:
        raise ModelError(f"the activation {kind} of {path} is not supported")
    if config.get("use_residual"):
        raise ModelError(f"use_residual of {path} is not supported")
    _only_sentence_embedding(config, str(path))
    if not (path / "model.safetensors").is_file():
        raise ModelError(f"{path} has no model.safetensors; other weight files are never loaded")
    from safetensors.torch import load_file

    weights = load_file(path / "model.safetensors")
    bias = weights["linear.bias"].float() if config.get("bias", True) else None
    return Dense(weights["linear.weight"].float(), bias, activation)


def _only_sentence_embedding(config: dict[str, Any], where: str) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelError(f"{key} {config[key]!r} of {where} is not supported")
