"""Other people's engines, each in an environment of its own: their pins contradict this project's, and one another's.

An environment is made once, with uv, from the pinned ``NAME.txt`` beside this file, and kept in the cache folder
under that file's hash and this Python's version; ``python -m benchmarks.peers NAME`` makes it and prints its
interpreter, or says in one line why there is none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL_S = 1200.0  # torch with CUDA over a slow line; seconds where uv has the wheels already
MADE = ".made"


class PeerUnavailable(Exception):
    """There is no environment for a peer here; the message says why, in one line."""


def environment_folder(name: str) -> Path:
    """Where the peer's environment is, or would be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferstream"
    pins = hashlib.sha256((HERE / f"{name}.txt").read_bytes()).hexdigest()[:16]
    return cache / f"peers-{name}-py{sys.version_info.major}{sys.version_info.minor}-{pins}"


def environment(name: str, *, make: bool = True) -> Path:
    """The interpreter of the peer's environment, made if ``make`` and it is not there.  Raises PeerUnavailable."""
    folder = environment_folder(name)
    python = folder / "bin" / "python"
    if (folder / MADE).exists():
        return python
    if not make:
        raise PeerUnavailable(f"it has no environment yet (python -m benchmarks.peers {name} makes it)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"peers-{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / MADE).exists():  # unless another run has made it while we waited
            _make(name, folder, python)
    return python


def _make(name: str, folder: Path, python: Path) -> None:
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise PeerUnavailable("uv is missing, which makes its environment (pip install uv)")
    print(f"{name}: making its environment, once ({folder})", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # what was broken off
    base = str(Path(sys._base_executable))  # type: ignore[attr-defined]  # of the interpreter that .venv is made with
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    for command in (
        [uv, "venv", "--quiet", "--no-config", "--python", base, str(folder)],
        [*install, "--only-binary", ":all:", "--require-hashes", "-r", str(HERE / f"{name}.txt")],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            raise PeerUnavailable(f"its environment was not made within {INSTALL_S:.0f} s") from None
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split()) or "nothing said"
            raise PeerUnavailable(f"its environment cannot be made: {said[:300]}")
    (folder / MADE).touch()
