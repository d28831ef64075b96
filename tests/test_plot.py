"""The picture of a trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from inferstream.errors import SettingsError
from inferstream.telemetry.timeline import TraceFile
from inferstream.tools.plot import check_picture, draw, middle, read_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Forty batches of a tenth of a second on two threads, each prepared before and finished after it."""
    path = tmp_path / "trace.json"
    file = TraceFile(path)
    for n in range(40):
        start = n / 10
        file.add("window", "wait", start - 0.2, start, {"batch": n})
        file.add("worker-0", "prepare", start - 0.3, start - 0.25, {})
        file.add(f"cpu-{n % 2}", "compute", start, start + 0.2, {"batch": n})
        file.add("worker-0", "finish", start + 0.2, start + 0.21, {})
    file.close()
    return path


def test_read_trace_then_spans_have_their_tracks_and_waits_are_left_out(trace: Path) -> None:
    bars = read_trace(trace)
    assert {bar.track for bar in bars} == {"worker-0", "cpu-0", "cpu-1"}
    assert len(bars) == 120 and bars == sorted(bars, key=lambda bar: bar.start)


def test_middle_then_it_is_away_from_the_start_and_the_end(trace: Path) -> None:
    start, end = middle(read_trace(trace))
    assert (round(start, 6), round(end, 6)) == (1.4, 2.7)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draw_then_there_is_a_picture(trace: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"timeline.{suffix}"
    draw(trace, picture, "a title")
    head = picture.read_bytes()[:8]
    assert head == b"\x89PNG\r\n\x1a\n" if suffix == "png" else head.startswith(b"<?xml")


@pytest.mark.parametrize("name", ["timeline.doc", "timeline", "missing/timeline.png"])
def test_picture_when_it_cannot_be_written_then_it_is_said_before_anything_is_measured(
    tmp_path: Path, name: str
) -> None:
    check_picture(tmp_path / "timeline.png")
    with pytest.raises(SettingsError, match="--plot"):
        check_picture(tmp_path / name)


def test_draw_when_nothing_was_computed_then_it_says_so(tmp_path: Path) -> None:
    TraceFile(tmp_path / "empty.json").close()
    with pytest.raises(SettingsError, match="no batch"):
        draw(tmp_path / "empty.json", tmp_path / "timeline.png", "a title")


def test_draw_when_matplotlib_is_missing_then_it_says_what_to_install(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingsError, match=r"inferstream\[plot\]"):
        draw(trace, tmp_path / "timeline.png", "a title")
