"""Puts what a run printed where readers look: docs/performance.md, and the marked tables of README and docs/cpu.md."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report import Report

ROOT = Path(__file__).resolve().parents[1]


def publish(report: Report, root: Path = ROOT) -> None:
    """Replace what stands there; raises ValueError where a mark is missing."""
    (root / "docs" / "performance.md").write_text(report.markdown())
    replace_marked("README.md", "MEASURED", report.summary(), root)
    for name in ("overlap", "prefetch"):
        if name in report.sections:
            replace_marked("docs/cpu.md", name.upper(), report.sections[name].body(), root)


def replace_marked(path: str, name: str, text: str, root: Path = ROOT) -> None:
    """Put ``text`` between the marks ``name`` of a page; raises ValueError unless they are there once."""
    page = root / path
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    replaced, count = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page}: {begin} … {end} is there {count} times")
    page.write_text(replaced)
