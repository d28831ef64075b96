"""infinity-emb's engine behind the loop of :mod:`benchmarks.naive`.  ``python -m benchmarks.peers.infinity JSON``.

Runs in the environment of ``infinity.txt``: of this project it may import only what needs nothing that is not in there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from infinity_emb import AsyncEmbeddingEngine, EngineArgs

from benchmarks.naive import Computed, serve

WARM_UP = ["warm up " * n for n in (1, 8, 64, 256)]


async def main(options: dict[str, Any]) -> None:
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=options["model"],
            engine="torch",
            device="cpu",
            dtype=options["dtype"],
            batch_size=options["batch_size"],
            lengths_via_tokenize=options["lengths_via_tokenize"],
            bettertransformer=False,  # slower on a CPU than SDPA, and it needs older transformers
            model_warmup=False,  # with 512 tokens, which this model does not take
        )
    )

    async def embed(texts: list[str]) -> Sequence[np.ndarray]:
        vectors, _ = await engine.embed(texts)
        return vectors

    await engine.astart()
    await embed(WARM_UP * options["batch_size"])
    [model] = engine._model_replicas  # the engine shows it nowhere
    await serve(options, embed, Computed(model))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
