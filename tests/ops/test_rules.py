"""The rules of Prometheus: each parses, is of metrics that exist, is tested, and has its runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferstream.telemetry.metrics import catalogue
from ops.catalogue import series_names
from tests.helm.tools import present
from tests.support.promql import metric_names

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ops" / "prometheus"
MANUAL = ROOT / "docs" / "operations.md"
GROUPS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
TESTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "tests.yml").read_text())["tests"]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = present("promtool")
    if command is None:
        pytest.skip(
            "no promtool: `python -m tests.helm.tools promtool` builds it; Debian has it in the package prometheus"
        )
    # In one stream: what it says of which file differs from version to version.
    return subprocess.run(
        [command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("up == 0", {"up"}),
        (
            'sum by (job, le) (rate(a_bucket{le="0.1", x=~"b|c"}[5m])) / on (job) group_left (up) d',
            {"a_bucket", "d"},
        ),
        ("histogram_quantile(0.99, a:b:c) > 1e3 and e offset 1h unless nan", {"a:b:c", "e"}),
        ("topk(10, max by (a) (b)) or vector(0) + scalar(sum(c))", {"b", "c"}),
        ('time() - min(x{a="f(y) z"}) > bool 5m', {"x"}),
    ],
)
def test_names_when_read_from_a_query_then_they_are_its_metrics(query: str, names: set[str]) -> None:
    assert metric_names(query) == names


@pytest.mark.parametrize("rule", RULES, ids=[rule.get("alert") or rule["record"] for rule in RULES])
def test_rule_when_it_names_a_metric_then_there_is_one(rule: dict[str, Any]) -> None:
    names = metric_names(rule["expr"])

    assert names
    assert names <= series_names() | set(RECORDED) | {"up"}


@pytest.mark.parametrize("rule", RULES, ids=[rule.get("alert") or rule["record"] for rule in RULES])
def test_rule_when_it_speaks_of_labels_then_its_metrics_have_them(rule: dict[str, Any]) -> None:
    entries = {entry.name: entry for entry in catalogue()}
    known = {"namespace", "job", "pod", "instance", "le"}
    for name in metric_names(rule["expr"]):
        entry = entries.get(re.sub(r"_(bucket|sum|count)$", "", name)) or entries.get(name)
        known |= set(entry.labels) if entry else set()
    clauses = re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", rule["expr"])
    clauses += re.findall(r"\{([^}]*)\}", rule["expr"])
    used = {label for clause in clauses for label in re.findall(r"\b([a-z_]+)\b(?=\s*(?:,|$|=|!))", clause)}

    assert used <= known


@pytest.mark.parametrize("name", ALERTS)
def test_alert_when_it_fires_then_it_says_what_is_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    annotations = rule["annotations"]

    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert annotations["summary"].endswith(".") and annotations["description"].endswith(".")
    assert annotations["runbook"] == f"docs/operations.md#{name.lower()}"
    texts = annotations["summary"] + annotations["description"]
    said = set(re.findall(r"\$labels\.(\w+)", texts))
    assert said <= {"job", "pod", "instance", "topic"}
    # A worker is named as kubectl names it, where it has such a name.
    assert texts.count("$labels.instance") == texts.count("{{ or $labels.pod $labels.instance }}")
    assert f"\n### {name}\n" in MANUAL.read_text()


@pytest.mark.parametrize("name", ALERTS)
def test_alert_when_tested_then_it_is_seen_to_fire_and_to_be_silent(name: str) -> None:
    cases = [case for test in TESTS for case in test.get("alert_rule_test", ()) if case["alertname"] == name]

    assert any(case.get("exp_alerts") for case in cases)
    assert any(not case.get("exp_alerts") for case in cases)


def test_recorded_when_no_alert_looks_at_them_then_they_are_not_there() -> None:
    used = {name for rule in RULES for name in metric_names(rule["expr"])}

    assert set(RECORDED) <= used


def test_manual_when_it_has_a_runbook_then_there_is_such_an_alert() -> None:
    assert set(re.findall(r"^### (Inferstream\w+)$", MANUAL.read_text(), re.MULTILINE)) == set(ALERTS)


def test_promtool_when_it_reads_the_rules_then_it_finds_nothing_wrong() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", FOLDER / "rules.yml")

    assert done.returncode == 0, done.stdout


def test_promtool_when_it_runs_the_tests_then_they_pass() -> None:
    done = promtool("test", "rules", FOLDER / "tests.yml", FOLDER / "tests-of-days.yml")

    assert done.returncode == 0, done.stdout


# A change of each alert, and the alert that no test would then describe any more.
SPOILED = {
    "InferstreamAbsent": ("unless on (namespace, job)", "and on (namespace, job)"),
    "InferstreamTargetDown": ("up == 0", "up == 1"),
    "InferstreamRestarting": ("> 2", "> 1"),
    "InferstreamMemoryNearLimit": ("> 0.9", "> 0.4"),
    "InferstreamEventLoopLate": ("0.99", "0.9"),
    "InferstreamNoProgress": (
        "max_over_time(namespace_job:inferstream_committed_lag_records:sum[5m])",
        "0 *",
    ),
    "InferstreamWorkerStuck": ("(max_over_time(inferstream_committed_lag_records[5m])) > 0", "(up) > 0"),
    "InferstreamNothingAssigned": (" (inferstream_device_lanes) > 0", " (inferstream_device_lanes) >= 0"),
    "InferstreamLagGrowsDeviceIdle": ("60 *", "0 *"),
    "InferstreamLagGrowsDeviceBusy": (">= 0.8", ">= 0.2"),
    "InferstreamRebalancing": ("2 *", "0 *"),
    "InferstreamWorkerWithoutPartitions": ("== 0 and", ">= 0 and"),
    "InferstreamDeadLetters": (">= 5", ">= 1"),
    "InferstreamDocumentKillsWorker": ("< 3600", "< 0"),
    "InferstreamCommitsFailing": ("> 0.5", "> 0"),
    "InferstreamRecordsLost": ("unless", "and"),
}


def test_tests_when_an_alert_is_spoiled_then_they_fail(tmp_path: Path) -> None:
    assert set(SPOILED) == set(ALERTS)
    for name, (old, new) in SPOILED.items():
        assert old in ALERTS[name]["expr"], name
        spoiled = {**ALERTS[name], "expr": ALERTS[name]["expr"].replace(old, new)}
        for kind, rule in (("as it is", ALERTS[name]), ("spoiled", spoiled)):
            alone(tmp_path / f"{name} {kind}.yml", rule)

    files = sorted(tmp_path.glob("Inferstream*.yml"))

    verdicts = re.findall(r"^  (SUCCESS|FAILED)", promtool("test", "rules", *files).stdout, re.MULTILINE)

    expected = {file.stem: "FAILED" if file.stem.endswith(" spoiled") else "SUCCESS" for file in files}
    assert dict(zip(expected, verdicts, strict=True)) == expected


def alone(path: Path, rule: dict[str, Any]) -> None:
    """Write the tests of one alert, and rules with that one alone: all of them for each would take a minute."""
    rules = path.with_name(f"rules of {path.name}")
    groups = [{"name": "one", "rules": [*RECORDED.values(), rule]}]
    rules.write_text(yaml.safe_dump({"groups": groups}))
    tests = []
    for test in TESTS:
        cases = [case for case in test.get("alert_rule_test", ()) if case["alertname"] == rule["alert"]]
        if cases:
            tests.append({**test, "alert_rule_test": cases, "promql_expr_test": []})
    path.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": tests}))
