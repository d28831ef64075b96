"""Write what is generated for operators: ``python -m ops``; with ``--check``, only say what is not current.

The catalogue of metrics in docs/operations.md comes from the code, the dashboards in ops/grafana from
:mod:`ops.dashboards`, and the chart's copies of rules and dashboards from those: Helm reads no file outside of a chart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from ops.catalogue import BEGIN, END, catalogue_table
from ops.dashboards import DASHBOARDS

ROOT = Path(__file__).resolve().parent.parent
MANUAL = ROOT / "docs" / "operations.md"
RULES = ROOT / "ops" / "prometheus" / "rules.yml"
GRAFANA = ROOT / "ops" / "grafana"
CHART_FILES = ROOT / "helm" / "inferstream" / "files"


def generated() -> Iterator[tuple[Path, str]]:
    """Every generated file and what it has to hold."""
    manual = MANUAL.read_text(encoding="utf-8")
    before, _, rest = manual.partition(BEGIN)
    _, _, after = rest.partition(END)
    yield MANUAL, f"{before}{BEGIN}\n{catalogue_table()}{END}{after}"
    yield CHART_FILES / "rules" / "inferstream.yaml", RULES.read_text(encoding="utf-8")
    for name, dashboard in DASHBOARDS.items():
        text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
        yield GRAFANA / f"{name}.json", text
        yield CHART_FILES / "dashboards" / f"{name}.json", text


def main() -> int:
    stale = [
        (path, text)
        for path, text in generated()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        if sys.argv[1:] == ["--check"]:
            print(f"{path.relative_to(ROOT)} is not current: run make chart", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if stale and sys.argv[1:] == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main())
