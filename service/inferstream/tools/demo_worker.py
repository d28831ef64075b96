"""The demo's worker: ``python -m inferstream run`` in a process of its own, as an operator would start it.

It cannot outlive the demo: the kernel kills it when the thread that started it is gone, however that came.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import inferstream

# Asks for that death signal, then becomes the command.  A small Python of its own and no preexec_fn, which
# would run between fork and exec in a process with threads.  PR_SET_PDEATHSIG is 1.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the demo is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
_ERROR = "inferstream: error: "


class Worker:
    """One worker process in a process group of its own.  Start it in the main thread."""

    def __init__(self, config: Path, log: Path) -> None:
        """``log`` takes stdout and stderr.  Of our settings only ``config`` counts, not the environment's."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("INFERSTREAM_")}
        source = str(Path(inferstream.__file__).parents[1])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, environ.get("PYTHONPATH"))))
        environ["HF_HUB_OFFLINE"] = "1"  # the model is in a package: no hub is asked for anything
        self._log = log
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "-m", "inferstream", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                cwd=config.parent,  # `-m` looks in the working directory first, which is the user's
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL to the process group: no time is left for anything; returns when the worker is gone."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def terminate(self) -> None:
        """SIGTERM: it drains and ends by itself."""
        if self._process.poll() is None:
            self._process.terminate()

    def last_words(self, lines: int = 12) -> list[str]:
        """Its error if it gave one, else the end of its log."""
        try:
            said = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return []
        errors = [line.removeprefix(_ERROR) for line in said if line.startswith(_ERROR)]
        return errors[-1:] or said[-lines:]
