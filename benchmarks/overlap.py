"""What each part of the device stage is worth on this machine: all of it, and each part left out in turn.

    python -m benchmarks.overlap [--short]

From texts in memory to outputs, tokenising included; no Kafka.  Once on a quiet machine and once beside a process
that keeps one core busy, because machines that only do one thing are rare.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

from benchmarks.documents import Corpus
from benchmarks.machine import hardware, versions
from benchmarks.report import Section, Spread, number, round_ratios, table
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
WHOLE = "all of it"
BUSY = (False, True)


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
    """A way to run the stage: ``run`` takes texts through and gives seconds; ``use`` makes the model attend so.

    It gets ``share`` of the documents; a ``bound`` does only a part of what all the stage does.
    """

    name: str
    use: Callable[[], None]
    run: Callable[[Sequence[str]], float]
    share: float = 1.0
    bound: bool = False


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
        Way(WHOLE, packed.use, engine(whole, k)),
        Way("padded and sorted, not packed", padded.use, engine(Encoder(padded), k)),
        Way("padded as they arrive", padded.use, engine(arrival, k), share=1 / 3),
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
            bound=True,
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
    lengths = [each.tokens for each in prepared(model.task, texts)]
    candidates = ways(settings, model.task)
    rates: dict[tuple[str, bool], list[float]] = {(way.name, busy): [] for way in candidates for busy in BUSY}
    order = list(candidates)
    for busy in BUSY:
        for turn in range(rounds + 1):
            for way in order:
                way.use()
                count = round(documents * way.share) if turn else documents // 8
                with neighbour(busy):
                    rate = sum(lengths[:count]) / way.run(texts[:count])
                if turn:  # the first turn pays what is paid once
                    rates[way.name, busy].append(rate)
            order.reverse()
    return section_of(candidates, rates, documents, sum(lengths) / documents)


def section_of(
    candidates: Sequence[Way],
    rates: Mapping[tuple[str, bool], Sequence[float]],
    documents: int,
    tokens: float,
) -> Section:
    """``rates`` in tokens/s, round by round, quiet and beside a busy process; ``tokens`` of a document on average."""
    section = Section("What each part of the stage is worth")
    rows: list[list[str]] = []
    for way in candidates:
        row = [way.name]
        for busy in BUSY:
            ratios = round_ratios(rates[way.name, busy], rates[WHOLE, busy])
            rate = Spread.of(rates[way.name, busy])
            row += [f"{number(rate.median)} ({rate.range})"]
            row += [told(Spread.of(ratios), way.bound) if way.name != WHOLE else "1"]
        rows.append(row)
    rounds = len(rates[WHOLE, False])
    head = ["", "tokens/s, quiet", "of all of it", "tokens/s, a core is busy", "of all of it"]
    section.text += [
        table(head, rows),
        f"MiniLM in float32, {documents:,} documents of {tokens:.0f} tokens on average (padded as they arrive: the "
        f"first third of them), {rounds} rounds in which each way has its turn. Medians, in brackets lowest – "
        "highest; a ratio is formed within a round. Where its rounds lie on both sides of 1.00 it is not "
        "distinguishable from all of it; where they do not, chance alone would have them all on one side once in "
        f"{2 ** (rounds - 1)} times.",
    ]
    section.data = {
        "rates": {
            f"{name}, {'busy' if busy else 'quiet'}": list(found) for (name, busy), found in rates.items()
        }
    }
    return section


def told(ratio: Spread, bound: bool) -> str:
    """A ratio to all of it, and what it can not be taken for; ``bound``: all of it does that and more."""
    found = f"{number(ratio.median)} ({ratio.range})"
    if bound and ratio.median < 1.0:
        return f"{found}: noise, all of it cannot be faster"
    return f"{found}: not distinguishable" if ratio.covers(1.0) else found


def prepared(task: Task, texts: Sequence[str]) -> list[Prepared]:
    answers = task.prepare([Document("", text) for text in texts])
    return [answer for answer in answers if isinstance(answer, Prepared)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer documents and rounds")
    options = parser.parse_args()
    scale = SHORT if options.short else FULL
    section = run(scale.overlap_documents, scale.overlap_rounds)
    print(section.markdown())
    print("\n" + ", ".join(f"{name} {value}" for name, value in (hardware() | versions()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
