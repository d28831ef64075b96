"""What the matrix shows and when it is short of what was asked for."""

from __future__ import annotations

from pathlib import Path

from tests.faults.matrix import HEAD, rows, shortfall, summary
from tests.faults.pages import publish
from tests.faults.run import Injection, Report


def report(name: str, *left: int, problems: tuple[str, ...] = ()) -> Report:
    injections = [
        Injection(name, 5, many, 1.0, 2.0, 3.0, allowed=500, repeated=many // 10, back_s=n)
        for n, many in enumerate(left)
    ]
    return Report(name, "at-least-once", 1, len(left), injections, problems=list(problems))


def test_shortfall_when_every_row_has_its_faults_then_nothing() -> None:
    assert shortfall([report("kill", 900, 900)], [("kill", "at-least-once")], 2) == []


def test_shortfall_when_faults_found_no_input_left_then_says_so() -> None:
    [line] = shortfall([report("kill", 900, 400)], [("kill", "at-least-once")], 2)
    assert line == "1 faults were counted, and 2 asked for"


def test_shortfall_when_a_row_is_empty_or_was_never_run_then_names_it() -> None:
    wanted = [("kill", "at-least-once"), ("zombie", "at-least-once"), ("kill", "exactly-once")]
    lines = shortfall([report("kill", 900, 900), report("zombie", 400)], wanted, 2)
    assert lines == [
        "no fault was counted: zombie, at-least-once",
        "no fault was counted: kill, exactly-once",
    ]


def test_rows_when_nothing_was_counted_then_nothing_was_kept() -> None:
    [row] = rows([report("kill", 400)])
    assert dict(zip(HEAD, row, strict=True))["verdict"] == "NOT COUNTED"


def test_rows_when_answers_are_there_again_then_shows_the_most_of_one_fault() -> None:
    [row] = rows([report("kill", 900, 1200, 400)])
    shown = dict(zip(HEAD, row, strict=True))
    assert (shown["duplicated"], shown["back"], shown["verdict"]) == (
        "0 (most 120 of 500)",
        "2 of 2",
        "kept",
    )


def test_summary_when_a_fault_was_under_both_guarantees_then_they_share_a_row() -> None:
    once = report("kill", 900, 900)
    once.guarantee = "exactly-once"
    once.injections[0].pause_s = once.injections[1].pause_s = 4.0
    other = report("fenced", 900)
    other.guarantee = "exactly-once"
    lines = summary([report("kill", 900), once, other]).splitlines()
    assert lines[2:] == [
        "| kill -9 | 3 | 0 | 0 | 0 (most 90 of 500) | 0 (most 90 of 500) | 4.0 s |",
        "| producer fenced | 1 | 0 | 0 | – | 0 (most 90 of 500) | 0.0 s |",
    ]


def test_pages_when_a_matrix_is_published_then_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / "README.md", tmp_path / "docs/faults.md"]
    for page in pages:
        page.write_text("before\n<!-- FAULTS begin -->\nold\n<!-- FAULTS end -->\nafter\n")
    publish([report("kill", 900)], 1.4, [7], tmp_path)
    for page in pages:
        text = page.read_text()
        assert (
            text.startswith("before\n<!-- FAULTS begin -->\n1 faults in 1 minutes on ") and "seed 7:" in text
        )
        assert "| kill -9 |" in text and "old" not in text and text.endswith("<!-- FAULTS end -->\nafter\n")
