"""The demo as a whole, on the embedded broker: with a model that needs no torch, and once with the real one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inferstream.errors import InferstreamError
from inferstream.tools.demo import Options, run
from inferstream.tools.demo_view import PlainView
from tests.support.processes import kill_group, spawn

pytestmark = pytest.mark.embedded

SERVICE = Path(__file__).resolve().parents[1] / "service"
HASH = {"model": {"id": "builtin:hash"}}
COMMAND = [sys.executable, "-m", "inferstream", "demo"]


def environ(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(SERVICE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}


async def test_demo_when_the_worker_is_killed_then_nothing_is_missing() -> None:
    # A small buffer slows this model down to where it can be killed half-way.
    overrides = {**HASH, "buffer": {"max_documents": 64}, "delivery": {"max_uncommitted_documents": 1_000}}

    outcome = await run(Options(documents=3_000, overrides=overrides), PlainView())

    assert outcome.records_in == 3_005
    assert outcome.results == 3_003
    assert [letter.reason for letter in outcome.dead] == ["invalid_json", "missing_text"]
    assert outcome.missing == []
    assert outcome.killed is not None
    assert outcome.killed.pid != outcome.killed.successor
    assert 1_503 <= outcome.killed.answered < 3_005
    assert outcome.twice <= 1_000
    assert [len(found.neighbours) for found in outcome.found] == [3, 3, 3]


async def test_demo_when_nobody_is_killed_then_nothing_is_delivered_twice() -> None:
    own = ("What is a lane?", "And an epoch?")

    outcome = await run(Options(documents=50, kill=False, questions=own, overrides=HASH), PlainView())

    assert (outcome.results, outcome.missing, outcome.twice, outcome.killed) == (52, [], 0, None)
    assert [found.question for found in outcome.found] == list(own)


async def test_demo_when_the_worker_cannot_start_then_its_own_error_is_told() -> None:
    options = Options(documents=20, overrides={"model": {"id": "package:there_is_no_such_package"}})

    with pytest.raises(
        InferstreamError, match=r"worker \d+ ended with exit code 4: .*there_is_no_such_package"
    ):
        await run(options, PlainView())


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_demo_when_it_is_ended_then_its_worker_ends_too(
    number: signal.Signals, exit_code: int, tmp_path: Path
) -> None:
    log = tmp_path / "demo.log"
    process = spawn(COMMAND, log, environ(tmp_path))
    try:
        worker = int(_said(r"worker (\d+) is loading", log))

        started = time.monotonic()
        process.send_signal(number)

        assert process.wait(60) == exit_code
        assert time.monotonic() - started < 5
        deadline = time.monotonic() + 5
        while _runs(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(worker)
        assert "Traceback" not in log.read_text()
        if number != signal.SIGKILL:
            assert list(tmp_path.glob("inferstream-demo-*")) == []
    finally:
        kill_group(process)


@pytest.mark.model
@pytest.mark.slow
def test_demo_with_the_real_model_finds_the_nearest_docstrings(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*COMMAND, "--documents", "120", "--no-kill", "--ask", "How do I undo the compression of a file?"],
        env=environ(tmp_path),
        capture_output=True,
        text=True,
        timeout=110,
    )

    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^  in +123  120 docstrings, 1 questions, 2 poisoned documents$", ended.stdout, re.M)
    assert re.search(r"^  results +121 ", ended.stdout, re.M)
    assert re.search(r"^  missing +0$", ended.stdout, re.M)
    assert re.search(r"^    0\.\d\d  (bz2|gzip|lzma|zlib)", ended.stdout, re.M)
    assert "the first result: " in ended.stderr


def _said(pattern: str, log: Path) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and (found := re.search(pattern, log.read_text())):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the demo does not say {pattern!r}: {log.read_text()}")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
