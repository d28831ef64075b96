"""The device stage alone, in a process of its own.  ``python -m benchmarks.engine JSON``.

First line on stdout: its rate on a few documents, and how many documents its rounds take.  Then one line for
each SIGUSR1: a round from text in memory to outputs, tokenising included.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks.documents import Corpus
from inferstream.codec import Codec
from inferstream.models.loading import load
from inferstream.settings import cores, device_kind, load_settings, resolve
from inferstream.tools.bench import Engine

CALIBRATION = 400


async def serve(options: dict[str, Any]) -> None:
    loaded = load_settings([Path(options["config"])], environ={}, require=False)
    settings = resolve(loaded.settings, device_kind(loaded.settings), cores())
    codec = Codec.from_settings(settings)
    model = load(settings, codec.embedding)
    engine = Engine(settings, model.task, model.device)
    corpus = Corpus(options["corpus"])
    calibration = await engine.run(corpus.take(CALIBRATION))
    rate = calibration.documents_per_s
    count = int(min(options["most"], max(options["least"], rate * options["seconds"])))
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)
    _say(
        {
            "rate": rate,
            "documents": count,
            "compute_threads": model.device.lanes,
            "batch_max_tokens": settings.batch.max_tokens,
            "costs": asdict(model.costs),
        }
    )
    texts = corpus.take(count)
    while True:
        await told.wait()
        told.clear()
        measured = await engine.run(texts)
        _say(
            asdict(measured)
            | {
                "rate": measured.documents_per_s,
                "tokens_per_s": measured.tokens_per_s,
                "padding_efficiency": measured.padding_efficiency,
                "cpu_us": measured.cpu_us_per_document(),
            }
        )


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    asyncio.run(serve(given | {"corpus": json.loads(Path(given["texts"]).read_bytes())}))
