"""The pure parts of the benchmarks: what is counted, and how it is told.  They measure nothing here."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest

import benchmarks.__main__ as main
from benchmarks import peers
from benchmarks.__main__ import NAMES, _options
from benchmarks.arena import Arena
from benchmarks.devices import CountedTask, PacedDevice, Span, WatchedDevice, idle_ratio
from benchmarks.documents import Corpus, records
from benchmarks.latency import arrivals
from benchmarks.openvino import groups
from benchmarks.paced import mean_tokens
from benchmarks.peers import PeerUnavailable, environment, environment_folder
from benchmarks.publish import ROOT, publish
from benchmarks.report import Goal, Report, Section, median_ratio, number, percentile
from benchmarks.scale import FULL, SHORT
from inferstream.device.cpu import CpuDevice
from inferstream.documents import Document, Prepared
from inferstream.tasks.hash import HashRunner, HashTask


def test_goal_when_a_bound_is_reached_exactly_then_it_is_met() -> None:
    assert Goal("ratio", 2.5, 2.5, at_least=True).met
    assert Goal("idle", 3.0, 3.0, at_least=False).met
    assert not Goal("ratio", 2.4, 2.5, at_least=True).met
    assert not Goal("idle", 3.1, 3.0, at_least=False).met


def test_report_when_a_goal_is_missed_then_markdown_and_json_say_so_at_the_top() -> None:
    section = Section("Pipe", [Goal("ours / theirs", 0.4, 0.5, at_least=True)], data={"ratio": 0.4})
    report = Report(
        "python -m benchmarks", 61.0, {"cpu": "one"}, {"python": "3"}, {"distinct": 1}, {"pipe": section}
    )

    summary = report.markdown().split("## ")[0]
    tree = json.loads(report.json())

    assert "| ours / theirs | 0.40 | ≥ 0.50 | **missed** |" in summary
    assert tree["goals_met"] == 0 and tree["goals"] == 1
    assert tree["sections"]["pipe"]["goals"][0]["met"] is False
    assert tree["sections"]["pipe"]["ratio"] == 0.4


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentile_when_values_are_1_to_100_then_it_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected


def test_median_ratio_when_one_round_was_slow_for_both_then_it_does_not_count() -> None:
    assert median_ratio([30.0, 3.0, 60.0], [10.0, 1.0, 20.0]) == 3.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0456, "0.046"), (0.0, "0.00"), (2.345, "2.35"), (45.67, "45.7"), (12345.6, "12,346")],
)
def test_number_when_written_then_it_has_the_digits_a_reader_needs(value: float, text: str) -> None:
    assert number(value) == text


def test_corpus_when_more_is_taken_than_there_is_then_texts_repeat_evenly_and_the_same_each_time() -> None:
    corpus = Corpus([f"text {n}" for n in range(10)])

    taken = corpus.take(25)

    assert taken[:10] == corpus.texts
    assert len(taken) == 25 and set(taken) == set(corpus.texts)
    assert taken == corpus.take(25)
    assert sorted(taken[10:20]) == sorted(corpus.texts) and taken[10:20] != corpus.texts


def test_records_when_made_then_key_and_id_are_the_number_of_the_document() -> None:
    assert [(key, orjson.loads(value)) for key, value in records(["a", "b"])] == [
        (b"0", {"id": "0", "text": "a"}),
        (b"1", {"id": "1", "text": "b"}),
    ]


def test_arrivals_when_drawn_twice_then_they_are_the_same_and_have_the_rate() -> None:
    times = arrivals(20_000, rate=50.0)

    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times == arrivals(20_000, rate=50.0)
    assert math.isclose(20_000 / times[-1], 50.0, rel_tol=0.05)
    assert math.isclose(statistics.pstdev(gaps), statistics.fmean(gaps), rel_tol=0.05)  # exponential


def test_idle_ratio_when_there_are_gaps_between_spans_then_it_is_their_share() -> None:
    spans = [Span(n, n + 0.75, items=1) for n in range(101)]

    assert math.isclose(idle_ratio(spans, skipped=0.0), 1 - 101 * 0.75 / 100.75)


def test_idle_ratio_when_the_first_and_last_documents_are_slow_then_they_do_not_count() -> None:
    spans = [Span(0, 1, 5), *(Span(10 + n, 11 + n, 1) for n in range(90)), Span(500, 501, 5)]

    assert math.isclose(idle_ratio(spans, skipped=0.05), 0.0, abs_tol=1e-9)
    assert math.isnan(idle_ratio(spans[:1], skipped=0.05))


def test_paced_device_when_batches_are_staged_then_they_follow_one_another_without_a_gap() -> None:
    device = PacedDevice(tokens_per_s=1_000, width=4)
    started = time.perf_counter()
    for slot in range(3):
        device.launch(slot, [(b"", 10), (b"", 20)])

    flights = [device.wait() for _ in range(3)]
    device.close()

    assert [flight.slot for flight in flights if flight] == [0, 1, 2]
    assert all(flight and flight.rows is not None and flight.rows.shape == (2, 4) for flight in flights)
    assert time.perf_counter() - started >= 0.089
    assert [round(span.end - span.start, 6) for span in device.spans] == [0.03, 0.03, 0.03]
    assert idle_ratio(device.spans, skipped=0.0) == pytest.approx(0.0, abs=1e-9)
    assert device.wait() is None


def test_counted_task_when_documents_are_prepared_then_items_carry_their_tokens() -> None:
    task = CountedTask(HashTask(256, "truncate", 16, lambda vector: {"dimensions": len(vector)}))

    (answer,) = task.prepare([Document("1", "x" * 40)])

    assert isinstance(answer, Prepared)
    assert [tokens for _, tokens in answer.chunks] == list(answer.lengths) == [11]
    assert task.output(answer, np.zeros((1, 8), dtype=np.float32)) == {"dimensions": 8}


def test_mean_tokens_when_computed_then_it_is_what_the_task_counts() -> None:
    texts = ["x" * size for size in (1, 3, 4, 399, 1_023, 1_024, 50_000)]
    task = HashTask(256, "truncate", 16, lambda vector: {})

    prepared = task.prepare([Document("", text) for text in texts])

    counted = [answer.tokens for answer in prepared if isinstance(answer, Prepared)]
    assert mean_tokens(texts) == statistics.fmean(counted)


def test_watched_device_when_a_batch_ends_then_its_time_is_kept() -> None:
    device = WatchedDevice(CpuDevice(HashRunner(), 1))
    device.launch(0, [b"\x01" * 32])

    flight = device.wait()
    device.close()

    assert flight is not None and device.batch_s == [flight.occupied_s]
    assert device.wait() is None and len(device.batch_s) == 1


def test_options_when_nothing_is_named_then_everything_runs() -> None:
    assert _options([]).only == list(NAMES)
    assert _options(["--short", "--only", "pipe", "latency"]).only == ["pipe", "latency"]


def test_publish_when_a_run_is_written_down_replaces_the_marked_tables_only(tmp_path: Path) -> None:
    pages = {page: (ROOT / page).read_text() for page in ("README.md", "docs/cpu.md")}
    (tmp_path / "docs").mkdir()
    for page, text in pages.items():
        (tmp_path / page).write_text(text)
    section = Section("Overlap", [Goal("ours / theirs", 0.4, 0.5, at_least=True)], text=["what it is"])
    report = Report("python -m benchmarks", 61.0, {}, {}, {}, {"overlap": section})

    publish(report, tmp_path)

    assert (tmp_path / "docs" / "performance.md").read_text() == report.markdown()
    readme, cpu = (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "cpu.md").read_text()
    assert f"<!-- MEASURED begin -->\n{report.summary()}\n<!-- MEASURED end -->" in readme
    assert "what it is\n<!-- OVERLAP end -->" in cpu
    for page, now in (("README.md", readme), ("docs/cpu.md", cpu)):
        assert now.split("<!-- ")[0] == pages[page].split("<!-- ")[0]
        assert now.rsplit(" end -->")[-1] == pages[page].rsplit(" end -->")[-1]


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([5, 1, 5, 2], 10, [[1, 3], [0, 2]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([9, 3], 4, [[1], [0]]),
        ([2, 1], 0, [[1], [0]]),
    ],
)
def test_groups_when_padded_then_none_holds_more_than_it_may_unless_it_is_one_document(
    lengths: list[int], most: int, expected: list[list[int]]
) -> None:
    assert groups(lengths, most) == expected


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pins of a peer called ``none``, which asks for nothing; the cache folder is beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peers, "HERE", tmp_path)
    path = tmp_path / "none.txt"
    path.write_text("")
    return path


def test_environment_when_it_is_not_there_and_shall_not_be_made_then_one_line_says_how_it_is(
    pins: Path,
) -> None:
    with pytest.raises(PeerUnavailable, match=r"python -m benchmarks\.peers none makes it"):
        environment("none", make=False)
    assert not environment_folder("none").exists()


def test_environment_when_it_was_made_then_it_is_made_no_second_time_until_the_pins_change(
    pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        environment_folder("none").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(peers.subprocess, "run", run)
    monkeypatch.setattr(peers.shutil, "which", lambda *_, **__: "uv")

    first, second = environment("none"), environment("none")
    made = len(commands)
    pins.write_text("# something else\n")

    assert first == second and first.name == "python"
    assert made == 2  # the folder, and what goes into it
    with pytest.raises(PeerUnavailable):
        environment("none", make=False)


def test_environment_when_an_install_fails_then_what_was_said_is_one_line_and_it_counts_as_not_made(
    pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        environment_folder("none").mkdir(parents=True, exist_ok=True)
        code = 1 if "install" in command else 0
        return subprocess.CompletedProcess(command, code, "", "error: no such host\n  the network is down\n")

    monkeypatch.setattr(peers.subprocess, "run", run)
    monkeypatch.setattr(peers.shutil, "which", lambda *_, **__: "uv")

    with pytest.raises(PeerUnavailable) as failed:
        environment("none")

    assert str(failed.value).endswith("cannot be made: error: no such host the network is down")
    with pytest.raises(PeerUnavailable, match="no environment yet"):
        environment("none", make=False)


def test_run_when_infinity_cannot_be_had_then_the_others_are_compared_and_the_full_run_says_it_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def environment(name: str, *, make: bool) -> Path:
        raise PeerUnavailable("no network")

    monkeypatch.setattr(main, "environment", environment)
    arena = cast(Arena, None)
    full, short = (main.Run(arena, scale, ["infinity", "engine"]) for scale in (FULL, SHORT))

    assert full.against() == short.against() == ["engine"]
    assert full.failed == ["infinity"] and short.failed == []
    assert full.unmeasured == short.unmeasured == {"infinity": "no network"}
