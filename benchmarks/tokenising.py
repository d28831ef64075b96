"""Where tokenising runs: in threads that share one tokenizer, or in processes; and what reading out the ids costs.

    python -m benchmarks.tokenising [--docs]      # a minute on two cores; --docs writes the table into docs/cpu.md

The texts go in chunks as a worker prepares them, cut to the model's length, and come out as one int32 array each.
All ways give the same arrays.  The ratios are medians over rounds in which each way has its turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer

from benchmarks.documents import Corpus
from benchmarks.machine import hardware
from benchmarks.publish import replace_marked
from benchmarks.report import Section, Spread, median_ratio, number, table
from benchmarks.scale import MODEL
from inferstream.models.files import locate
from inferstream.models.tokenizer import TextTokenizer
from inferstream.pipeline import CHUNK_BYTES, CHUNK_RECORDS

MAX_LENGTH = 256
DOCUMENTS = 4_000
ROUNDS = 7

Chunk = list[str]
Way = Callable[[list[Chunk]], list[list[np.ndarray]]]
_tokenizer: TextTokenizer | None = None


def tokenizer() -> TextTokenizer:
    """This process's tokenizer."""
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = TextTokenizer(Tokenizer.from_file(str(locate(MODEL).folder / "tokenizer.json")))
    return _tokenizer


def chunks_of(texts: Sequence[str]) -> list[Chunk]:
    """The texts in chunks as large as those that a worker prepares."""
    chunks: list[Chunk] = []
    size = 0
    for text in texts:
        if not chunks or len(chunks[-1]) == CHUNK_RECORDS or size + len(text) > CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(text)
        size += len(text)
    return chunks


def rows_of(chunk: Chunk) -> list[np.ndarray]:
    """As the ``embed`` task prepares: encode, cut what is too long, one array per text."""
    own = tokenizer()
    rows = []
    for ids in own.encode(chunk, MAX_LENGTH):
        rows.append(own.item(own.truncate(ids, MAX_LENGTH) if len(ids) > MAX_LENGTH else ids))
    return rows


def ids_only(chunk: Chunk) -> int:
    """The same without truncation and arrays: tokenise, and read out the ids as Python lists."""
    return sum(map(len, tokenizer().encode(chunk, MAX_LENGTH)))


@contextmanager
def ways(workers: int) -> Iterator[dict[str, Way]]:
    """What is compared; each gives the rows of every chunk, in order."""
    context = get_context("spawn")  # as a process with threads and CUDA must
    with (
        ThreadPoolExecutor(workers) as threads,
        ProcessPoolExecutor(workers, mp_context=context) as processes,
    ):
        yield {
            "1 thread": lambda chunks: [rows_of(chunk) for chunk in chunks],
            f"{workers} threads": lambda chunks: list(threads.map(rows_of, chunks)),
            f"{workers} processes": lambda chunks: list(processes.map(rows_of, chunks)),
        }


def rates(chunks: list[Chunk], rounds: int, workers: int) -> dict[str, list[float]]:
    """Tokens per second of each way in each round; one round before them is not counted."""
    found: dict[str, list[float]] = {}
    with ways(workers) as all_ways:
        for turn in range(rounds + 1):
            for name, way in all_ways.items():
                started = time.perf_counter()
                rows = way(chunks)
                seconds = time.perf_counter() - started
                if turn:
                    found.setdefault(name, []).append(
                        sum(len(row) for each in rows for row in each) / seconds
                    )
    return found


def list_share(chunks: list[Chunk], rounds: int) -> list[float]:
    """The share of a thread's time that truncating and filling arrays from lists takes, in each round."""
    shares = []
    for _ in range(rounds):
        cpu_s = {ids_only: 0.0, rows_of: 0.0}
        for chunk in chunks:  # one beside the other: what slows the machine down for a while slows both
            for step in cpu_s:
                started = time.thread_time()
                step(chunk)
                cpu_s[step] += time.thread_time() - started
        shares.append(1 - cpu_s[ids_only] / cpu_s[rows_of])
    return shares


def section_of(found: dict[str, list[float]], shares: list[float]) -> Section:
    first = next(iter(found.values()))
    rows = [
        [
            name,
            number(Spread.of(values).median),
            Spread.of(values).range,
            number(median_ratio(values, first)),
        ]
        for name, values in found.items()
    ]
    section = Section("Where tokenising runs")
    section.text += [
        table(["tokenising", "tokens/s", "lowest – highest", "/ 1 thread"], rows),
        f"{DOCUMENTS:,} documents cut to {MAX_LENGTH} tokens, medians of {len(first)} rounds. Of a thread's time, "
        f"{statistics.median(shares):.1%} ({min(shares):.1%} – {max(shares):.1%}) goes into arrays made from lists "
        f"of ids; that is all that filling a slab without lists could save. {hardware()['cpu']}, "
        f"{hardware()['cores']} cores.",
    ]
    return section


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenising", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/cpu.md, too")
    options = parser.parse_args()
    chunks = chunks_of(Corpus.load().take(DOCUMENTS))
    section = section_of(rates(chunks, ROUNDS, os.cpu_count() or 1), list_share(chunks, ROUNDS))
    print(section.markdown())
    if options.docs:
        replace_marked("docs/cpu.md", "TOKENISING", section.body())


if __name__ == "__main__":
    main()
