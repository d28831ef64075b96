"""The timeline and the trace file."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferstream.codec import Codec
from inferstream.errors import SettingsError
from inferstream.models.loading import load
from inferstream.settings import load_settings, resolve
from inferstream.telemetry import timeline as module
from inferstream.telemetry.timeline import Timeline, TraceFile
from inferstream.tools.bench import Engine


def events(path: Path) -> list[dict[str, Any]]:
    """As a viewer reads it: the closing bracket may be missing."""
    text = path.read_bytes().rstrip()
    loaded: list[dict[str, Any]] = orjson.loads(text if text.endswith(b"]") else text + b"]")
    return loaded


def test_span_then_the_metric_has_its_seconds_and_the_trace_its_place(tmp_path: Path) -> None:
    observed: list[tuple[str, float]] = []
    trace = TraceFile(tmp_path / "trace.json")
    timeline = Timeline(lambda stage, seconds: observed.append((stage, seconds)), trace)
    timeline.span("cpu-0", "compute", 1.0, 1.25, batch=7)
    trace.close()
    assert observed == [("compute", 0.25)]
    named, span = events(tmp_path / "trace.json")
    assert named["ph"] == "M" and named["args"] == {"name": "cpu-0"}
    assert (span["ph"], span["ts"], span["dur"], span["tid"]) == ("X", 1e6, 0.25e6, named["tid"])
    assert span["args"] == {"batch": 7}


def test_waits_of_several_batches_then_each_is_an_async_event_of_its_own(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    trace.add("window", "wait", 0.0, 2.0, {"batch": 0})
    trace.add("window", "wait", 1.0, 3.0, {"batch": 1})
    trace.close()
    waits = [event for event in events(tmp_path / "trace.json") if event["name"] == "wait"]
    assert [(event["ph"], event["ts"]) for event in waits] == [("b", 0), ("e", 2e6), ("b", 1e6), ("e", 3e6)]
    assert waits[0]["id"] == waits[1]["id"] != waits[2]["id"] == waits[3]["id"]


def test_trace_when_the_worker_is_killed_then_the_file_ends_with_a_whole_event(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    for _ in range(3 * module.FLUSH_EVENTS + 5):
        trace.add("worker-0", "prepare", 0.0, 0.5, {})
    found = events(path)  # never closed
    assert len(found) >= 2 * module.FLUSH_EVENTS
    trace.close()


def test_trace_when_it_is_full_then_it_is_complete_and_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SPANS", 10)
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    for n in range(30):
        trace.add("worker-0", "finish", n, n + 0.5, {})
    trace.close()
    assert path.read_bytes().endswith(b"]\n") and len(events(path)) == 11


def test_trace_when_threads_write_at_once_then_no_event_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path)

    def write(track: str) -> None:
        for n in range(1000):
            trace.add(track, "finish", n, n + 0.5, {})

    threads = [threading.Thread(target=write, args=(f"worker-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    assert len(events(path)) == 4 * 1001


def test_trace_when_the_folder_is_missing_then_the_error_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--trace.*No such file"):
        TraceFile(tmp_path / "missing" / "trace.json")


async def test_engine_when_it_is_traced_then_each_batch_waits_computes_and_is_finished(
    tmp_path: Path,
) -> None:
    settings = resolve(load_settings((), {}, {"model.id": "builtin:hash"}, require=False).settings, "hash", 2)
    model = load(settings, Codec.from_settings(settings).embedding)
    trace = TraceFile(tmp_path / "trace.json")
    engine = Engine(settings, model.task, model.device, Timeline(trace=trace))
    measured = await engine.run([f"document {n}" for n in range(500)])
    await asyncio.to_thread(engine.close)
    trace.close()
    found = events(tmp_path / "trace.json")
    computed = [event for event in found if event["name"] == "compute"]
    assert len(computed) == measured.batches > 0
    assert sum(event["args"]["documents"] for event in computed) == 500
    assert sum(event["args"]["tokens"] for event in computed) == measured.tokens
    waited = {event["args"]["batch"]: event["ts"] for event in found if event["ph"] == "b"}
    assert all(waited[event["args"]["batch"]] <= event["ts"] for event in computed)
    assert {event["name"] for event in found} >= {"prepare", "wait", "compute", "finish"}
