"""Whether OpenVINO would compute faster than our packed forward: the same stage, with its engine in the place of torch.

    python -m benchmarks.openvino [--short]

From texts in memory to outputs, tokenising included, no Kafka; both on as many cores, in float32.  OpenVINO comes from
an environment of its own (:mod:`benchmarks.peers`) and runs padded: packing needs attention that knows where documents
end, which its CPU plug-in does not have.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from torch import Tensor

from benchmarks.documents import Corpus
from benchmarks.machine import hardware, versions
from benchmarks.overlap import prepared
from benchmarks.peers import PeerUnavailable, environment
from benchmarks.report import Section, median_ratio, number, table
from benchmarks.scale import MODEL
from inferstream.codec import Codec
from inferstream.device import Runner
from inferstream.device.cpu import CpuDevice
from inferstream.models.encoder import Encoder
from inferstream.models.execution import Trial, forwards
from inferstream.models.files import locate
from inferstream.models.loading import load, load_tokenizer, load_transformer, read_sentence_files
from inferstream.models.pooling import Head
from inferstream.models.tokenizer import Tokens
from inferstream.settings import Settings, cores, load_settings, resolve
from inferstream.tasks import Task
from inferstream.tools.bench import Engine, Measured

OURS = "torch, packed (ours)"
GROUPS = (128, 256, 512)  # padded tokens of one inference
ONE = 0  # instead of a group: each document alone
GOAL = 1.15
COSINE = 0.9999


class Whole(torch.nn.Module):
    """Ids, token types and lengths in, vectors out: what is converted."""

    def __init__(self, model: torch.nn.Module, head: Head) -> None:
        super().__init__()
        self.model = model
        self._head = head

    def forward(self, ids: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        real = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        hidden = self.model(input_ids=ids, attention_mask=real, token_type_ids=types)
        return self._head(hidden.last_hidden_state, lengths)


class OpenVino:
    """A compiled model behind :class:`inferstream.device.Runner`: batches sorted, padded in groups of few tokens."""

    padded = False  # the window gives documents as they arrive, as it does to the packed forward

    def __init__(self, compiled: Any, group_tokens: int, width: int) -> None:
        self._compiled = compiled
        self._group_tokens = group_tokens
        self._width = width
        self._own = threading.local()

    def enter_thread(self) -> None:
        self._own.request = self._compiled.create_infer_request()

    def run(self, items: Sequence[Any]) -> np.ndarray:
        rows = np.empty((len(items), self._width), dtype=np.float32)
        for group in groups([len(item) for item in items], self._group_tokens):
            lengths = np.array([len(items[n]) for n in group], dtype=np.int64)
            ids, types = np.zeros((2, len(group), lengths.max()), dtype=np.int64)
            for row, n in enumerate(group):
                item = items[n]
                if isinstance(item, Tokens):
                    types[row, : lengths[row]] = item.types
                    item = item.ids
                ids[row, : lengths[row]] = item
            inputs = [ids, types, lengths]
            rows[group] = self._own.request.infer(inputs, share_inputs=True, share_outputs=True)[0]
        return rows


def groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices by length, in groups that hold at most ``most`` tokens with their padding; one each if ``most`` is 0."""
    found: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and (len(found[-1]) + 1) * lengths[n] <= most:
            found[-1].append(n)
        else:
            found.append([n])
    return found


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    runner: Runner
    threads: int
    use: Callable[[], None] = lambda: None


def ways(openvino: Any) -> tuple[list[Way], Trial]:
    """Ours, and OpenVINO's with one stream for each core, and one stream on all; the documents of the trial."""
    sentence = read_sentence_files(locate(MODEL).folder)
    tokenizer, _, count = load_tokenizer(sentence)
    transformer = load_transformer(sentence, "float32", count)
    trial = Trial.of(transformer.model, transformer.head)
    whole = Whole(transformer.model, transformer.head).eval()
    ids = torch.ones(2, 8, dtype=torch.int64)
    example = (ids, torch.zeros_like(ids), torch.tensor([8, 5]))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and the only way in
        graph = openvino.convert_model(whole, example_input=example)
    _, packed = forwards(
        transformer.model, transformer.head, pad_id=transformer.pad_id, type_ids=tokenizer.type_ids
    )
    assert packed is not None
    k = cores()

    def compiled(streams: int) -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(k),
        }
        return openvino.Core().compile_model(graph, "CPU", options)

    each, one = compiled(k), compiled(1)
    candidates = [Way(OURS, Encoder(packed), k)]
    candidates += [
        Way(f"OpenVINO, {k} streams, padded to {most} tokens", OpenVino(each, most, packed.width), k)
        for most in GROUPS
    ]
    candidates.append(
        Way(f"OpenVINO, {k} streams, document by document", OpenVino(each, ONE, packed.width), k)
    )
    candidates.append(
        Way(f"OpenVINO, 1 stream on {k} threads, padded to 256 tokens", OpenVino(one, 256, packed.width), 1)
    )
    return candidates, trial


