"""What ``--json`` writes, and how several such files become one matrix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.run import Injection, Report
from tests.support.worker import ROOT


class NotOneMatrix(Exception):
    """The files do not belong together; the message says why."""


def digest_of_code() -> str:
    """Of the service and of what judges it: runs of different code are no one matrix."""
    found = hashlib.sha256()
    for folder in ("service", "tests/faults", "tests/support"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def written(reports: Sequence[Report], facts: dict[str, Any]) -> str:
    """The text of the file: ``facts`` about the whole, and every run and injection."""
    runs = [asdict(report) | {"replay": report.replay} for report in reports]
    return json.dumps(facts | {"code": digest_of_code(), "runs": runs}, indent=1) + "\n"


def merged(files: Sequence[Path]) -> list[Report]:
    """The runs of several files; NotOneMatrix if the code differs or a run is in two of them."""
    reports: dict[tuple[str, str, int, int], Report] = {}
    codes = set()
    for file in files:
        tree = json.loads(file.read_text())
        codes.add(tree["code"])
        for run in tree["runs"]:
            run.pop("replay")
            run["injections"] = [Injection(**injection) for injection in run["injections"]]
            report = Report(**run)
            key = (report.name, report.guarantee, report.seed, report.faults)
            if key in reports:
                raise NotOneMatrix(f"{file} has a run that another file has too: {report.replay}")
            reports[key] = report
    if len(codes) > 1:
        raise NotOneMatrix("the files are of different code (of service/, tests/faults/ or tests/support/)")
    return list(reports.values())
