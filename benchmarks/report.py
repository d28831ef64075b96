"""What a run found, as Markdown for people and JSON for machines; ratios and goals come first."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that was measured, held against what it should be; reported, never enforced."""

    name: str
    measured: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        unit = f" {self.unit}" if self.unit else ""
        return [
            self.name,
            f"{number(self.measured)}{unit}",
            f"{sign} {number(self.bound)}{unit}",
            "met" if self.met else "**missed**",
        ]


@dataclass(slots=True)
class Section:
    """One benchmark's findings; ``data`` is what the JSON holds beside the goals."""

    title: str
    goals: list[Goal] = field(default_factory=list)
    ratios: list[list[str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        parts = [f"## {self.title}"]
        if self.goals:
            parts.append(table(["", "measured", "goal", ""], [goal.row() for goal in self.goals]))
        return "\n\n".join([*parts, *self.text])

    def as_json(self) -> dict[str, Any]:
        goals = [{**asdict(goal), "met": goal.met} for goal in self.goals]
        return {"title": self.title, "goals": goals, **self.data}


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run.  ``how`` is the command that made it, ``took_s`` its time in seconds."""

    how: str
    took_s: float
    hardware: dict[str, str]
    versions: dict[str, str]
    documents: dict[str, Any]
    sections: dict[str, Section]

    @property
    def goals(self) -> list[Goal]:
        return [goal for section in self.sections.values() for goal in section.goals]

    def summary(self) -> str:
        """The goals alone."""
        return table(["", "measured", "goal", ""], [goal.row() for goal in self.goals])

    def markdown(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.documents.items())
        head = [
            "# Performance",
            f"Written by `{self.how}` in {self.took_s / 60:.0f} min. Ratios compare both sides on the same documents, "
            "side by side on the same machine; times are medians of interleaved rounds. A goal that is missed is said "
            "to be missed and fails nothing.",
            self.summary(),
            table(["machine", ""], [[name, value] for name, value in self.hardware.items()]),
            "Versions: " + ", ".join(f"{name} {value}" for name, value in self.versions.items()) + ".",
            f"Documents: docstrings of the standard library and of installed packages ({facts}).",
        ]
        return "\n\n".join([*head, *(section.markdown() for section in self.sections.values())]) + "\n"

    def json(self) -> str:
        tree = {
            "command": self.how,
            "took_s": round(self.took_s, 1),
            "hardware": self.hardware,
            "versions": self.versions,
            "documents": self.documents,
            "goals_met": sum(goal.met for goal in self.goals),
            "goals": len(self.goals),
            "sections": {name: section.as_json() for name, section in self.sections.items()},
        }
        return json.dumps(tree, indent=2) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """As many digits as a reader needs."""
    if value and abs(value) < 0.1:
        return f"{value:.3f}"
    if abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round: what slows a whole round down cancels out."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
