"""Documents that take time to load, one after the other and through the stages of the worker.

    python -m benchmarks.prefetch [--short]

The comparison that is made for prefetching pipelines: the loss of a causal language model on each document,
where a document first has to be fetched from somewhere (here: a wait, as for a disk or a network) and then takes
the model about as long.  One after the other costs load + compute for each; a pipeline can come down to
the larger of the two, and below it only by loading several documents at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.machine import hardware, versions
from benchmarks.report import Goal, Section, Spread, number, round_ratios, table
from benchmarks.scale import FULL, SHORT
from inferstream.device.cpu import CpuDevice
from inferstream.documents import Document, Prepared, Rejected
from inferstream.settings import load_settings, resolve
from inferstream.tasks import ModelInfo
from inferstream.tools.bench import Engine

SEED = 0
VOCABULARY = 8192
LOAD_S = 0.5
FEW = 5  # documents, of the usual comparison; more weigh the first load less, which nothing can hide
GOAL = 1.05
HEADLINE = 1.58  # times as fast as one after the other: what the usual comparison is known for


@dataclass(frozen=True, slots=True)
class Way:
    """``loading`` documents at a time; ``queue`` of those loaded may wait, None for the worker's own bound."""

    loading: int
    queue: int | None = None

    @property
    def name(self) -> str:
        queued = "" if self.queue is None else f", a queue of {self.queue}"
        return f"{self.loading} loading{queued}"

    def bound_s(self, documents: int, compute_s: float) -> float:
        """What nothing can beat that takes ``compute_s`` for a document: the first has to be loaded and the last one to
        be computed, whatever overlaps.
        """
        waves = -(-documents // self.loading)
        return max(LOAD_S + documents * compute_s, waves * LOAD_S + compute_s)


USUAL = Way(1, queue=2)
MORE = (Way(1), Way(2), Way(4))


class LossTask:
    """Loads documents (a wait of ``load_s`` each) and gives their losses."""

    name = "loss"

    def __init__(self, load_s: float, tokens: int) -> None:
        self.model = ModelInfo("random GPT-2", "0", "float32")
        self._load_s = load_s
        self._tokens = tokens

    def prepare(self, documents: Sequence[Document]) -> list[Prepared | Rejected]:
        prepared: list[Prepared | Rejected] = []
        for document in documents:
            time.sleep(self._load_s)
            ids = np.random.default_rng(int(document.id)).integers(
                0, VOCABULARY, self._tokens, dtype=np.int32
            )
            prepared.append(Prepared(document, (ids,), (self._tokens,), False, ids.nbytes))
        return prepared

    def output(self, prepared: Prepared, rows: np.ndarray) -> dict[str, Any]:
        return {"loss": float(rows[0, 0])}


class LossRunner:
    """The mean loss of each document's next tokens, shape [documents, 1]."""

    padded = False

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=2048,
            n_embd=512,
            n_layer=6,
            n_head=8,
            bos_token_id=None,
            eos_token_id=None,
        )
        self._model = GPT2LMHeadModel(config).eval()  # type: ignore[no-untyped-call]  # transformers' own

    def enter_thread(self) -> None:
        torch.set_num_threads(1)

    def run(self, items: Sequence[np.ndarray]) -> np.ndarray:
        losses = []
        with torch.inference_mode():
            for ids in items:
                tokens = torch.from_numpy(ids.astype(np.int64))
                logits = self._model(tokens[None]).logits[0]
                losses.append([float(cross_entropy(logits[:-1], tokens[1:]))])
        return np.array(losses, dtype=np.float32)


def tokens_that_take(runner: LossRunner, seconds: float) -> int:
    """How long a document must be for the model to take so long."""
    tokens = 256
    while True:
        taken = compute_s(runner, tokens)
        if abs(taken / seconds - 1) < 0.05 or tokens >= 2048:
            return tokens
        tokens = min(2048, max(16, round(tokens * seconds / taken)))


def compute_s(runner: LossRunner, tokens: int) -> float:
    """Median seconds of the model for one document."""
    ids = np.zeros(tokens, dtype=np.int32)
    runner.run([ids])
    took = []
    for _ in range(3):
        started = time.perf_counter()
        runner.run([ids])
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def one_after_the_other(task: LossTask, runner: LossRunner, documents: int) -> tuple[float, float]:
    """Seconds in all, and those of the model alone."""
    computed = 0.0
    started = time.perf_counter()
    for n in range(documents):
        (prepared,) = task.prepare([Document(str(n), "")])
        assert isinstance(prepared, Prepared)
        before = time.perf_counter()
        rows = runner.run(prepared.chunks)
        computed += time.perf_counter() - before
        task.output(prepared, rows)
    return time.perf_counter() - started, computed


