"""Child processes that never outlive the test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Asks the kernel to kill this process when the thread that started it dies (a killed pytest cleans nothing),
# then becomes the command.  Done in a small Python of its own and not in preexec_fn: that would run between
# fork and exec in a process with torch's threads, where it may dead-lock.  PR_SET_PDEATHSIG is 1.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test run that started this process is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def spawn(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None, stdout: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own.

    Its stderr is appended to ``log``; stdout goes there too unless it is given a file of its own.
    """
    with log.open("ab") as err, (stdout or log).open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=None if environ is None else dict(environ),
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all its children; returns when the process is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
