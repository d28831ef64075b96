"""All benchmarks, one after the other, each side by side with what it is compared with.

    python -m benchmarks                              # 20 minutes at most on two cores
    python -m benchmarks --short                      # 5 minutes at most: do they still run?
    python -m benchmarks --only pipe latency
    python -m benchmarks --docs                       # and write it into docs/ and README

Nothing else should run on the machine meanwhile.  Goals are reported as met or missed; the exit code says only
whether everything could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is in a package; what else would be asked for is a mistake
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks import batching, guarantees, latency, memory, overlap, paced, pipe, prefetch, throughput
from benchmarks.arena import READY_S, Arena, Child, Topics
from benchmarks.documents import Corpus
from benchmarks.machine import hardware, has_bfloat16, versions
from benchmarks.peers import PeerUnavailable, environment
from benchmarks.publish import publish
from benchmarks.report import Report, Section, number
from benchmarks.scale import FULL, SHORT, Scale

THROUGHPUT = ("naive-64", "naive-1000", "infinity", "engine")
NAMES = (*THROUGHPUT, "paced", "pipe", "guarantees", "latency", "memory", "overlap", "prefetch", "batching")


class Run:
    """One run of the chosen benchmarks; ``sections`` fill in their order.

    ``unmeasured``: the contestants that cannot be had here, and why.
    """

    def __init__(self, arena: Arena, scale: Scale, names: Sequence[str]) -> None:
        self._arena = arena
        self._scale = scale
        self._names = names
        # Documents/s, and the batch.max_tokens they were reached with.
        self._peak: tuple[float, int] | None = None
        self.sections: dict[str, Section] = {}
        self.failed: list[str] = []
        self.unmeasured: dict[str, str] = {}

    async def all(self) -> None:
        against = self.against()
        if against:
            await self._one("float32", lambda: self._throughput(against, "float32"))
            # infinity in float32 only: it is the slowest to start, and the run has its time.
            rest = [name for name in against if name != "infinity"]
            if rest and self._scale.bfloat16 and has_bfloat16():
                await self._one("bfloat16", lambda: self._throughput(rest, "bfloat16"))
        steps: dict[str, Callable[[], Awaitable[Section]]] = {
            "paced": lambda: paced.run(self._arena, self._scale),
            "pipe": lambda: pipe.run(self._arena, self._scale),
            "guarantees": lambda: guarantees.run(self._arena, self._scale),
            "latency": self._latency,
            "memory": lambda: memory.run(self._arena, self._scale),
            # In a thread: each of their passes has an event loop of its own.
            "overlap": lambda: asyncio.to_thread(
                overlap.run, self._scale.overlap_documents, self._scale.overlap_rounds
            ),
            "prefetch": lambda: asyncio.to_thread(
                prefetch.run,
                self._scale.rounds,
                self._scale.prefetch_documents,
                self._scale.prefetch_rounds,
            ),
            "batching": self._batching,
        }
        for name, step in steps.items():
            if name in self._names:
                await self._one(name, step)

    def against(self) -> list[str]:
        """Which contestants the throughput is compared with; those that cannot be had here are left out, and said."""
        against = [name for name in THROUGHPUT if name in self._names]
        if "infinity" in against:
            try:
                environment("infinity", make=self._scale is FULL)
            except PeerUnavailable as error:
                against.remove("infinity")
                self.unmeasured["infinity"] = str(error)
                _say(f"infinity: not measured: {error}")
                # A short run asks whether what is there still runs.
                if self._scale is FULL:
                    self.failed.append("infinity")
        return against

    async def _one(self, name: str, step: Callable[[], Awaitable[Section]]) -> None:
        started = time.monotonic()
        _say(f"{name}: running")
        try:
            section = await step()
        except Exception as error:  # one that cannot be measured does not take the others with it
            self.failed.append(name)
            _say(f"{name}: not measured: {error}")
            return
        section.took_s = time.monotonic() - started
        self.sections[name] = section
        for goal in section.goals:
            _say("  " + " ".join(goal.row()).replace("*", ""))
        _say(f"{name}: {section.took_s:.0f} s")

    async def _throughput(self, against: Sequence[str], dtype: str) -> Section:
        section = await throughput.run(self._arena, self._scale, against, dtype)
        if dtype == "float32":
            rate = statistics.median(section.data["rates"][throughput.OURS])
            self._peak = rate, section.data["engine"]["calibration"]["batch_max_tokens"]
            section.text += [f"`{name}`: not measured: {why}" for name, why in self.unmeasured.items()]
            section.data["not_measured"] = self.unmeasured
        return section

    async def _latency(self) -> Section:
        rate, batch_max_tokens = self._peak or await self._measured_peak()
        return await latency.run(self._arena, self._scale, rate, batch_max_tokens)

    async def _measured_peak(self) -> tuple[float, int]:
        """The engine's rate on a few documents, for a run that did not measure the worker's; its batch.max_tokens."""
        folder = self._arena.folder / "engine-peak"
        config = self._arena.config(Topics("documents", "results", "engine-peak"), latency.OURS)
        options = {
            "config": str(config),
            "texts": str(self._arena.texts_file()),
            "seconds": 1,
            "least": 1,
            "most": 1,
        }
        engine = Child(folder, "engine", options)
        try:
            answer = await engine.answer(READY_S)
            return answer["rate"], answer["batch_max_tokens"]
        finally:
            engine.kill()

    async def _batching(self) -> Section:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            batching.main(["--short"] if self._scale is SHORT else [])
        section = Section(
            "Which documents go into the next batch (simulated)", text=[printed.getvalue().strip()]
        )
        section.data = {"table": printed.getvalue().splitlines()}
        return section


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    started = time.monotonic()
    # What is killed still stops its broker and its workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="inferstream-bench-", dir=options.folder) as folder:
        arena = Arena(Path(folder), Corpus.load())
        run = Run(arena, SHORT if options.short else FULL, options.only)
        try:
            if set(options.only) - {"batching"}:
                arena.start()
            asyncio.run(run.all())
            if run.failed:
                print_logs(Path(folder))
        finally:
            arena.stop()
        published = {
            "published": f"{arena.published:,} records at {number(_each_us(arena))} µs of the publisher's CPU"
        }
    how = "python -m benchmarks" + "".join(f" {argument}" for argument in arguments or sys.argv[1:])
    report = Report(
        how,
        time.monotonic() - started,
        hardware(),
        versions(),
        arena.corpus.facts() | published,
        run.sections,
    )
    print(report.markdown())
    for path, text in ((options.json, report.json()), (options.markdown, report.markdown())):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if options.json is None:
        print(report.json())
    if options.docs:
        publish(report)
    return 1 if run.failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few documents: do they still run?")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there and not to stdout")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the Markdown there, too")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/ and README, too")
    parser.add_argument(
        "--folder", type=Path, help="where the broker keeps its data meanwhile (default: TMPDIR)"
    )
    return parser.parse_args(arguments)


def _each_us(arena: Arena) -> float:
    return arena.publisher_cpu_s * 1e6 / arena.published if arena.published else 0.0


def print_logs(folder: Path) -> None:
    """The ends of the logs of what ran, for whoever has to find out why something could not be measured."""
    for log in sorted(folder.glob("*/stderr.log")):
        lines = log.read_text(errors="replace").splitlines()[-5:]
        if lines:
            _say(f"--- {log.parent.name}\n" + "\n".join(lines))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
