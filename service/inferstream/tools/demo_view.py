"""What one sees while the demo runs: a live table on a terminal, a plain line every 5 s otherwise.

Everything here goes to stderr; stdout is kept for the report.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from inferstream.tools.demo_scrape import Reading

LINE_EVERY_S = 5.0
BAR_CELLS = 16
FRAME_S = 0.2
STAGES = ("buffer", "prepare", "window", "device", "publish")  # shown before the worker tells of them
SHOWN_NUMBERS = 4


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the demo at one moment.

    ``planned`` is how many documents there will be, None before that is known; ``lag`` how many were sent and
    have no answer yet; ``worker`` says in words what the worker does.
    """

    elapsed_s: float
    sent: int
    answered: int
    planned: int | None
    rate: float
    worker: str
    reading: Reading = field(default_factory=Reading)
    newest: str = ""

    @property
    def lag(self) -> int:
        return self.sent - self.answered


class View(Protocol):
    def update(self, snapshot: Snapshot) -> None:
        """Called several times a second; shows what is due."""
        ...

    def event(self, text: str) -> None:
        """Something happened once: it stays on the screen."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


def make_view() -> View:
    console = Console(stderr=True, highlight=False)
    return LiveView(console) if console.is_terminal else PlainView()


class PlainView:
    """Lines, for logs and pipes."""

    def __init__(self) -> None:
        self._last = Snapshot(0.0, 0, 0, None, 0.0, "")
        self._shown_at = 0.0

    def update(self, snapshot: Snapshot) -> None:
        self._last = snapshot
        if snapshot.elapsed_s - self._shown_at >= LINE_EVERY_S:
            self._shown_at = snapshot.elapsed_s
            self._print(line(snapshot))

    def event(self, text: str) -> None:
        self._print(f"{self._last.elapsed_s:5.1f} s  {text}")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


class LiveView:
    """A table that is redrawn in place; events scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._elapsed_s = 0.0
        self._drawn_at = -FRAME_S

    def update(self, snapshot: Snapshot) -> None:
        self._elapsed_s = snapshot.elapsed_s
        if self._elapsed_s - self._drawn_at >= FRAME_S:
            self._drawn_at = self._elapsed_s
            self._live.update(table(snapshot), refresh=True)

    def event(self, text: str) -> None:
        self._live.console.print(f"{self._elapsed_s:5.1f} s  {text}", markup=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()


def line(snapshot: Snapshot) -> str:
    """The state in one line."""
    of = f"/{snapshot.planned:,}" if snapshot.planned is not None else ""
    parts = [
        f"{snapshot.elapsed_s:5.1f} s",
        f"{snapshot.answered:,}{of} answered",
        f"{snapshot.rate:.0f} docs/s",
        f"lag {snapshot.lag:,}",
    ]
    reading = snapshot.reading
    if reading.fills:
        parts.append("fill " + " ".join(f"{stage} {fill:.0%}" for stage, fill in reading.fills.items()))
    if reading.padding is not None:
        parts.append(f"padding {reading.padding:.0%}")
    if reading.busy is not None:
        parts.append(f"device busy {reading.busy:.0%}")
    if snapshot.worker:
        parts.append(snapshot.worker)
    return "  ".join(parts)


def table(snapshot: Snapshot) -> Group:
    """The state as a screen of its own."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    total = snapshot.planned or snapshot.sent
    of = f"{snapshot.answered:,} of {total:,}" + ("" if snapshot.planned is not None else ", more to come")
    bar = ProgressBar(total=max(1, total), completed=snapshot.answered, width=40)
    grid.add_row("documents", _beside(bar, of if snapshot.sent else "reading docstrings"))
    grid.add_row("rate", f"{snapshot.rate:.0f} documents/s")
    grid.add_row("lag", f"{snapshot.lag:,} sent and not answered")
    reading = snapshot.reading
    for stage in reading.fills or STAGES:
        fill = reading.fills.get(stage)
        grid.add_row(f"  {stage}", _beside(_bar(fill or 0.0), "" if fill is None else f"{fill:4.0%} full"))
    grid.add_row("padding", "" if reading.padding is None else f"{reading.padding:.0%} of a batch")
    grid.add_row("device", "" if reading.busy is None else f"{reading.busy:.0%} busy")
    grid.add_row("worker", Text(snapshot.worker, style="yellow" if "killed" in snapshot.worker else ""))
    grid.add_row("newest", Text(snapshot.newest, style="dim", no_wrap=True, overflow="ellipsis"))
    title = Text.assemble(("inferstream demo", "bold cyan"), f"   {snapshot.elapsed_s:.0f} s")
    return Group(title, grid)


def described(name: str, vector: np.ndarray) -> str:
    """A result in a few words: ``json.loads -> [0.0123, -0.0456, …] 384 numbers``."""
    numbers = ", ".join(f"{number:.4f}" for number in vector[:SHOWN_NUMBERS])
    return f"{name} -> [{numbers}, …] {len(vector)} numbers"


def _bar(fill: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=min(1.0, max(0.0, fill)), width=BAR_CELLS, complete_style="green")


def _beside(left: ProgressBar, right: str) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(left, right)
    return row
