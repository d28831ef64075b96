"""Draws a trace: a row per thread or stream, a bar per piece of work, so that overlap is seen as overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from inferstream.errors import SettingsError

COLOURS = {
    "prepare": "#4c78a8",
    "launch": "#bab0ac",
    "h2d": "#72b7b2",
    "compute": "#54a24b",
    "d2h": "#eeca3b",
    "finish": "#f58518",
    "publish": "#b279a2",
    "commit": "#9d755d",
}
ORDER = tuple(COLOURS)  # the flow, from top to bottom
SHOWN_BATCHES = 12
VISIBLE = 0.002  # of the width of the picture: what is shorter is drawn as long


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of the trace, in seconds."""

    track: str
    stage: str
    start: float
    end: float


def read_trace(path: Path) -> list[Bar]:
    """The spans of a trace, but for those of ``wait``, which overlap; oldest first."""
    text = path.read_bytes().rstrip().rstrip(b",")
    events: list[dict[str, Any]] = orjson.loads(text if text.endswith(b"]") else text + b"]")
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    bars = [
        Bar(tracks[event["tid"]], event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X"
    ]
    return sorted(bars, key=lambda bar: bar.start)


def middle(bars: Iterable[Bar], batches: int = SHOWN_BATCHES) -> tuple[float, float]:
    """The time in which the ``batches`` in the middle of a trace computed: away from its start and its end."""
    computed = [bar for bar in bars if bar.stage == "compute"]
    if not computed:
        raise SettingsError("--plot: the trace holds no batch; measure for longer")
    first = max(0, (len(computed) - batches) // 2)
    shown = computed[first : first + batches]
    return shown[0].start, max(bar.end for bar in shown)


def draw(trace: Path, picture: Path, title: str) -> None:
    """Draw the middle of ``trace`` into ``picture`` (its suffix says the format).

    Raises SettingsError if matplotlib is missing or the picture cannot be written.
    """
    figure_of = load_matplotlib()
    bars = read_trace(trace)
    start, end = middle(bars)
    rows: defaultdict[str, list[Bar]] = defaultdict(list)
    for bar in bars:
        if bar.end > start and bar.start < end:
            rows[bar.track].append(bar)
    tracks = sorted(rows, key=lambda track: (ORDER.index(rows[track][0].stage), track))

    figure = figure_of(figsize=(11, 1.2 + 0.42 * len(tracks)), layout="constrained")
    axes = figure.subplots()
    for number, track in enumerate(tracks):
        for bar in rows[track]:
            left, right = max(bar.start, start), min(bar.end, end)
            width = max(right - left, VISIBLE * (end - start))
            axes.barh(number, width, left=left - start, color=COLOURS[bar.stage])
            axes.vlines(left - start, number - 0.4, number + 0.4, colors="white", lw=0.5)
    axes.set_yticks(range(len(tracks)), tracks)
    axes.invert_yaxis()
    axes.set_xlim(0, end - start)
    axes.set_xlabel("seconds")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    stages = [stage for stage in ORDER if any(bar.stage == stage for track in tracks for bar in rows[track])]
    handles = [axes.barh(0, 0, color=COLOURS[stage]) for stage in stages]
    figure.legend(handles, stages, loc="outside lower center", ncols=len(stages), frameon=False)
    try:
        figure.savefig(picture, dpi=110)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--plot: {picture} cannot be written: {error}") from error


def check_picture(picture: Path) -> None:
    """Raises SettingsError when a picture could not be written there: told before the minutes of measuring."""
    formats = load_matplotlib()().canvas.get_supported_filetypes()
    if picture.suffix[1:] not in formats:
        known = ", ".join(f".{each}" for each in ("png", "svg", "pdf"))
        raise SettingsError(f"--plot: {picture} has no suffix of a picture: use {known}")
    if not picture.parent.is_dir():
        raise SettingsError(f"--plot: there is no folder {picture.parent}")


def load_matplotlib() -> Any:
    """The class of figures; raises SettingsError with what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError(
            "--plot: matplotlib is not installed; pip install 'inferstream[plot]', or use --trace FILE and open the "
            "file in ui.perfetto.dev"
        ) from None
    return Figure
