"""What the chart makes of the project's rules: of the release that it knows, and with runbooks at an address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import refusal, render
from tests.ops.test_rules import ALERTS, promtool

RULES = "metrics: {prometheusRule: {enabled: true}}"
# Monitor → the job that the Prometheus operator makes of it (its promcfg.go: generateServiceMonitorConfig and
# generatePodMonitorConfig); the namespace is the targets' own in both.
JOBS = {"serviceMonitor": "x-inferstream", "podMonitor": "search/x-inferstream"}


def groups_of(*changes: str) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = render(RULES, *changes).one("PrometheusRule")["spec"]["groups"]
    return groups


def alerts_of(*changes: str) -> dict[str, dict[str, Any]]:
    return {
        rule["alert"]: rule for group in groups_of(*changes) for rule in group["rules"] if "alert" in rule
    }


def fires(name: str, *, minutes: int, **labels: str) -> dict[str, Any]:
    """A case of promtool's; without labels, the alert is not to fire."""
    rule = alerts_of()[name]
    alert = {
        "exp_labels": {"severity": rule["labels"]["severity"], "namespace": "search", **labels},
        "exp_annotations": {
            note: text.replace("{{ $labels.job }}", labels.get("job", "")).replace(
                "{{ or $labels.pod $labels.instance }}", labels.get("pod", "")
            )
            for note, text in rule["annotations"].items()
        },
    }
    return {"alertname": name, "eval_time": f"{minutes}m", "exp_alerts": [alert] if labels else []}


@pytest.mark.parametrize("monitor", JOBS)
def test_release_when_its_monitor_is_known_then_it_is_missed_though_it_never_came_up(
    monitor: str, tmp_path: Path
) -> None:
    job = JOBS[monitor]
    up = f'up{{namespace="search", job="{job}", instance="10.0.0.1:9464", pod="p"}}'
    well = f'inferstream_build_info{{namespace="search", job="{job}", instance="10.0.0.1:9464", pod="p"}}'
    target = {"job": job, "instance": "10.0.0.1:9464", "pod": "p"}
    # Others of its name or its namespace are there all the time, or have never been.
    others = [
        {"series": 'inferstream_build_info{namespace="search", job="y", instance="b"}', "values": "1x1600"},
        {"series": f'inferstream_build_info{{namespace="n", job="{job}", instance="c"}}', "values": "1x1600"},
        {"series": f'up{{namespace="n", job="{job}", instance="d"}}', "values": "0x1600"},
        {"series": 'up{namespace="search", job="database", instance="e"}', "values": "0x1600"},
    ]
    absent, down = "InferstreamAbsent", "InferstreamTargetDown"
    scenarios: list[tuple[str, list[dict[str, str]], list[dict[str, Any]]]] = [
        (
            "no pod was ever scheduled",
            [],
            [fires(absent, minutes=4), fires(absent, minutes=6, job=job), fires(down, minutes=6)],
        ),
        (
            "it crashes before it serves metrics",
            [{"series": up, "values": "0x1600"}],
            [fires(absent, minutes=6, job=job), fires(down, minutes=6, **target)],
        ),
        (
            "it went away more than a day ago",
            [
                {"series": up, "values": "1x30 0x1600"},
                {"series": well, "values": "1x30 stale _x1600"},
            ],
            [
                fires(absent, minutes=30),
                fires(down, minutes=30),
                fires(absent, minutes=1560, job=job),
                fires(down, minutes=1560, **target),
            ],
        ),
    ]
    two = [
        {
            "name": "two",
            "rules": [rule for name, rule in alerts_of(enabled(monitor)).items() if name in (absent, down)],
        }
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": two}))
    tests = [
        {"name": name, "interval": "1m", "input_series": [*others, *series], "alert_rule_test": cases}
        for name, series, cases in scenarios
    ]
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests})
    )

    done = promtool("test", "rules", file)

    assert done.returncode == 0, done.stdout


def enabled(monitor: str, more: str = "") -> str:
    return f"metrics: {{{monitor}: {{enabled: true, {more}}}}}"


@pytest.mark.parametrize("monitor", JOBS)
def test_rules_when_the_release_is_known_then_promtool_finds_nothing_wrong(
    monitor: str, tmp_path: Path
) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": groups_of(enabled(monitor))}))

    done = promtool("check", "rules", "--lint=all", "--lint-fatal", file)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("monitor", JOBS)
@pytest.mark.parametrize("list_of", ["relabelings", "metricRelabelings"])
def test_alerts_when_the_job_is_rewritten_or_nobody_scrapes_then_they_ask_for_what_was_seen(
    monitor: str, list_of: str
) -> None:
    rewritten = enabled(monitor, f"{list_of}: [{{targetLabel: job, replacement: embedder}}]")
    harmless = enabled(monitor, f"{list_of}: [{{targetLabel: node, replacement: n}}]")

    assert alerts_of() == ALERTS
    assert alerts_of(rewritten) == ALERTS
    assert {name for name, rule in alerts_of(harmless).items() if rule != ALERTS[name]} == {
        "InferstreamAbsent",
        "InferstreamTargetDown",
    }


@pytest.mark.parametrize("page", ["https://docs.example.com/operations/", "http://x/y/operations.md#"])
def test_runbooks_when_they_have_an_address_then_each_alert_leads_to_its_own(page: str) -> None:
    alerts = alerts_of(f"metrics: {{prometheusRule: {{runbookUrl: '{page}'}}}}")

    assert set(alerts) == set(ALERTS)
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"{page.removesuffix('#')}#{name.lower()}"
        assert "runbook" not in rule["annotations"]
        same = {note: text for note, text in ALERTS[name]["annotations"].items() if note != "runbook"}
        assert same.items() <= rule["annotations"].items()


def test_runbooks_when_the_address_is_none_then_it_is_refused() -> None:
    for wrong in ("docs/operations.md", "https://x/#part"):
        assert "runbookUrl" in refusal(f"metrics: {{prometheusRule: {{runbookUrl: '{wrong}'}}}}")
