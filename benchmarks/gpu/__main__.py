"""The device stage on a GPU, with random weights and nothing to download.  ``python -m benchmarks.gpu [NAME …]``

engine   documents per second of one device fed from memory, BERT-base and MiniLM shapes
slots    1, 2 and 3 staging slots: with 1 the GPU waits for the host after every batch (synchronous)
graphs   batches as CUDA graphs against the same launched kernel by kernel
gaps     the time within batches in which no kernel ran, from the profiler (CUPTI), which slows launching down a little;
         quiet, and beside a thread that is busy in Python
packing  documents of many lengths packed against padded, and against a plain transformers loop
encode   sentence-transformers' encode beside the engine, text to vectors, with the real MiniLM
kafka    from Kafka to Kafka with the real MiniLM on the embedded broker, against the same model from memory
feeders  how many workers it takes to feed the GPU so

The first five need torch and transformers.  The last three need what the worker and the demo need (``pip install
'inferstream[demo]'``), and encode sentence-transformers as well; what is missing is said.

Markdown on stdout; --json FILE writes the numbers.  Without a CUDA device it says so and exits 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import Goal, Section, number, table


class Run:
    """``seconds`` of each measurement; ``index`` of the GPU."""

    def __init__(self, seconds: float, index: int) -> None:
        self.seconds = seconds
        self.index = index

    def engine(self) -> Section:
        from benchmarks.gpu.feed import feed, fixed
        from benchmarks.gpu.models import (
            BERT,
            MINILM,
            VOCABULARY,
            device_of,
            forwards_of,
            model_of,
        )
        from inferstream.device.gpus import peak_on

        section = Section("Engine only, 128 tokens, bfloat16")
        goals = {BERT.name: 15_000.0, MINILM.name: 60_000.0}
        peak = peak_on(self.index, "bfloat16")
        rows: list[list[str]] = []
        for shape in (BERT, MINILM):
            padded, packed = forwards_of(model_of(shape, self.index))
            best = None
            for tokens in (8192, 16_384, 32_768, 65_536):
                device = device_of(packed or padded, shape, tokens, index=self.index)
                fed = feed(device, fixed(128, tokens, 8, VOCABULARY), self.seconds)
                used = None if peak is None else fed.tokens_per_s * shape.flops_per_token(128) / peak.flops
                rows.append(
                    [
                        shape.name,
                        "packed" if packed else "padded",
                        str(tokens),
                        number(fed.documents_per_s),
                        f"{100 * fed.idle_ratio:.2f} %",
                        "–" if used is None else f"{100 * used:.0f} %",
                    ]
                )
                section.data[f"{shape.name} {tokens}"] = asdict(fed) | {"mfu": used}
                if best is None or fed.documents_per_s > best.documents_per_s:
                    best = fed
            assert best is not None
            section.goals += [
                Goal(f"{shape.name}: documents per second", best.documents_per_s, goals[shape.name], True),
                Goal(f"{shape.name}: compute idle at that rate", 100 * best.idle_ratio, 0.5, False, "%"),
            ]
        head = ["shape", "execution", "tokens per batch", "documents/s", "compute idle", "of the peak FLOP/s"]
        section.text = [table(head, rows)]
        return section

    def slots(self) -> Section:
        from benchmarks.gpu.feed import feed, fixed
        from benchmarks.gpu.models import BERT, VOCABULARY, device_of, forwards_of, model_of

        section = Section("Staging slots, BERT-base shape")
        rows: list[list[str]] = []
        padded, packed = forwards_of(model_of(BERT, self.index))
        for tokens in (2048, 16_384):
            rates: dict[int, float] = {}
            for slots in (1, 2, 3, 4):
                device = device_of(packed or padded, BERT, tokens, slots=slots, index=self.index)
                fed = feed(device, fixed(128, tokens, 8, VOCABULARY), self.seconds)
                rates[slots] = fed.documents_per_s
                section.data[f"{slots} slots, {tokens} tokens"] = asdict(fed)
                rows.append(
                    [
                        str(tokens),
                        f"{slots}{' (synchronous)' if slots == 1 else ''}",
                        number(fed.documents_per_s),
                        f"{fed.documents_per_s / rates[1]:.2f}",
                        f"{100 * fed.idle_ratio:.2f} %",
                    ]
                )
        section.text = [
            table(["tokens per batch", "slots", "documents/s", "against 1", "compute idle"], rows)
        ]
        return section

    def graphs(self) -> Section:
        from benchmarks.gpu.feed import feed, fixed
        from benchmarks.gpu.models import BERT, MINILM, VOCABULARY, device_of, forwards_of, model_of

        section = Section("CUDA graphs, documents of 64 tokens")
        rows: list[list[str]] = []
        for shape in (MINILM, BERT):
            _, packed = forwards_of(model_of(shape, self.index))
            if packed is None:
                section.text = ["The model did not run packed here (see the log), so there are no graphs."]
                return section
            devices = {n: device_of(packed, shape, 32_768, graphs=n, index=self.index) for n in (0, 64)}
            for documents in (1, 4, 16, 64, 128, 240, 512):
                batches = fixed(64, 64 * documents, 8, VOCABULARY)
                fed = {n: feed(device, batches, self.seconds / 2) for n, device in devices.items()}
                section.data[f"{shape.name}, {documents} documents"] = {
                    "eager": asdict(fed[0]),
                    "graphs": asdict(fed[64]),
                }
                rows.append(
                    [
                        shape.name,
                        str(documents),
                        f"{1e3 * fed[0].busy_s / fed[0].batches:.3f}",
                        f"{1e3 * fed[64].busy_s / fed[64].batches:.3f}",
                        number(fed[0].documents_per_s),
                        number(fed[64].documents_per_s),
                        f"{fed[64].documents_per_s / fed[0].documents_per_s:.2f}",
                    ]
                )
        head = [
            "shape",
            "documents per batch",
            "eager ms",
            "graph ms",
            "eager documents/s",
            "graph documents/s",
            "ratio",
        ]
        section.text = [table(head, rows), "ms: time of one batch on the compute stream."]
        return section

    def gaps(self) -> Section:
        from torch.profiler import ProfilerActivity, profile

        from benchmarks.gpu.feed import busy_in_python, feed, fixed, kernel_seconds
        from benchmarks.gpu.models import BERT, MINILM, VOCABULARY, device_of, forwards_of, model_of

        section = Section("Gaps within batches, documents of 64 tokens")
        rows: list[list[str]] = []
        for shape in (MINILM, BERT):
            padded, packed = forwards_of(model_of(shape, self.index))
            for graphs in (0, 64):
                device = device_of(packed or padded, shape, 32_768, graphs=graphs, index=self.index)
                for tokens, busy in product((1024, 4096, 15_360, 32_768), (False, True)):
                    batches = fixed(64, tokens, 8, VOCABULARY)
                    with (
                        busy_in_python() if busy else nullcontext(),
                        profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen,
                    ):
                        fed = feed(device, batches, min(self.seconds, 1.0))
                    results = seen.profiler.kineto_results if seen.profiler else None
                    computed = kernel_seconds(results.events()) if results else 0.0
                    # One round of all the batches is not measured by feed, but is by the profiler.
                    share = 1 - computed / (fed.busy_s * (fed.batches + len(batches)) / fed.batches)
                    beside = "beside a busy Python thread" if busy else "quiet"
                    section.data[f"{shape.name}, {graphs} graphs, {tokens} tokens, {beside}"] = asdict(
                        fed
                    ) | {
                        "kernel_s": computed,
                        "gaps": share,
                    }
                    rows.append(
                        [
                            shape.name,
                            "graphs" if graphs else "eager",
                            str(tokens),
                            beside,
                            f"{1e3 * fed.busy_s / fed.batches:.3f}",
                            f"{100 * fed.idle_ratio:.1f} %",
                            f"{100 * share:.1f} %",
                        ]
                    )
        head = [
            "shape",
            "launched as",
            "tokens per batch",
            "the host",
            "ms per batch",
            "idle between",
            "of the ms no kernel ran",
        ]
        switch = f"The interpreter switches threads after {1e3 * sys.getswitchinterval():g} ms."
        section.text = [table(head, rows), switch]
        return section

    def packing(self) -> Section:
        from benchmarks.gpu.feed import batched, feed, mixed
        from benchmarks.gpu.models import BERT, MINILM, VOCABULARY, device_of, forwards_of, model_of

        section = Section("Documents of many lengths, 16,384 tokens per batch")
        rows: list[list[str]] = []
        for shape in (MINILM, BERT):
            model = model_of(shape, self.index)
            documents = mixed(40_000, shape.longest, VOCABULARY)
            rates = {"plain transformers loop, 64 as they come": _plain(model, documents, self.seconds)}
            padded, packed = forwards_of(model)
            for name, forward in (("padded, by length class", padded), ("packed, as they come", packed)):
                if forward is None:
                    continue
                forward.use()  # type: ignore[attr-defined]  # both forwards share the weights and take turns
                batches = batched(documents, 16_384, padded=forward.padded)
                fed = feed(device_of(forward, shape, 16_384, index=self.index), batches, self.seconds)
                rates[name] = fed.documents_per_s
                section.data[f"{shape.name}, {name}"] = asdict(fed)
            base = next(iter(rates.values()))
            rows += [[shape.name, name, number(rate), f"{rate / base:.2f}"] for name, rate in rates.items()]
            section.data[f"{shape.name}, documents per second"] = rates
        section.text = [table(["shape", "execution", "documents/s", "against the loop"], rows)]
        return section

    def kafka(self) -> Section:
        from benchmarks.gpu.pipe import kafka

        return kafka(self.seconds, f"cuda:{self.index}")

    def encode(self) -> Section:
        from benchmarks.gpu.encode import encode

        return encode(self.seconds, f"cuda:{self.index}")

    def feeders(self) -> Section:
        from benchmarks.gpu.feeders import feeders

        return feeders(self.seconds, f"cuda:{self.index}")


def _plain(model: Any, documents: list[Any], seconds: float) -> float:
    """What most write first: pad 64 documents to the longest, one batch after the other, wait for each."""
    import numpy as np
    import torch

    def rounds(limit_s: float) -> tuple[int, float]:
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < limit_s:
            at = done % (len(documents) - 64)
            items = documents[at : at + 64]
            longest = max(map(len, items))
            ids = np.zeros((64, longest), dtype=np.int64)
            mask = np.zeros((64, longest), dtype=np.int64)
            for row, item in enumerate(items):
                ids[row, : len(item)] = item
                mask[row, : len(item)] = 1
            inputs, seen = (torch.from_numpy(each).to(model.device) for each in (ids, mask))
            with torch.inference_mode():
                hidden = model(input_ids=inputs, attention_mask=seen).last_hidden_state.float()
                summed = (hidden * seen[:, :, None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)
                torch.nn.functional.normalize(summed).cpu()
            done += 64
        return done, time.perf_counter() - started

    rounds(min(1.0, seconds))
    done, lasted = rounds(seconds)
    return done / lasted


NAMES = ("engine", "slots", "graphs", "gaps", "packing", "encode", "kafka", "feeders")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="The device stage on a GPU."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    import torch

    if not torch.cuda.is_available():
        print(f"benchmarks.gpu: there is no CUDA device here (torch {torch.__version__})", file=sys.stderr)
        return 2
    run = Run(options.seconds, options.gpu)
    facts = {
        "GPU": torch.cuda.get_device_name(options.gpu),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "driver": _driver(),
        "python": platform.python_version(),
    }
    print(
        "# The device stage on a GPU\n\n"
        + ", ".join(f"{name} {value}" for name, value in facts.items())
        + "\n"
    )
    sections: dict[str, Any] = {}
    failed = False
    for name in options.names or NAMES:
        measure: Callable[[], Section] = getattr(run, name)
        try:
            section = measure()
        except Exception as error:  # the others are still worth having
            print(f"benchmarks.gpu: {name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        finally:
            torch.cuda.empty_cache()
        print(section.markdown() + "\n", flush=True)
        sections[name] = section.as_json()
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "sections": sections}, indent=2) + "\n")
    return 1 if failed else 0


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split("  ")[1].strip()
    except (OSError, IndexError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
