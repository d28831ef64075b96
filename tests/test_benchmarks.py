"""The pure parts of the benchmarks: what is counted, and how it is told.  They measure nothing here."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest

import benchmarks.__main__ as main
from benchmarks import latency, peers, prefetch, switching
from benchmarks.__main__ import NAMES, _options
from benchmarks.arena import Arena, Round
from benchmarks.devices import CountedTask, PacedDevice, Span, WatchedDevice, idle_ratio
from benchmarks.documents import Corpus, records
from benchmarks.latency import arrivals
from benchmarks.metered import DeviceCounters
from benchmarks.naive import Computed
from benchmarks.openvino import groups
from benchmarks.overlap import told
from benchmarks.paced import crossing_text, mean_tokens
from benchmarks.peers import PeerUnavailable, environment, environment_folder
from benchmarks.publish import ROOT, publish, replace_marked
from benchmarks.report import Goal, Report, Section, Spread, median_ratio, number, percentile, round_ratios
from benchmarks.scale import FULL, SHORT
from benchmarks.search import Crossing, first_reaching
from benchmarks.throughput import Turn, engine_text, tokens_text
from inferstream.batching import Item
from inferstream.device.cpu import CpuDevice
from inferstream.documents import Document, Prepared
from inferstream.tasks.hash import HashRunner, HashTask
from inferstream.telemetry.metrics import Metrics


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

    assert "| ours / theirs | 0.40 |  | ≥ 0.50 | **missed** |" in summary
    assert tree["goals_met"] == 0 and tree["goals"] == 1
    assert tree["sections"]["pipe"]["goals"][0]["met"] is False
    assert tree["sections"]["pipe"]["ratio"] == 0.4


def test_report_when_sections_took_their_time_then_it_says_how_long_each_and_what_is_left() -> None:
    sections = {"pipe": Section("Pipe", took_s=40.0), "memory": Section("Memory", took_s=15.0)}

    times = Report("python -m benchmarks", 61.0, {}, {}, {}, sections).times()

    assert "| Pipe | 40.0 |\n| Memory | 15.0 |\n| what is none of these | 6.00 |\n| in all | 61.0 |" in times


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentile_when_values_are_1_to_100_then_it_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected


def test_median_ratio_when_one_round_was_slow_for_both_then_it_does_not_count() -> None:
    assert median_ratio([30.0, 3.0, 60.0], [10.0, 1.0, 20.0]) == 3.0


def test_goal_when_it_is_of_rounds_then_it_is_the_median_of_their_ratios_and_shows_the_range() -> None:
    ours, theirs = [23.3, 26.1, 27.2], [27.1, 23.9, 26.9]

    goal = Goal.of_rounds("ours / theirs", round_ratios(ours, theirs), 1.0, at_least=True)

    assert goal.measured == 27.2 / 26.9  # and not 26.1 / 26.9, the quotient of the medians
    assert goal.row() == ["ours / theirs", "1.01", "0.86 – 1.09", "≥ 1.00", "met"]


@pytest.mark.parametrize(
    ("rounds", "bound", "expected"),
    [
        ([0.9, 0.95, 0.8], False, "0.90 (0.80 – 0.95)"),
        ([0.9, 1.1, 1.05], False, "1.05 (0.90 – 1.10): not distinguishable"),
        ([1.2, 1.3], True, "1.25 (1.20 – 1.30)"),
        ([0.95, 1.3, 1.2], True, "1.20 (0.95 – 1.30): not distinguishable"),
        ([0.8, 0.9, 1.2], True, "0.90 (0.80 – 1.20): noise, all of it cannot be faster"),
        ([0.8, 0.9], True, "0.85 (0.80 – 0.90): noise, all of it cannot be faster"),
    ],
)
def test_told_when_rounds_lie_on_both_sides_or_a_bound_is_slower_then_it_says_so(
    rounds: list[float], bound: bool, expected: str
) -> None:
    assert told(Spread.of(rounds), bound) == expected


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([0.9, 0.95, 0.99], "is what the ratio to the engine lacks"),
        ([0.9, 0.95, 1.01], "is of the size of that noise"),
        ([1.01, 1.15, 1.2], "this run does not say what that is"),
    ],
)
def test_engine_text_when_rounds_are_faster_than_the_engine_then_it_is_called_noise(
    rounds: list[float], said: str
) -> None:
    assert said in engine_text(Spread.of(rounds))


def turn(documents: int, tokens: int) -> Turn:
    return Turn(documents, 2.0, 1.0, 0.1, tokens, 0.9, None)


def test_tokens_text_when_all_counted_the_same_then_both_ratios_are_the_same_else_it_says_what_each_counted() -> (
    None
):
    same = {"naive-64": [turn(10, 960)], "inferstream": [turn(10, 960), turn(20, 1920)]}
    other = {"naive-64": [turn(10, 970)], "inferstream": [turn(10, 960)]}

    assert "the same 96.0 useful tokens a document" in tokens_text(same)
    assert "(naive-64 97.00, inferstream 96.00)" in tokens_text(other)


async def crossing_of(
    idle: Callable[[int], float], below: int = 15_000, reached: int = 31_000, most: int = 30
) -> Crossing:
    async def measure(rate: int) -> float:
        return idle(rate)

    return await first_reaching(measure, 0.03, below, reached, step=1_000, rounds=3, most=most)


@pytest.mark.parametrize("first", range(1_000, 50_000, 1_000))
async def test_search_when_measurements_are_exact_then_it_finds_the_first_rate_wherever_it_lies(
    first: int,
) -> None:
    found = await crossing_of(lambda rate: 0.03 if rate >= first else 0.0, most=1_000)

    if first == 1_000:
        assert (found.below, found.reached) == (None, None)  # there is no rate above 0 below it
    else:
        assert (found.below, found.reached) == (first - 1_000, first)
        assert all(len(found.runs[rate]) >= 3 for rate in (found.below, found.reached))
    if 15_000 < first <= 31_000:
        assert sum(map(len, found.runs.values())) <= 4 + 5


@pytest.mark.parametrize("misled", [0.0, 1.0])
async def test_search_when_single_measurements_mislead_it_then_the_medians_bring_it_back(
    misled: float,
) -> None:
    asked: Counter[int] = Counter()

    def idle(rate: int) -> float:
        asked[rate] += 1
        if asked[rate] == 1:
            return misled
        return 0.05 if rate >= 19_000 else 0.01

    found = await crossing_of(idle, most=1_000)

    assert (found.below, found.reached) == (18_000, 19_000)


async def test_search_when_the_runs_are_spent_then_it_claims_nothing() -> None:
    found = await crossing_of(lambda rate: 0.05 if rate >= 19_000 else 0.01, most=6)

    assert (found.below, found.reached) == (None, None)
    assert sum(map(len, found.runs.values())) == 6
    assert crossing_text(found, 100).startswith("6 runs did not settle at what rate it first waits for 3%")


def test_crossing_text_when_it_was_found_then_the_two_rates_stand_out() -> None:
    found = Crossing(18_000, 19_000, {23_000: [0.09], 19_000: [0.04, 0.03, 0.05], 18_000: [0.02, 0.01, 0.03]})

    text = crossing_text(found, 45_000)

    assert text.startswith("It first waits for 3% of its time at 19,000 documents/s (at 18,000 it does not)")
    assert text.splitlines()[-3:] == [
        "| 18,000 | **2.00 %** | 1.00 – 3.00 % | 3 |",
        "| 19,000 | **4.00 %** | 3.00 – 5.00 % | 3 |",
        "| 23,000 | 9.00 % |  | 1 |",
    ]


@pytest.mark.parametrize(
    ("loading", "documents", "compute_s", "expected"),
    [
        (1, 5, 0.5, 0.5 + 5 * 0.5),
        (1, 5, 0.1, 5 * 0.5 + 0.1),
        (2, 5, 0.5, 0.5 + 5 * 0.5),
        (4, 5, 0.1, 2 * 0.5 + 0.1),
    ],
)
def test_bound_when_loading_or_computing_takes_longer_then_it_is_that_and_what_cannot_overlap(
    loading: int, documents: int, compute_s: float, expected: float
) -> None:
    assert prefetch.Way(loading).bound_s(documents, compute_s) == pytest.approx(expected)


def test_prefetch_when_a_pipeline_slows_computing_down_then_its_bound_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slow(*_: Any) -> float:
        return 6.0

    monkeypatch.setattr(prefetch, "one_after_the_other", lambda *_: (5.0, 2.5))
    monkeypatch.setattr(prefetch, "through_the_stages", slow)
    nothing = cast(Any, None)

    found = prefetch.compare(nothing, nothing, [prefetch.USUAL], 100, prefetch.FEW, rounds=2)
    section = prefetch.section_of({prefetch.FEW: found}, 100)

    assert found[prefetch.USUAL].bounds == [3.0, 3.0]
    [goal] = section.goals
    assert goal.name == "speed-up of 5 documents, 1 loading, a queue of 2"
    assert (goal.measured, goal.bound, goal.met) == (5.0 / 6.0, 1.58, False)
    row = (
        "| 5 | 1 loading, a queue of 2 | 6.00 | 3.00 | 2.000 (2.00 – 2.00) | 0.83 x (0.83 – 0.83) | 1.67 x |"
    )
    assert row in section.body()


async def test_latency_when_its_batches_are_not_those_of_the_peak_then_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stream(*_: Any) -> latency.Stream:
        return latency.Stream([1.0], [1.0], 1024, 0.0, 0.0, 0.0)

    monkeypatch.setattr(latency, "stream", stream)
    arena = cast(Arena, None)

    with pytest.raises(ValueError, match=r"batch\.max_tokens is 1024 here and 2048 where the peak is from"):
        await latency.run(arena, SHORT, 70.0, 2048)
    assert "batch.max_tokens is 1,024 here" in (await latency.run(arena, SHORT, 70.0, 1024)).body()


def test_computed_when_batches_are_padded_then_padding_is_counted_and_what_was_taken_is_counted_no_second_time() -> (
    None
):
    torch = pytest.importorskip("torch")
    first = torch.nn.Identity()
    computed = Computed([first])

    first({"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    first({"attention_mask": torch.ones(2, 5)})

    assert computed.taken() == {"tokens": 14, "padded_tokens": 16}
    assert computed.taken() == {"tokens": 0, "padded_tokens": 0}


def test_device_counters_when_read_from_a_workers_page_then_idle_and_padding_are_what_lies_between() -> None:
    metrics = Metrics()
    metrics.device_lanes.set(2)
    metrics.device(3.0, {}, 0.0)
    metrics.batch("tokens", [Item(None, 0, 10, 0.0, None)], 20)
    before = DeviceCounters.parse(metrics.render()[1].decode())
    metrics.device(6.0, {}, 0.0)
    metrics.batch("tokens", [Item(None, 0, 30, 0.0, None)], 40)
    metrics.batch("tokens", [Item(None, 0, 30, 0.0, None)], 30)
    after = DeviceCounters.parse(metrics.render()[1].decode())

    assert (before.tokens, after.tokens) == (10, 70)
    assert after.idle_since(before, seconds=2.0) == pytest.approx(0.25)
    assert after.padding_efficiency_since(before) == pytest.approx(1 - 0.25 / 2)


def test_switching_when_rounds_do_not_agree_then_it_says_that_they_do_not_tell_the_two_apart() -> None:
    done = Round(100, 1.0, 0.01, 0.01)
    apart = switching.section_of({0.005: [(done, 0.05), (done, 0.06)], 0.0005: [(done, 0.01), (done, 0.03)]})
    mixed = switching.section_of({0.005: [(done, 0.05), (done, 0.02)], 0.0005: [(done, 0.01), (done, 0.03)]})

    assert "| 5.00 ms (Python's default) | 5.50 % | 5.00 – 6.00 % | 100 | 100 – 100 | 100 |" in apart.body()
    assert (
        "3.50 percentage points more with Python's default (3.00 – 4.00), every round on the same side"
        in apart.body()
    )
    assert "which does not tell the two apart" in mixed.body()


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
    replace_marked("docs/cpu.md", "SWITCHING", "what it is worth", tmp_path)

    assert (tmp_path / "docs" / "performance.md").read_text() == report.markdown()
    readme, cpu = (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "cpu.md").read_text()
    assert f"<!-- MEASURED begin -->\n{report.summary()}\n<!-- MEASURED end -->" in readme
    assert "what it is\n<!-- OVERLAP end -->" in cpu
    assert "<!-- SWITCHING begin -->\nwhat it is worth\n<!-- SWITCHING end -->" in cpu
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
