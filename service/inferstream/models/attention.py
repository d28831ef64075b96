"""Attention over packed documents: one row of tokens, and each document attends to itself alone.

transformers lets an attention function be registered under a name and passes it whatever keyword arguments the model's
forward was given, down to every layer.  Ours is registered with no mask function, so the models build no mask at all
(``masking_utils``: a name without one gets None); where a document begins and ends comes in ``packing``.

On CUDA this is PyTorch's variable-length flash attention.  On a CPU, which has no such kernel, documents of equal
length that lie side by side are one call of the ordinary attention, and everything around it is the same code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

PACKED = "inferstream_packed"
"""Our name among the attention implementations of transformers."""


@dataclass(slots=True)
class Packing:
    """Where the documents lie in a packed row of T tokens.

    ``bounds``: int32 [documents + 1] on the model's device, the documents' first tokens and T; equal neighbours are
    documents of no token.  ``longest``: an upper bound of their lengths.  ``runs``: first token, how many documents,
    and their equal length, for each run of them; known on the host, so on a CPU only.
    """

    bounds: Tensor
    longest: int
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    bands: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)


def equal_runs(bounds: np.ndarray) -> list[tuple[int, int, int]]:
    """The ``runs`` of :class:`Packing` for ``bounds``, int32 [documents + 1]."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in np.diff(bounds).tolist():
        if not length:
            continue
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
        start += length
    return runs


def install() -> None:
    """Register the function with transformers under :data:`PACKED`; again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query`` [1, heads, T, head width], ``key`` and ``value`` likewise → ([1, T, heads, head width], None).

    ``sliding_window`` counts the token itself: a token sees ``sliding_window - 1`` tokens before it and, unless the
    model is causal, as many behind it.
    """
    causal = is_causal(module)
    attend = _attend_cpu if query.device.type == "cpu" else _attend_cuda
    return attend(query, key, value, packing, scaling, sliding_window, causal), None


def is_causal(module: nn.Module) -> bool:
    """Whether a layer's tokens see only those before them; a configuration may make a causal model look both ways."""
    return bool(getattr(module, "is_causal", False)) and bool(
        getattr(getattr(module, "config", None), "is_causal", True)
    )


def _attend_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool,
) -> Tensor:
    heads = query.shape[1]
    key, value = _for_each_head(key, heads), _for_each_head(value, heads)
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, head width] each
    parts: list[Tensor] = []
    for start, count, length in packing.runs:
        q, k, v = (
            row[start : start + count * length].view(count, length, heads, -1).transpose(1, 2) for row in rows
        )
        band = None
        if sliding_window is not None and sliding_window < length:
            band = _band(packing, length, sliding_window, causal)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=causal and band is None, scale=scaling
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _band(packing: Packing, length: int, sliding_window: int, causal: bool) -> Tensor:
    """Bool [length, length]: which tokens a token sees; made once per batch, for all layers of one kind."""
    kind = (length, sliding_window, causal)
    if kind not in packing.bands:
        positions = torch.arange(length)
        behind = positions[:, None] - positions
        seen = behind.abs() < sliding_window
        packing.bands[kind] = seen & (behind >= 0) if causal else seen
    return packing.bands[kind]


def _attend_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool,
) -> Tensor:
    attend, grouped = _varlen()
    heads = query.shape[1]
    options: dict[str, Any] = {}
    if grouped:
        options["enable_gqa"] = key.shape[1] < heads
    else:
        key, value = _for_each_head(key, heads), _for_each_head(value, heads)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, head width] each
    left = -1 if sliding_window is None else sliding_window - 1
    # The same object for both sides: it tells the kernel that keys lie as the queries do.
    bounds, longest = packing.bounds, packing.longest
    out: Tensor = attend(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0 if causal else left),
        **options,
    )
    return out[None]


def _for_each_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values [1, fewer heads, T, head width], each repeated for the query heads that share it."""
    fewer = tensor.shape[1]
    if fewer == heads:
        return tensor
    return tensor[:, :, None].expand(-1, -1, heads // fewer, -1, -1).flatten(1, 2)


@functools.cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """PyTorch's variable-length attention, and whether it takes fewer key heads than query heads (2.12 does)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def without_plans() -> None:
    """Keep cuDNN out of attention in this process.

    It builds an execution plan for every new shape (pytorch/pytorch#155958), which takes hundreds of milliseconds on
    the host (modelscope/FunASR#3704 measured 440), and packed batches hardly ever have the shape of one before.  The
    flash kernels take any shape.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
