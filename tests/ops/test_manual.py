"""docs/operations.md and docs/tuning.md: what they speak of is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inferstream import errors
from inferstream.settings import SETTINGS
from inferstream.telemetry.recent import LIMITS
from tests.ops.test_dashboards import DASHBOARDS
from tests.ops.test_rules import ALERTS, MANUAL, ROOT
from tests.support.grafana import panels_of

TUNING = ROOT / "docs" / "tuning.md"
ELSEWHERE = {"Pending", "Last State", "OOMKilled"}  # words of Kubernetes

# Dashboard → what it shows: titles of panels, and legends.
SHOWN = {
    dashboard["title"].removeprefix("inferstream: "): {
        name
        for panel in panels_of(dashboard)
        for name in (panel["title"], *(target["legendFormat"] for target in panel["targets"]))
    }
    for dashboard in DASHBOARDS.values()
}
PAGES = [MANUAL, TUNING, ROOT / "docs" / "upgrading.md"]


VALUES = {"model.storage.claim"}  # of the chart, beside its settings


def prose(page: Path) -> str:
    """A page without code, in one line, and without what is bold."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL).replace("**", "")
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_when_it_names_a_panel_then_there_is_one(page: Path) -> None:
    named = set(re.findall(r"\*([^*]+)\*", prose(page)))

    severities = {f"{rule['labels']['severity']}." for rule in ALERTS.values()}
    assert named - severities - ELSEWHERE
    assert named <= set(SHOWN).union(*SHOWN.values()) | severities | ELSEWHERE


def test_pages_when_they_say_on_which_dashboard_then_the_panel_is_there() -> None:
    panel = r"\*[^*]+\*"
    places = [
        (name, dashboard)
        for page in PAGES
        for panels, dashboard in re.findall(rf"((?:{panel} and )?{panel}) on \*([^*]+)\*", prose(page))
        for name in re.findall(r"\*([^*]+)\*", panels)
    ]

    assert places
    assert [place for place in places if place[0] not in SHOWN[place[1]]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_when_it_names_a_setting_then_there_is_one(page: Path) -> None:
    sections = "|".join(sorted({key.partition(".")[0] for key in SETTINGS}))
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)`", page.read_text()))

    assert named
    assert named <= {*SETTINGS, *VALUES}


def test_exit_codes_when_listed_then_all_of_the_code_are_there() -> None:
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.InferstreamError)
    }
    section = MANUAL.read_text().partition("\n## Exit codes\n")[2].partition("\n## ")[0]

    assert codes | {0, 130, 137} == {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}


def test_decision_path_when_a_stage_can_limit_then_it_says_what_to_do() -> None:
    section = MANUAL.read_text().partition("\n## The decision path\n")[2].partition("\n## ")[0]

    assert set(LIMITS) == set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    headings = set(re.findall(r"^## (\w+)$", TUNING.read_text(), re.MULTILINE))
    assert {stage.capitalize() for stage in LIMITS} - {"Input"} <= headings


def test_alerts_when_they_have_a_severity_then_the_runbook_says_the_same() -> None:
    for name, rule in ALERTS.items():
        section = MANUAL.read_text().partition(f"\n### {name}\n")[2]
        assert section.lstrip().startswith(f"*{rule['labels']['severity']}.*"), name
