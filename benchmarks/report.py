"""What a run found, as Markdown for people and JSON for machines; ratios and goals come first."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GOALS = ("", "measured", "lowest – highest", "goal", "")


@dataclass(frozen=True, slots=True)
class Spread:
    """What several rounds gave."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    @property
    def range(self) -> str:
        return f"{number(self.lowest)} – {number(self.highest)}"

    def covers(self, value: float) -> bool:
        """Whether some rounds lie on either side of ``value``: they do not tell it from what was measured."""
        return self.lowest <= value <= self.highest


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that was measured, held against what it should be; reported, never enforced."""

    name: str
    measured: float
    bound: float
    at_least: bool
    unit: str = ""
    spread: Spread | None = None  # of the rounds, where it is the median of several

    @classmethod
    def of_rounds(
        cls, name: str, rounds: Sequence[float], bound: float, at_least: bool, unit: str = ""
    ) -> Goal:
        """A goal for the median of the rounds."""
        spread = Spread.of(rounds)
        return cls(name, spread.median, bound, at_least, unit, spread)

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        unit = f" {self.unit}" if self.unit else ""
        return [
            self.name,
            f"{number(self.measured)}{unit}",
            f"{self.spread.range}{unit}" if self.spread is not None else "",
            f"{sign} {number(self.bound)}{unit}",
            "met" if self.met else "**missed**",
        ]


@dataclass(slots=True)
class Section:
    """One benchmark's findings; ``data`` is what the JSON holds beside the goals."""

    title: str
    goals: list[Goal] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.body()}"

    def body(self) -> str:
        """What stands below the title."""
        goals = [table(GOALS, [goal.row() for goal in self.goals])] if self.goals else []
        return "\n\n".join([*goals, *self.text])

    def as_json(self) -> dict[str, Any]:
        goals = [{**asdict(goal), "met": goal.met} for goal in self.goals]
        return {"title": self.title, "took_s": round(self.took_s, 1), "goals": goals, **self.data}


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
        return table(GOALS, [goal.row() for goal in self.goals])

    def markdown(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.documents.items())
        head = [
            "# Performance",
            f"Written by `{self.how}` in {self.took_s / 60:.0f} min. Ratios compare both sides on the same documents, "
            "side by side on the same machine; times are medians of interleaved rounds. A ratio is formed within each "
            "round, of two runs beside each other, and the median of these is given, with the lowest and the highest: "
            "it is not the quotient of two medians of a table, which may come from different rounds. Where lowest – "
            "highest covers 1.00, the rounds do not tell the two apart. A goal that is missed is said to be missed "
            "and fails nothing.",
            self.summary(),
            table(["machine", ""], [[name, value] for name, value in self.hardware.items()]),
            "Versions: " + ", ".join(f"{name} {value}" for name, value in self.versions.items()) + ".",
            f"Documents: docstrings of the standard library and of installed packages ({facts}).",
        ]
        sections = [section.markdown() for section in self.sections.values()]
        return "\n\n".join([*head, *sections, self.times()]) + "\n"

    def times(self) -> str:
        """How long each section took, and what is none of them: the broker's start, reading the documents."""
        rows = [[section.title, number(section.took_s)] for section in self.sections.values()]
        rest = self.took_s - sum(section.took_s for section in self.sections.values())
        rows += [["what is none of these", number(rest)], ["in all", number(self.took_s)]]
        return "## How long it took\n\n" + table(["", "seconds"], rows)

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


def round_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio within each round: what slows a whole round down cancels out."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(round_ratios(ours, theirs))
