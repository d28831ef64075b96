"""Puts a matrix where readers look for it: docs/faults.md, and a shorter one in README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import hardware
from benchmarks.publish import replace_marked
from tests.faults.matrix import markdown, summary
from tests.faults.run import Report
from tests.support.worker import ROOT


def publish(reports: Sequence[Report], minutes: float, seeds: Sequence[int], root: Path = ROOT) -> None:
    """Replace what stands between the marks FAULTS of either page; ValueError where they are not."""
    machine = hardware()
    caption = (
        f"{sum(len(report.counted) for report in reports)} faults in {minutes:.0f} minutes on {machine['cores']} cores "
        f"({machine['cpu']}, {machine['memory']}), seed {', '.join(map(str, seeds))}:"
    )
    replace_marked("docs/faults.md", "FAULTS", f"{caption}\n\n{markdown(reports).rstrip()}", root)
    replace_marked("README.md", "FAULTS", f"{caption}\n\n{summary(reports)}", root)
