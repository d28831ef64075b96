"""Draws how the stages of a worker overlap: `inferstream run --trace` on a real Kafka, a few seconds of it.

python -m benchmarks.timeline docs/timeline.png
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.arena import SETTLE_S, Arena, Ours
from benchmarks.documents import Corpus
from benchmarks.machine import hardware
from benchmarks.scale import MODEL
from inferstream.tools.plot import draw

DOCUMENTS = 700


async def trace(arena: Arena, file: Path) -> None:
    topics = await arena.topics("timeline")
    worker = Ours(arena, "timeline", topics, {"model": {"id": MODEL}}, ["--trace", str(file)])
    try:
        await worker.ready(arena)
        await asyncio.sleep(SETTLE_S)
        await arena.round(worker, arena.corpus.take(DOCUMENTS))
    finally:
        worker.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timeline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="inferstream-timeline-") as folder:
        arena = Arena(Path(folder), Corpus.load())
        arena.start()
        try:
            asyncio.run(trace(arena, Path(folder) / "trace.json"))
        finally:
            arena.stop()
        machine = hardware()
        title = f"all-MiniLM-L6-v2 in float32, Kafka to Kafka, {machine['cores']} cores of {machine['cpu']}"
        draw(Path(folder) / "trace.json", options.picture, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