async def through_the_stages(
    task: LossTask, runner: LossRunner, way: Way, tokens: int, documents: int
) -> float:
    """Seconds in all."""
    flags: dict[str, Any] = {
        "prepare.threads": way.loading,
        "batch.max_tokens": tokens,
        "model.id": "builtin:hash",
    }
    if way.queue is not None:
        # One document is loaded and one computed beside those that wait.
        flags["buffer.max_documents"] = way.queue + 2
    settings = resolve(load_settings((), {}, flags, require=False).settings, "hash", 2)
    engine = Engine(settings, task, CpuDevice(runner, 1), chunk_documents=1)
    measured = await engine.run([""] * documents)
    await asyncio.to_thread(engine.close)
    return measured.seconds


@dataclass(frozen=True, slots=True)
class Compared:
    """A way beside one document after the other, round by round, in seconds.

    ``bounds`` are from the computing that the run one after the other did: what a pipeline adds to computing is its
    own, and must not move its bound.
    """

    apart: list[float]
    took: list[float]
    bounds: list[float]

    @property
    def speed_up(self) -> Spread:
        return Spread.of(round_ratios(self.apart, self.took))

    @property
    def most(self) -> float:
        """The speed-up at the bound."""
        return statistics.median(round_ratios(self.apart, self.bounds))

    @property
    def of_bound(self) -> list[float]:
        return round_ratios(self.took, self.bounds)


def compare(
    task: LossTask, runner: LossRunner, ways: Sequence[Way], tokens: int, documents: int, rounds: int
) -> dict[Way, Compared]:
    """In each round one after the other, and then each of the ways."""
    found = {way: Compared([], [], []) for way in ways}
    for _ in range(rounds):
        apart_s, computed_s = one_after_the_other(task, runner, documents)
        for way, compared in found.items():
            compared.apart.append(apart_s)
            compared.took.append(asyncio.run(through_the_stages(task, runner, way, tokens, documents)))
            compared.bounds.append(way.bound_s(documents, computed_s / documents))
    return found


def run(few_rounds: int, documents: int, rounds: int) -> Section:
    runner = LossRunner()
    runner.enter_thread()
    tokens = tokens_that_take(runner, LOAD_S)
    task = LossTask(LOAD_S, tokens)
    usual = compare(task, runner, [USUAL], tokens, FEW, few_rounds)
    more = compare(task, runner, MORE, tokens, documents, rounds)
    return section_of({FEW: usual, documents: more}, tokens)


def section_of(found: Mapping[int, Mapping[Way, Compared]], tokens: int) -> Section:
    """``found``: by number of documents; the usual comparison first."""
    section = Section("Documents that take time to load")
    rows = []
    for documents, ways in found.items():
        for way, compared in ways.items():
            speed_up, of_bound = compared.speed_up, Spread.of(compared.of_bound)
            if way == USUAL:
                ratios = round_ratios(compared.apart, compared.took)
                name = f"speed-up of {documents} documents, {way.name}"
                section.goals.append(Goal.of_rounds(name, ratios, HEADLINE, at_least=True))
            else:
                name = f"time / bound, {way.name}"
                section.goals.append(Goal.of_rounds(name, compared.of_bound, GOAL, at_least=False))
            rows.append(
                [
                    f"{documents}",
                    way.name,
                    f"{number(statistics.median(compared.took))}",
                    f"{number(statistics.median(compared.bounds))}",
                    f"{of_bound.median:.3f} ({of_bound.range})",
                    f"{speed_up.median:.2f} x ({speed_up.range})",
                    f"{compared.most:.2f} x",
                ]
            )
        apart = next(iter(ways.values())).apart
        rows.append(
            [f"{documents}", "one after the other", number(statistics.median(apart)), "", "", "1", ""]
        )
    head = [
        "documents",
        "",
        "seconds",
        "bound",
        "of the bound",
        "against one after the other",
        "at the bound",
    ]
    counts = ", ".join(
        f"{len(next(iter(ways.values())).took)} rounds of {documents} documents"
        for documents, ways in found.items()
    )
    section.text += [
        table(head, rows),
        f"The loss of a causal model on documents of {tokens:,} tokens that take {LOAD_S} s to load and about as long "
        "to compute. Bound: the larger of loading and computing, and what nothing can overlap: the first load "
        "and the last computation; the time of computing is that of the run one after the other, in the same round. "
        f"Medians of {counts}, in brackets lowest – highest. {FEW} documents and a queue of 2 is the comparison that "
        f"{HEADLINE} x is known from.",
    ]
    section.data = {
        f"{documents} documents": {way.name: asdict(compared) for way, compared in ways.items()}
        for documents, ways in found.items()
    }
    return section


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefetch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--short", action="store_true", help="fewer documents and rounds")
    options = parser.parse_args()
    scale = SHORT if options.short else FULL
    section = run(scale.rounds, scale.prefetch_documents, scale.prefetch_rounds)
    print(section.markdown())
    print("\n" + ", ".join(f"{name} {value}" for name, value in (hardware() | versions()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
