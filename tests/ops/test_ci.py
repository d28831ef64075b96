"""What CI relies on: the verdict of .ci/run, with a make that only leaves a report; and the tools that tests need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helm import tools
from tests.ops.test_rules import ROOT

MAKE = """#!/usr/bin/env bash
if [ "${!#}" = test ]; then
  report=${PYTEST_ADDOPTS#--junitxml=}
  cp report.xml "${report%% *}"
  echo "==== 5 passed in 3.00s ===="
fi
"""
BROKER = "<properties><property name='marker' value='kafka'/></properties>"
SKIPPED = "<skipped/>"
REAL, OPS, COMPOSE = (
    ("tests.kafka.test_a", BROKER),
    ("tests.ops.test_rules", ""),
    ("tests.compose.test_b", ""),
)
CHART = ("tests.helm.test_c", "")
NOT_TESTED = "==== 5 passed in 3.00s ==== chart: NOT TESTED"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with .ci/run, a make and an interpreter."""
    for folder in (".ci", ".venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    make = tmp_path / "bin/make"
    make.write_text(MAKE)
    make.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("cases", "without_chart", "passes", "last"),
    [
        ([REAL, OPS, COMPOSE, CHART], "", True, "==== 5 passed in 3.00s ===="),
        ([REAL, OPS, COMPOSE, CHART], "1", True, "==== 5 passed in 3.00s ===="),
        ([REAL, OPS, COMPOSE], "", False, "==== 5 passed in 3.00s ===="),
        ([REAL, OPS, COMPOSE], "1", True, NOT_TESTED),
        (
            [REAL, OPS, COMPOSE, CHART, ("tests.helm.test_c", SKIPPED)],
            "1",
            False,
            "==== 5 passed in 3.00s ====",
        ),
        ([REAL, OPS, ("tests.ops.test_rules", SKIPPED), COMPOSE], "1", False, NOT_TESTED),
        ([REAL, OPS, ("tests.compose.test_b", SKIPPED), CHART], "", False, "==== 5 passed in 3.00s ===="),
        ([OPS, COMPOSE, CHART], "", False, "==== 5 passed in 3.00s ===="),
        ([REAL, CHART], "", False, "==== 5 passed in 3.00s ===="),
    ],
    ids=[
        "all ran",
        "all ran though the chart need not",
        "none of the chart",
        "none of the chart as is meant",
        "one of the chart skipped",
        "one of the rules skipped",
        "one of the compose file skipped",
        "none on a broker",
        "none of rules and compose file",
    ],
)
def test_verdict_when_some_tests_did_not_run_then_it_is_what_may_be_left_out(
    checkout: Path, cases: list[tuple[str, str]], without_chart: str, passes: bool, last: str
) -> None:
    text = "".join(f"<testcase classname='{where}' name='test'>{what}</testcase>" for where, what in cases)
    (checkout / "report.xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    environ = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "CI_WITHOUT_CHART": without_chart}

    done = subprocess.run([checkout / ".ci/run"], env=environ, capture_output=True, text=True, timeout=60)

    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert ("ci: passed" in done.stdout) == passes
    assert done.stdout.splitlines()[-1] == last


@pytest.mark.parametrize("on_the_path", [True, False])
def test_tools_when_the_tests_need_them_then_those_for_the_rules_are_built_unless_they_are_here(
    on_the_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(name: str) -> Path:
        built.append(name)
        return tmp_path / name

    (tmp_path / "bin").mkdir()
    for name in tools.FOR_RULES if on_the_path else ():
        command = tmp_path / "bin" / name
        command.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tools, "tool", build)
    monkeypatch.setattr(tools, "crd_files", tuple)
    monkeypatch.setattr(sys, "argv", ["tools"])

    assert tools.main() == 0
    assert {"promtool", "prometheus"}.isdisjoint(built) == on_the_path
    assert {"helm3", "helm4", "kube-score", "helm-docs"} <= set(built)
