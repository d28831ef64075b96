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
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.machine import hardware, versions
from benchmarks.report import Goal, Section, number, table
from benchmarks.scale import FULL, SHORT
from inferstream.device import Device
from inferstream.device.cpu import CpuDevice
from inferstream.documents import Document, Prepared, Rejected
from inferstream.settings import load_settings, resolve
from inferstream.tasks import ModelInfo
from inferstream.tools.bench import Engine

SEED = 0
VOCABULARY = 8192
LOAD_S = 0.5
FEW = 5  # documents, of the usual comparison; more weigh the first load less, which nothing can hide
ROUNDS = 1  # waiting takes the same time in every one
GOAL = 1.05


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
    task: LossTask, device: Device, tokens: int, threads: int, documents: int
) -> tuple[float, float]:
    """Seconds in all, and those of the model alone, with ``threads`` loading at a time."""
    flags = {"prepare.threads": threads, "batch.max_tokens": tokens, "model.id": "builtin:hash"}
    settings = resolve(load_settings((), {}, flags, require=False).settings, "hash", 2)
    engine = Engine(settings, task, device, chunk_documents=1)
    measured = await engine.run([""] * documents)
    engine.close()
    return measured.seconds, measured.busy_s


def run(documents: int, rounds: int = ROUNDS) -> Section:
    runner = LossRunner()
    runner.enter_thread()
    tokens = tokens_that_take(runner, LOAD_S)
    task = LossTask(LOAD_S, tokens)
    section = Section("Documents that take time to load")
    rows = []
    for count in (FEW, documents):
        apart = [one_after_the_other(task, runner, count) for _ in range(rounds)]
        alone_s = statistics.median(seconds for seconds, _ in apart)
        for threads in (1, 2, 4):
            done = [
                asyncio.run(through_the_stages(task, CpuDevice(runner, 1), tokens, threads, count))
                for _ in range(rounds)
            ]
            seconds = statistics.median(seconds for seconds, _ in done)
            # The first document has to be loaded and the last one to be computed, whatever overlaps.
            compute = statistics.median(busy_s / count for _, busy_s in done)
            waves = -(-count // threads)
            bound = max(LOAD_S + count * compute, waves * LOAD_S + compute)
            rows.append(
                [
                    f"{count}",
                    f"{threads}",
                    number(seconds),
                    number(bound),
                    f"{seconds / bound:.3f}",
                    f"{alone_s / seconds:.2f} x",
                ]
            )
            if count == documents:
                section.goals.append(
                    Goal(f"time / bound, {threads} loading", seconds / bound, GOAL, at_least=False)
                )
        rows.append([f"{count}", "one after the other", number(alone_s), "", "", "1"])
    head = [
        "documents",
        "loading at a time",
        "seconds",
        "bound",
        "of the bound",
        "against one after the other",
    ]
    section.text += [
        table(head, rows),
        f"The loss of a causal model on documents of {tokens:,} tokens that take {LOAD_S} s to load and about as long "
        "to compute. Bound: the larger of loading and computing, and what nothing can overlap: the first load "
        "and the last computation.",
    ]
    return section


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefetch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--short", action="store_true", help="fewer documents, one round")
    options = parser.parse_args()
    section = run(SHORT.prefetch_documents) if options.short else run(FULL.prefetch_documents)
    print(section.markdown())
    print("\n" + ", ".join(f"{name} {value}" for name, value in (hardware() | versions()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
