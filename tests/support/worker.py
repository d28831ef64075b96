"""A worker as a user runs it: ``python -m inferstream run --config FILE`` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import kill_group, spawn

ROOT = Path(__file__).resolve().parents[2]


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the changes laid over it, section by section."""
    result = dict(tree)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = (
            merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def settings(
    bootstrap: str, source: str, target: str, group: str, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings for tests: a model that needs no torch, a group that notices a dead member after 6 s."""
    tree = {
        "kafka": {
            "bootstrap_servers": [bootstrap],
            "group_id": group,
            "session_timeout_ms": 6000,
            "heartbeat_interval_ms": 1000,
        },
        "input": {"topics": [source]},
        "output": {"topic": target},
        "model": {"id": "builtin:hash"},
        "telemetry": {"port": 0},
    }
    return merged(tree, changes or {})


def write_config(folder: Path, tree: Mapping[str, Any], name: str = "inferstream.yaml") -> Path:
    """Write the settings tree as YAML; the file comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    return path


class Worker:
    """One worker process.  It has its own process group, and dies with the test run."""

    def __init__(
        self,
        folder: Path,
        tree: Mapping[str, Any] | Path,
        *,
        environ: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        module: str = "inferstream",
    ) -> None:
        """``tree`` is the settings tree, or a file with it; ``environ`` is laid over ours.

        ``module`` is run instead of the service where a test has to get inside it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.config = tree if isinstance(tree, Path) else write_config(folder, tree)
        self._flags = list(flags)
        self._module = module
        self._stderr = folder / "stderr.log"
        self._stdout = folder / "stdout.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("INFERSTREAM_")}
        path = os.pathsep.join(filter(None, [str(ROOT / "service"), str(ROOT), inherited.get("PYTHONPATH")]))
        self._environ = {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Worker:
        command = [sys.executable, "-m", self._module, "run", "--config", str(self.config), *self._flags]
        self._process = spawn(command, self._stderr, self._environ, self._stdout)
        return self

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """The exit code (negative: the signal that ended it); None while it runs."""
        return self._running().poll()

    def kill9(self) -> None:
        """SIGKILL to the whole process group; does nothing if it has ended or was never started."""
        if self._process is not None:
            kill_group(self._process)

    def terminate(self) -> None:
        """SIGTERM to the worker itself: it drains."""
        self._running().send_signal(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        self._running().send_signal(number)

    def interrupt(self) -> None:
        """SIGINT, as Ctrl-C gives it."""
        self._running().send_signal(signal.SIGINT)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code, once it has ended.  Blocks the event loop: async tests await :meth:`ended`."""
        try:
            return self._running().wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker still runs after {timeout:.0f} s\n{self._story()}") from None

    async def ended(self, timeout: float = 60.0) -> int:
        return await asyncio.to_thread(self.wait, timeout)

    async def says(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait until stderr matches the pattern; fails at once if the worker ends without having said it."""
        deadline = time.monotonic() + timeout
        while True:
            over = self.returncode is not None
            if found := re.search(pattern, self.stderr_text()):
                return found
            if over or time.monotonic() > deadline:
                end = f"ended with {self.returncode}" if over else f"ran {timeout:.0f} s"
                raise AssertionError(f"the worker {end} without saying {pattern!r}\n{self._story()}")
            await asyncio.sleep(0.05)

    def stderr_text(self) -> str:
        return self._stderr.read_text(errors="replace") if self._stderr.exists() else ""

    def stdout_text(self) -> str:
        return self._stdout.read_text(errors="replace") if self._stdout.exists() else ""

    def _story(self) -> str:
        return "\n".join(self.stderr_text().splitlines()[-40:])

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the worker was not started")
        return self._process
