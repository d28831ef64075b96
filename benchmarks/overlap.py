"""What each part of the device stage is worth on this machine: all of it, and each part left out in turn.

    python -m benchmarks.overlap [--short]

From texts in memory to outputs, tokenising included; no Kafka.  Once on a quiet machine and once beside a process
that keeps one core busy, because machines that only do one thing are rare.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

from benchmarks.documents import Corpus
from benchmarks.machine import hardware, versions
from benchmarks.report import Section, number, table
from benchmarks.scale import FULL, MODEL, SHORT
from inferstream.codec import Codec
from inferstream.device import Runner
from inferstream.device.cpu import CpuDevice
from inferstream.documents import Document, Prepared
from inferstream.models.encoder import Encoder
from inferstream.models.execution import forwards
from inferstream.models.files import locate
from inferstream.models.loading import load, load_tokenizer, load_transformer, read_sentence_files
from inferstream.settings import Settings, cores, load_settings, resolve
from inferstream.tasks import Task
from inferstream.tools.bench import Engine

WHOLE_BATCH = 1 << 30  # tokens: a batch is one forward


class ManyThreaded(Encoder):
    """One forward on all the cores."""

    def enter_thread(self) -> None:
        torch.set_num_threads(cores())


class OnlyLinear:
    """The matrix multiplications of the model's linear layers, for as many tokens, and nothing else: the bound."""

    padded = False

    def __init__(self, model: torch.nn.Module, width: int) -> None:
        self._layers = [
            each
            for name, each in model.named_modules()
            if isinstance(each, torch.nn.Linear) and "pooler" not in name
        ]
        self._width = width

    def enter_thread(self) -> None:
        torch.set_num_threads(1)

    def run(self, items: Sequence[Any]) -> np.ndarray:
        tokens = sum(map(len, items))
        inputs = {each.in_features: torch.ones(tokens, each.in_features) for each in self._layers}
        with torch.inference_mode():
            for layer in self._layers:
                layer(inputs[layer.in_features])
        return np.ones((len(items), self._width), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run the stage: ``run`` takes texts through and gives seconds; ``use`` makes the model attend so."""

    name: str
    use: Callable[[], None]
    run: Callable[[Sequence[str]], float]


def ways(settings: Settings, task: Task) -> list[Way]:
    sentence = read_sentence_files(locate(MODEL, None).folder)
    tokenizer, _, ids = load_tokenizer(sentence)
    transformer = load_transformer(sentence, "float32", ids)
    padded, packed = forwards(
        transformer.model, transformer.head, pad_id=transformer.pad_id, type_ids=tokenizer.type_ids
    )
    assert packed is not None
    k = cores()
    whole = Encoder(packed)
    arrival = Encoder(padded, group_tokens=WHOLE_BATCH)
    arrival.padded = False  # so that the window does not sort either

    def engine(runner: Runner, threads: int, staged: int = 1) -> Callable[[Sequence[str]], float]:
        return lambda texts: asyncio.run(through_the_stages(settings, task, runner, threads, staged, texts))

    return [
        Way("all of it", packed.use, engine(whole, k)),
        Way("padded and sorted, not packed", padded.use, engine(Encoder(padded), k)),
        Way("padded as they arrive", padded.use, engine(arrival, k)),
        Way(f"one forward on {k} threads, not {k} on one each", packed.use, engine(ManyThreaded(packed), 1)),
        Way("no batch staged behind those that compute", packed.use, engine(whole, k, staged=0)),
        Way(
            f"nothing overlaps, {k} threads",
            packed.use,
            lambda texts: one_after_the_other(settings, task, ManyThreaded(packed), texts),
        ),
        Way(
            "for comparison: only the model's matrix multiplications",
            packed.use,
            engine(OnlyLinear(transformer.model, packed.width), k),
        ),
    ]


async def through_the_stages(
    settings: Settings, task: Task, runner: Runner, threads: int, staged: int, texts: Sequence[str]
) -> float:
    device = CpuDevice(runner, threads)
    device.slots = threads + staged
    engine = Engine(settings, task, device)
    measured = await engine.run(texts)
    await asyncio.to_thread(engine.close)
    return measured.seconds


def one_after_the_other(settings: Settings, task: Task, encoder: Encoder, texts: Sequence[str]) -> float:
    """Tokenise, compute and finish a batch, then the next: what a loop of a few lines does."""
    encoder.enter_thread()
    budget = settings.batch.max_tokens or 1
    started = time.perf_counter()
    batch: list[Prepared] = []
    for at in range(0, len(texts), 16):
        documents = [Document("", text) for text in texts[at : at + 16]]
        batch += [answer for answer in task.prepare(documents) if isinstance(answer, Prepared)]
        if sum(each.tokens for each in batch) >= budget or at + 16 >= len(texts):
            rows = encoder.run([chunk for each in batch for chunk in each.chunks])
            for n, each in enumerate(batch):
                task.output(each, rows[n : n + 1])
            batch = []
    seconds = time.perf_counter() - started
    torch.set_num_threads(1)
    return seconds


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Another process on this machine, which computes without end."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(documents: int, rounds: int) -> Section:
    settings = resolve(
        load_settings((), {}, {"model.id": MODEL, "model.device": "cpu"}, require=False).settings,
        "cpu",
        cores(),
    )
    model = load(settings, Codec.from_settings(settings).embedding)
    model.device.close()
    texts = Corpus.load().take(documents)
    tokens = sum(each.tokens for each in prepared(model.task, texts))
    candidates = ways(settings, model.task)
    names = [way.name for way in candidates]
    rates: dict[tuple[str, bool], list[float]] = {}
    for busy in (False, True):
        for turn in range(rounds + 1):
            for way in candidates:
                way.use()
                with neighbour(busy):
                    rate = tokens / way.run(texts if turn else texts[: documents // 8])
                if turn:  # the first turn pays what is paid once
                    rates.setdefault((way.name, busy), []).append(rate)
            candidates.reverse()
    section = Section("What each part of the stage is worth")
    whole = {busy: statistics.median(rates["all of it", busy]) for busy in (False, True)}
    rows: list[list[Any]] = []
    for name in names:
        row = [name]
        for busy in (False, True):
            rate = statistics.median(rates[name, busy])
            row += [number(rate), f"{rate / whole[busy]:.2f}"]
        rows.append(row)
    head = ["", "tokens/s, quiet", "of all of it", "tokens/s, a core is busy", "of all of it"]
    section.text += [
        table(head, rows),
        f"MiniLM in float32, {documents:,} documents of {tokens / documents:.0f} tokens on average, medians of "
        f"{rounds} interleaved rounds.",
    ]
    return section


def prepared(task: Task, texts: Sequence[str]) -> list[Prepared]:
    answers = task.prepare([Document("", text) for text in texts])
    return [answer for answer in answers if isinstance(answer, Prepared)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer documents, one round")
    options = parser.parse_args()
    scale = SHORT if options.short else FULL
    section = run(scale.overlap_documents, scale.overlap_rounds)
    print(section.markdown())
    print("\n" + ", ".join(f"{name} {value}" for name, value in (hardware() | versions()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
