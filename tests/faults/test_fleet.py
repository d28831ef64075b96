"""Which ends of a worker are excused, and that a handler for SIGTERM is seen from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.fleet import Fleet, catches

SIGTERMED = -int(signal.SIGTERM)


@pytest.mark.parametrize(
    ("code", "told", "excused", "unheard", "joined", "finding"),
    [
        (0, {0}, set(), False, True, False),
        (SIGTERMED, {0}, set(), False, True, True),  # its handler is lost
        (3, {0}, set(), False, True, True),
        (6, {0}, set(), False, True, True),
        (6, {0}, set(), True, True, False),
        (6, set(), set(), True, True, True),  # nobody told it to drain
        (3, set(), set(), True, False, False),
        (3, set(), set(), True, True, True),  # it was in the group already
        (5, set(), {5}, False, True, False),
        (8, set(), {5}, False, True, True),
        (0, set(), set(), False, True, True),
    ],
)
def test_end_when_the_fault_does_not_explain_it_then_it_is_a_finding(
    tmp_path: Path, code: int, told: set[int], excused: set[int], unheard: bool, joined: bool, finding: bool
) -> None:
    fleet = Fleet(tmp_path, lambda name: {}, False, lambda line: None)
    fleet.unheard = unheard
    ended: Any = SimpleNamespace(
        name="worker-1",
        starts=1,
        told=told,
        excused=excused,
        joined=joined,
        worker=SimpleNamespace(returncode=code, stderr_text=lambda: ""),
    )
    fleet.members.append(ended)
    fleet._ended(ended)
    assert bool(fleet.problems) == finding


def test_excuses_when_the_fault_is_over_then_hold_no_more(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, lambda name: {}, False, lambda line: None)
    member: Any = SimpleNamespace(excused={5})
    fleet.members.append(member)
    fleet.excused, fleet.unheard = frozenset({3}), True
    fleet.settle()
    assert not (fleet.excused or fleet.unheard or member.excused)


@pytest.mark.parametrize("handled", [True, False])
def test_catches_when_a_process_has_a_handler_then_it_is_seen(handled: bool) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: None); " * handled
    code = f"import signal, sys; {handler}print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert catches(process.pid, signal.SIGTERM) == handled
        process.kill()
