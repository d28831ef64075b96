"""Where the pipe's CPU time goes, per document: by thread, by stage, and by function.

    python -m benchmarks.profile_pipe [--documents N] [--no-calls]

The first pass runs undisturbed and gives the times; the second runs under a profiler, which slows everything
that calls much: read it for its order, not for its numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arena import SETTLE_S, Arena, Round, Watched
from benchmarks.documents import Corpus
from benchmarks.paced import stage_seconds
from benchmarks.pipe import HASH
from benchmarks.report import number, table
from benchmarks.scale import FULL


async def profile(arena: Arena, documents: int, calls: bool) -> tuple[Round, dict[str, Any]]:
    """One backlog through an instrumented worker with builtin:hash."""
    topics = await arena.topics("profile")
    worker = Watched(arena, "profile", topics, HASH, {"profile": calls})
    texts = arena.corpus.take(documents)
    try:
        await worker.ready(arena)
        await asyncio.sleep(SETTLE_S)
        await arena.round(worker, texts[: documents // 10])
        await worker.mark()
        done = await arena.round(worker, texts)
        return done, await worker.seen()
    finally:
        worker.stop()


def render(done: Round, seen: dict[str, Any]) -> str:
    """The undisturbed pass."""
    count = done.documents
    stages = [[name, number(s * 1e6 / count)] for name, s in stage_seconds(seen, done).items()]
    threads = [[name, number(s * 1e6 / count)] for name, s in sorted(seen["threads"].items())]
    return "\n\n".join(
        [
            f"{count:,} documents at {number(done.rate)} documents/s",
            table(["stage", "CPU µs/document"], stages),
            table(["thread", "CPU µs/document"], threads),
        ]
    )


def render_calls(title: str, entries: list[tuple[str, int, float]], documents: int) -> str:
    rows = [
        [f"{own * 1e6 / documents:.2f}", f"{calls / documents:.2f}", f"`{function}`"]
        for function, calls, own in entries
    ]
    return f"{title}, under the profiler\n\n" + table(["own µs/document", "calls/document", "function"], rows)


async def run(documents: int, calls: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="inferstream-profile-") as folder:
        arena = Arena(Path(folder), Corpus.load())
        arena.start()
        try:
            done, seen = await profile(arena, documents, calls=False)
            print(render(done, seen), flush=True)
            if calls:
                done, seen = await profile(arena, documents, calls=True)
                print("\n" + render_calls("The event loop", seen["loop_calls"], done.documents))
                # The worker threads were under it from their start: the tenth before the mark counts as well.
                print(
                    "\n" + render_calls("The worker threads", seen["worker_calls"], done.documents * 11 // 10)
                )
        finally:
            arena.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_pipe", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--documents", type=int, default=FULL.profile_documents)
    parser.add_argument("--no-calls", action="store_true", help="without the second pass")
    options = parser.parse_args()
    asyncio.run(run(options.documents, not options.no_calls))


if __name__ == "__main__":
    main()
