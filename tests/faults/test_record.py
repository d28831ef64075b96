"""Files of ``--json`` become one matrix only where they belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.record import NotOneMatrix, merged, written
from tests.faults.run import Injection, Report


def report(seed: int = 1, name: str = "kill") -> Report:
    injection = Injection(name, results_before=5, left=900, since=1.0, undone=2.0, until=3.0, pause_s=0.5)
    return Report(name, "at-least-once", seed, 1, [injection], documents=10, problems=["one of a kind"])


def file(path: Path, *reports: Report, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(written(reports, {"seed": 1})) | changes))
    return path


def test_merged_when_the_code_is_one_then_gives_every_run_as_it_was(tmp_path: Path) -> None:
    files = [file(tmp_path / "a", report(1), report(2)), file(tmp_path / "b", report(1, "zombie"))]
    assert merged(files) == [report(1), report(2), report(1, "zombie")]


def test_merged_when_the_code_differs_then_refuses(tmp_path: Path) -> None:
    files = [file(tmp_path / "a", report(1)), file(tmp_path / "b", report(2), code="another")]
    with pytest.raises(NotOneMatrix, match="different code"):
        merged(files)


def test_merged_when_a_run_is_there_twice_then_refuses(tmp_path: Path) -> None:
    files = [file(tmp_path / "a", report(1)), file(tmp_path / "b", report(1))]
    with pytest.raises(NotOneMatrix, match="--seed 1"):
        merged(files)
