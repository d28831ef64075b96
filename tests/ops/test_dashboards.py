"""The dashboards: generated, of metrics that exist, in queries that parse, and laid out so that all is seen."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferstream.telemetry.metrics import catalogue
from ops.__main__ import GRAFANA, ROOT, generated
from ops.catalogue import series_names
from tests.ops.test_rules import promtool
from tests.support.grafana import in_prometheus, panels_of, queries_of
from tests.support.promql import metric_names

DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))
}
QUERIES = [
    pytest.param(query, id=f"{name}: {panel['title']} {target['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for panel, target, query in queries_of(dashboard)
]


def test_generated_files_when_compared_then_they_are_current() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in generated() if path.read_text() != text]

    assert not stale, "run: PYTHONPATH=service python -m ops"


def test_chart_when_it_has_copies_then_there_are_no_others() -> None:
    files = ROOT / "helm/inferstream/files"
    expected = {path for path, _ in generated()}

    assert {path for path in files.rglob("*") if path.is_file()} <= expected
    assert set(GRAFANA.glob("*.json")) <= expected


@pytest.mark.parametrize("query", QUERIES)
def test_query_when_it_names_a_metric_then_there_is_one(query: str) -> None:
    names = metric_names(query)

    assert names
    assert names <= series_names()


def test_queries_when_put_together_then_they_show_every_metric() -> None:
    """What no dashboard shows is either missing there or of no use."""
    shown = {name for parameter in QUERIES for name in metric_names(str(parameter.values[0]))}

    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} | shown
    assert {entry.name for entry in catalogue()} <= bases


def test_queries_when_promtool_reads_them_then_each_parses(tmp_path: Path) -> None:
    queries = [str(parameter.values[0]) for parameter in QUERIES]
    rules = [{"record": f"q:{n}", "expr": in_prometheus(query)} for n, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))

    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout

    rules[0]["expr"] += " by"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert promtool("check", "rules", path).returncode != 0


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_panels_when_laid_out_then_none_covers_another_and_each_explains_itself(
    dashboard: dict[str, Any],
) -> None:
    panels = panels_of(dashboard)
    places = {
        panel["id"]: {
            (x, y)
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        }
        for panel in dashboard["panels"]
    }

    assert len(places) == len(dashboard["panels"])
    assert max(x for place in places.values() for x, _ in place) < 24
    assert not [pair for pair in itertools.combinations(places, 2) if places[pair[0]] & places[pair[1]]]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"].endswith(".") for panel in panels)


TARGET = {"namespace", "job", "pod", "instance"}  # labels that scraping puts on


def labels_of(query: str) -> set[str]:
    """The labels that a query's answer has: what its outermost aggregation keeps, or all of its metrics'."""
    # These two hand on what they are given; and a quantile is of `le`, which it uses up.
    inner = re.sub(r"^(?:topk|histogram_quantile)\([^,]*, ", "", query).lstrip("(")
    aggregated = re.match(r"(?:sum|avg|min|max|count|group)\b\s*(?:by \(([^)]*)\))?", inner)
    if aggregated:
        return set(filter(None, re.split(r",\s*", aggregated[1] or ""))) - {"le"}
    names = metric_names(query)
    return TARGET | {label for entry in catalogue() if entry.name in names for label in entry.labels}


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("sum by (topic) (max by (topic, partition) (x{}))", {"topic"}),
        ("sum(max by (topic, partition) (x{}))", set()),
        ("topk(10, max by (job, topic) (x))", {"job", "topic"}),
        ("histogram_quantile(0.9, sum by (le, pod) (rate(x_bucket[5m])))", {"pod"}),
        ("(sum by (stage) (x) / scalar(sum(y)))", {"stage"}),
        ("rate(inferstream_dead_letters_total{}[5m])", {*TARGET, "reason", "stage"}),
        ("inferstream_lag_records{}", {*TARGET, "topic", "partition"}),
    ],
)
def test_labels_when_read_from_a_query_then_they_are_those_of_its_answer(
    query: str, labels: set[str]
) -> None:
    assert labels_of(query) == labels


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_legends_when_they_name_a_label_then_the_query_keeps_it(dashboard: dict[str, Any]) -> None:
    named = 0
    for panel, target, query in queries_of(dashboard):
        labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert labels <= labels_of(query), panel["title"]
        # The name that kubectl knows a worker by, where it has one.
        assert ("pod" in labels) == ("instance" in labels), panel["title"]
        named += bool(labels)
    assert named


def test_dashboards_when_listed_then_each_has_its_own_name_and_lets_choose_the_workers() -> None:
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS) == 3
    for dashboard in DASHBOARDS.values():
        variables = [variable["name"] for variable in dashboard["templating"]["list"]]
        assert variables == ["datasource", "namespace", "job", "instance"]
        for _, target, query in queries_of(dashboard):
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", query)) <= {*variables, "__rate_interval", "__range"}
            assert "@" not in query
