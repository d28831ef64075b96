"""A worker as `inferstream run` starts it, with a look inside.  ``python -m benchmarks.worker JSON``.

For what cannot be seen from outside: how long batches took, the CPU time of stages and threads, whether the
device idled, and (``paced``) with a device that stands in for a faster one.  SIGUSR1 prints what was seen since the
last one, as a line of JSON, and turns the dials that are named in the file ``dials``; SIGUSR2 prints it and drains.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import os
import pstats
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks.devices import CountedTask, PacedDevice, WatchedDevice
from benchmarks.machine import thread_cpu_seconds
from inferstream import app
from inferstream.models.loading import Loaded, load
from inferstream.settings import Settings, cores, device_kind, load_settings, resolve
from inferstream.telemetry.logs import configure
from inferstream.workers import FINISH, PREPARE, Workers

LOOP, OTHER = "event loop", "other"
TOP = 25  # functions in a profile
WAITING = ("<method 'acquire' of '_thread.lock' objects>", "<method 'poll' of 'select.epoll' objects>")


class Look:
    """What is seen from inside; ``options`` are those of the command line."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._paced: dict[str, Any] | None = options.get("paced")
        self._dials = Path(options["dials"])
        self._profiled: bool = options.get("profile", False)
        self._loop_profile = cProfile.Profile(time.thread_time)
        self._thread_profiles: list[cProfile.Profile] = []
        self._device: PacedDevice | WatchedDevice | None = None
        self._worker: app.Worker | None = None
        self._threads_before: dict[str, float] = {}
        self._stages_before = (0.0, 0.0)
        if self._profiled:
            self._profile_workers()

    def load_model(self, settings: Settings, encode_embedding: Callable[..., dict[str, Any]]) -> Loaded:
        loaded = load(settings, encode_embedding)
        if self._paced is None:
            self._device = WatchedDevice(loaded.device)
            return replace(loaded, device=self._device)
        loaded.device.close()
        self._device = PacedDevice(self._paced["tokens_per_s"], self._paced["width"])
        return replace(loaded, task=CountedTask(loaded.task), device=self._device)

    async def started(self, worker: app.Worker) -> None:
        self._worker = worker
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.mark)

    def mark(self) -> None:
        """Say what was seen; it does not count any more."""
        assert self._worker is not None and self._device is not None
        found = self._since()
        dials = json.loads(self._dials.read_bytes())
        if "switch_interval_s" in dials:
            sys.setswitchinterval(dials["switch_interval_s"])
        if "tokens_per_s" in dials:
            assert isinstance(self._device, PacedDevice)
            self._device.tokens_per_s = dials["tokens_per_s"]
        self._threads_before = _threads()
        cpu_s = self._worker.pipeline.workers.cpu_s
        self._stages_before = (cpu_s[PREPARE], cpu_s[FINISH])
        if isinstance(self._device, PacedDevice):
            self._device.spans.clear()
        else:
            self._device.batch_s.clear()
        if self._profiled:
            self._loop_profile.enable()
        _say(found)

    def seen(self) -> dict[str, Any]:
        """What was seen since the mark, and what was called."""
        self._loop_profile.disable()
        found = self._since()
        if self._profiled:
            found["loop_calls"] = _top([self._loop_profile])
            found["worker_calls"] = _top(self._thread_profiles)
        return found

    def _since(self) -> dict[str, Any]:
        """CPU seconds of threads and stages since the mark, the device's record, and what the worker runs with."""
        assert self._worker is not None and self._device is not None
        threads = {
            name: seconds - self._threads_before.get(name, 0.0) for name, seconds in _threads().items()
        }
        cpu_s = self._worker.pipeline.workers.cpu_s
        stages = {
            "prepare": cpu_s[PREPARE] - self._stages_before[0],
            "finish": cpu_s[FINISH] - self._stages_before[1],
            LOOP: threads[LOOP],
        }
        found: dict[str, Any] = {
            "threads": threads,
            "stages": stages,
            "batch_max_tokens": self._worker.settings.batch.max_tokens,
            "switch_interval_s": sys.getswitchinterval(),
        }
        if isinstance(self._device, PacedDevice):
            found["idle_ratio"] = self._device.idle_ratio()
            found["batches"] = [span.items for span in self._device.spans]
        else:
            found["batch_s"] = list(self._device.batch_s)
        return found

    def _profile_workers(self) -> None:
        """Have each worker thread run under a profiler of its own."""
        run = Workers._run

        def profiled(workers: Workers) -> None:
            profile = cProfile.Profile(time.thread_time)
            self._thread_profiles.append(profile)
            profile.runcall(run, workers)

        Workers._run = profiled  # type: ignore[assignment, method-assign]  # the one way into its threads


def _threads() -> dict[str, float]:
    """CPU seconds so far by the kind of thread; threads without Python (BLAS, GC of the runtime) are not seen."""
    found: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.native_id is None:
            continue
        main = thread is threading.main_thread()
        name = LOOP if main else thread.name.rstrip("0123456789").rstrip("-_") or OTHER
        found[name] += thread_cpu_seconds(thread.native_id)
    return dict(found)


def _top(profiles: list[cProfile.Profile]) -> list[tuple[str, int, float]]:
    """(function, calls, own seconds) of the most expensive functions."""
    stats: pstats.Stats | None = None
    for profile in profiles:
        profile.create_stats()
        stats = pstats.Stats(profile) if stats is None else stats.add(profile)
    if stats is None:
        return []
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = stats.stats  # type: ignore[attr-defined]
    busy = [entry for entry in entries.items() if entry[0][2] not in WAITING]
    ordered = sorted(busy, key=lambda entry: entry[1][2], reverse=True)[:TOP]
    return [
        (f"{os.path.basename(file)}:{line} {function}", calls, own)
        for (file, line, function), (_, calls, own, *_) in ordered
    ]


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


async def serve(options: dict[str, Any]) -> None:
    loaded = load_settings([Path(options["config"])], environ={})
    settings = resolve(loaded.settings, device_kind(loaded.settings), cores())
    configure(settings.telemetry.log_format, settings.telemetry.log_level)
    look = Look(options)
    stop = asyncio.Event()
    told = asyncio.Event()

    async def watch() -> None:
        """SIGUSR2 asks for what was seen, before the drain ends the threads that saw it."""
        await told.wait()
        _say(look.seen())
        stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, told.set)
    watching = asyncio.create_task(watch())
    await app.run(settings, load_model=look.load_model, started=look.started, stop=stop)
    watching.cancel()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