async def through_the_stages(settings: Settings, task: Task, way: Way, texts: Sequence[str]) -> Measured:
    device = CpuDevice(way.runner, way.threads)
    engine = Engine(settings, task, device)
    measured = await engine.run(texts)
    await asyncio.to_thread(engine.close)
    return measured


def worst_cosine(runner: Runner, trial: Trial) -> float:
    """Of the trial's documents, against the plain forward of each alone."""
    found: list[np.ndarray] = []

    def compute() -> None:
        runner.enter_thread()
        found.append(runner.run(trial.items))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    (rows,) = found
    dots = (rows * trial.rows).sum(axis=1)
    return float((dots / np.linalg.norm(rows, axis=1) / np.linalg.norm(trial.rows, axis=1)).min())


def run(documents: int, rounds: int) -> Section:
    """Raises PeerUnavailable."""
    python = environment("openvino")
    # Appended, so that numpy stays ours; the interpreter is of the same version.
    sys.path += [str(path) for path in (python.parents[1] / "lib").glob("python*/site-packages")]
    import openvino

    settings = resolve(
        load_settings((), {}, {"model.id": MODEL, "model.device": "cpu"}, require=False).settings,
        "cpu",
        cores(),
    )
    model = load(settings, Codec.from_settings(settings).embedding)
    model.device.close()
    candidates, trial = ways(openvino)
    names = [way.name for way in candidates]
    cosines = {way.name: worst_cosine(way.runner, trial) for way in candidates}
    rates: dict[str, list[float]] = {name: [] for name in names}
    cpu_us: dict[str, list[float]] = {name: [] for name in names}
    texts = Corpus.load().take(documents * (rounds + 1))
    tokens = 0
    for turn in range(rounds + 1):
        # Others in each round, as in a topic: OpenVINO keeps what it has compiled for a shape it has seen.
        taken = texts[turn * documents : (turn + 1) * documents]
        for way in candidates:
            measured = asyncio.run(through_the_stages(settings, model.task, way, taken))
            if turn:  # the first turn pays what is paid once
                rates[way.name].append(measured.tokens_per_s)
                cpu_us[way.name].append(measured.process_cpu_s / measured.tokens * 1e6)
        if turn:
            tokens += sum(each.tokens for each in prepared(model.task, taken))
        candidates.reverse()
    section = Section("OpenVINO in the place of torch")
    ratios = {name: median_ratio(rates[name], rates[OURS]) for name in names}
    rows = [
        [
            name,
            number(statistics.median(rates[name])),
            number(statistics.median(cpu_us[name])),
            number(ratios[name]),
            f"{cosines[name]:.6f}",
        ]
        for name in names
    ]
    best = max((name for name in names if name != OURS), key=ratios.__getitem__)
    clears = ratios[best] >= GOAL and cosines[best] >= COSINE
    section.text += [
        table(["", "tokens/s", "CPU µs/token", "of ours", "lowest cosine"], rows),
        f"MiniLM in float32 through the same stages, {documents:,} documents of "
        f"{tokens / documents / rounds:.0f} tokens "
        f"on average a round, other ones in each, medians of {rounds} interleaved rounds; OpenVINO "
        f"{openvino.__version__.partition('-')[0]}. Best: {best}, {ratios[best]:.2f} x, which "
        f"{'clears' if clears else 'does not clear'} {GOAL} x at a cosine of {COSINE}.",
    ]
    section.data = {"rates": rates, "cpu_us_per_token": cpu_us, "ratios": ratios, "cosines": cosines}
    return section


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.openvino", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--short", action="store_true", help="fewer documents, one round")
    options = parser.parse_args()
    try:
        section = run(32, 1) if options.short else run(160, 5)
    except PeerUnavailable as error:
        print(f"openvino: not measured: {error}", file=sys.stderr)
        return 1
    print(section.markdown())
    print("\n" + ", ".join(f"{name} {value}" for name, value in (hardware() | versions()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
