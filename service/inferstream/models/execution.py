"""Which way a model runs: packed where that is known to be right and proven at start, else padded.

Both ways are tried on documents of random tokens before the first real one: each has to give what the plain forward
gives of every document alone.  So a model whose attention is not what its files say costs speed and never numbers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from inferstream.device.forward import Forward, run_once
from inferstream.models import packed
from inferstream.models.encoder import Encoder
from inferstream.models.files import one_line
from inferstream.models.packed import PackedForward
from inferstream.models.padded import Mask, PaddedForward, takes_four_dimensions, takes_types
from inferstream.models.pooling import Head
from inferstream.models.positions import most_tokens
from inferstream.models.tokenizer import Tokens
from inferstream.models.warmup import WORDS, cpu_seconds, in_thread

log = logging.getLogger(__name__)

Execution = Literal["packed", "padded"]
Way = PaddedForward | PackedForward

LENGTHS = (5, 12, 12, 1, 23, 2, 12)
"""Tokens of the documents of the trial: equal and different ones, and one token, where mistakes at the ends show."""

LONGEST = 1024
"""Where layers see a window only, a document of four windows shows whether they do; at most so many tokens."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a row may be from the plain forward's, as the length of the difference by the length of the row.

The order of additions differs, so the last bits do: with MiniLM by 1e-6 in float32, 1e-3 in float16 and 1e-2 in
bfloat16, with deeper models by more.  5e-2 is a cosine of 0.999, which is what bfloat16 promises.  Documents
that saw each other were 0.8 apart.
"""

ROUNDS = 3
ENOUGH_S = 1.0
"""How often the two ways are measured, and after how many CPU seconds of a round once is enough."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Documents of random tokens and their rows, float32 [documents, width], from the plain forward of each alone."""

    items: list[Any]
    rows: np.ndarray

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, head: Head, *, pad_id: int = 0, type_ids: bool = False) -> Trial:
        """``model`` as transformers made it; ``head`` on its device."""
        config, device = model.config, model.device
        lengths = [*LENGTHS]
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            lengths.append(min(4 * config.sliding_window, LONGEST))
        limit = most_tokens(config, pad_id) or max(lengths)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        typed = takes_types(model, type_ids=type_ids)
        kinds = getattr(config, "type_vocab_size", None) or 1
        random = np.random.default_rng(0)
        items: list[Any] = []
        rows = []
        for length in lengths:
            ids = random.integers(0, vocabulary, min(length, limit), dtype=np.int32)
            ids[ids == pad_id] = (pad_id + 1) % vocabulary
            types = random.integers(0, kinds, len(ids), dtype=np.int32)
            items.append(Tokens(ids, types) if typed else ids)
            inputs = {"input_ids": ids, "token_type_ids": types} if typed else {"input_ids": ids}
            tensors = {name: torch.from_numpy(row)[None].long().to(device) for name, row in inputs.items()}
            hidden = model(**tensors).last_hidden_state
            rows.append(head(hidden, torch.tensor([len(ids)], device=device))[0].cpu().numpy())
        return cls(items, np.stack(rows))

    def difference(self, forward: Forward, device: torch.device) -> float:
        """The worst row's distance from the plain forward's, relative to its length; inf where it is no number."""
        rows = run_once(forward, self.items, device).cpu().numpy()
        apart = np.linalg.norm(rows - self.rows, axis=1) / np.linalg.norm(self.rows, axis=1)
        return float(apart.max()) if np.isfinite(apart).all() else float("inf")


def forwards(
    model: Any, head: Head, *, pad_id: int = 0, type_ids: bool = False
) -> tuple[PaddedForward, PackedForward | None]:
    """Both ways to run the model on the device it is on; no packed one where it would be wrong.

    Says once in the log why not.  The two share the model: call ``use()`` of the one that is to run.
    """
    head = head.to(model.device)
    trial = Trial.of(model, head, pad_id=pad_id, type_ids=type_ids)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    by_padding = _padded(model, head, trial, tolerance, pad_id, type_ids)
    why = packed.why_not(model)
    if why is not None:
        log.info("documents run padded", extra={"why": why})
        return by_padding, None
    try:
        by_packing = PackedForward(model, head, pad_id=pad_id, type_ids=type_ids)
        apart = trial.difference(by_packing, model.device)
        if apart <= tolerance:
            return by_padding, by_packing
        why = f"packed documents differ from the same alone by {apart:.1e}, more than {tolerance:.0e}"
    except Exception as error:  # a kernel that is not there, a model that is not what its configuration says
        log.debug("the packed trial failed", exc_info=True)
        why = f"the packed trial failed: {type(error).__name__}: {one_line(error)}"
    by_padding.use()
    log.warning("documents run padded, which is slower", extra={"why": why})
    return by_padding, None


def best_forward(model: Any, head: Head, *, pad_id: int = 0, type_ids: bool = False) -> Forward:
    """The way to run the model on a GPU: packed if it can be."""
    by_padding, by_packing = forwards(model, head, pad_id=pad_id, type_ids=type_ids)
    return by_padding if by_packing is None else by_packing


def cpu_encoder(
    model: Any, head: Head, *, pad_id: int = 0, type_ids: bool = False, execution: Execution | None = None
) -> Encoder:
    """The model on a CPU, run the way that measures faster, or as ``execution`` says (packed: if it can be)."""

    def choose() -> Encoder:
        torch.set_num_threads(1)  # as the compute threads: more only wait for each other on a busy machine
        by_padding, by_packing = forwards(model, head, pad_id=pad_id, type_ids=type_ids)
        ways: list[Way] = [by_padding] if by_packing is None else [by_padding, by_packing]
        if len(ways) > 1 and execution is None:
            way = _faster(ways, model.dtype, most_tokens(model.config, pad_id))
        else:
            way = ways[0] if execution == "padded" else ways[-1]
        way.use()
        return Encoder(way, model.dtype, normalizes=head.normalizes)

    return in_thread(choose)


def _padded(
    model: Any, head: Head, trial: Trial, tolerance: float, pad_id: int, type_ids: bool
) -> PaddedForward:
    """With the first mask under which the model gives each document what it gets alone."""
    for mask in (Mask.KEYS, Mask.CAUSAL) if takes_four_dimensions(model) else ():
        try:
            forward = PaddedForward(model, head, pad_id=pad_id, type_ids=type_ids, mask=mask)
            if trial.difference(forward, model.device) <= tolerance:
                return forward
        except Exception:  # a model that works its mask up by itself takes no other than the flat one
            log.debug("a mask of four dimensions does not suit the model", exc_info=True)
    forward = PaddedForward(model, head, pad_id=pad_id, type_ids=type_ids, mask=Mask.FLAT)
    if model.device.type == "cuda":
        log.warning("the model makes its mask by itself: the GPU waits for the host once a batch")
    apart = trial.difference(forward, model.device)
    if apart > tolerance:
        log.warning("a document's vector depends on what it is batched with", extra={"difference": apart})
    return forward


def _faster(ways: Sequence[Way], dtype: torch.dtype, limit: int | None) -> Way:
    """In CPU time of one thread, so that what else runs on the machine matters little."""
    lengths = [2 + words if limit is None else min(2 + words, limit) for words in WORDS]
    items = [np.ones(length, dtype=np.int32) for length in lengths]
    best = [float("inf")] * len(ways)
    encoders = [Encoder(way, dtype) for way in ways]
    for _ in range(ROUNDS):
        for n, (way, encoder) in enumerate(zip(ways, encoders, strict=True)):
            way.use()
            best[n] = min(best[n], cpu_seconds(functools.partial(encoder.run, items)))
        if sum(best) > ENOUGH_S:
            break
    rates = {
        f"{encoder.execution}_tokens_per_s": round(sum(lengths) / spent)
        for encoder, spent in zip(encoders, best, strict=True)
    }
    fastest = best.index(min(best))
    log.info("documents run %s, which measured faster", encoders[fastest].execution, extra=rates)
    return ways[fastest]
