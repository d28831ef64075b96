"""The checker itself: a run that keeps every promise passes, and each broken one is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
import pytest
from aiokafka import ConsumerRecord

from inferstream.tasks.hash import hash_vectors
from tests.faults.checker import Rules, Window, check, source_of_dead_letter, source_of_result
from tests.faults.documents import Reading, answer, record

SEED = 7
COUNT = 400
RULES = {"input_partitions": 1, "output_partitions": 1, "dead_letter_partitions": 1}
READING = Reading("chunk", "forward")


def consumed(
    topic: str,
    offset: int,
    key: bytes | None,
    value: bytes | None,
    headers: Sequence[tuple[str, bytes]],
    second: int = 0,
) -> ConsumerRecord:
    sizes = len(key or b""), len(value or b"")
    return ConsumerRecord(topic, 0, offset, second * 1000, 0, key, value, None, *sizes, tuple(headers))


def rules(allowed: int = 0, reading: Reading = READING, **more: object) -> Rules:
    """One fault between second 5 and second 10, which may repeat that many answers."""
    return Rules(**RULES, reading=reading, windows=[Window("kill", 5.0, 10.0, allowed)], **more)  # type: ignore[arg-type]


def good_run(
    reading: Reading = READING,
) -> tuple[list[ConsumerRecord], list[ConsumerRecord], list[ConsumerRecord]]:
    """Input, results and dead letters of a run that kept every promise."""
    inputs = [consumed("in", n, *record(SEED, n)) for n in range(COUNT)]
    results, dead = [], []
    for source in inputs:
        expected = answer(source.key, source.value, reading)
        if expected.tombstone:
            results.append(consumed("out", len(results), source.key, None, source.headers))
        elif expected.digests:
            vectors = hash_vectors(expected.digests)
            vector = vectors[0]
            if len(vectors) > 1:
                vector = np.average(vectors, axis=0, weights=expected.tokens)
                vector /= np.linalg.norm(vector)
            value = {
                "id": expected.id,
                "output": {"embedding": [float(str(number)) for number in np.float32(vector)]},
                "usage": {"truncated": expected.truncated, "chunks": len(expected.digests)},
                "source": {"topic": "in", "partition": 0, "offset": source.offset},
            }
            if expected.metadata is not None:
                value["metadata"] = expected.metadata
            results.append(consumed("out", len(results), source.key, orjson.dumps(value), source.headers))
        else:
            dead.append(dead_letter(source, str(expected.reason), len(dead)))
    return inputs, results, dead


def dead_letter(source: ConsumerRecord, reason: str, offset: int) -> ConsumerRecord:
    told = {
        "error.reason": reason,
        "source.topic": source.topic,
        "source.partition": "0",
        "source.offset": str(source.offset),
    }
    headers = [(f"inferstream.{name}", text.encode()) for name, text in told.items()]
    return consumed("dead", offset, source.key, source.value, [*source.headers, *headers])


def changed(result: ConsumerRecord, fields: dict[str, object]) -> ConsumerRecord:
    value = orjson.loads(result.value) | fields
    return consumed("out", result.offset, result.key, orjson.dumps(value), result.headers)


def at(second: int, records: Sequence[ConsumerRecord]) -> list[ConsumerRecord]:
    return [consumed(r.topic, r.offset, r.key, r.value, r.headers, second) for r in records]


@pytest.mark.parametrize("reading", [READING, Reading("truncate", "dead-letter")])
def test_check_when_every_promise_was_kept_then_no_problem(reading: Reading) -> None:
    inputs, results, dead = good_run(reading)
    findings = check(inputs, results, dead, rules(reading=reading))
    assert (findings.documents, findings.lost, findings.duplicated, findings.problems) == (COUNT, 0, 0, ())
    assert len(results) > 300 and len(dead) > 3
    expected = [answer(entry.key, entry.value, reading) for entry in inputs]
    forwarded = reading.tombstones == "forward"
    assert any(entry.tombstone for entry in expected) == forwarded
    assert any(len(entry.digests) > 1 for entry in expected) == (reading.long_documents == "chunk")


def test_check_when_an_answer_is_missing_then_lost() -> None:
    inputs, results, dead = good_run()
    findings = check(inputs, results[:50] + results[51:], dead[1:], rules(1000))
    assert findings.lost == 2
    assert any("no answer" in problem for problem in findings.problems)


def test_check_when_a_tombstone_is_not_passed_on_then_lost() -> None:
    inputs, results, dead = good_run()
    findings = check(inputs, [entry for entry in results if entry.value is not None], dead, rules())
    assert findings.lost == len([entry for entry in results if entry.value is None]) > 0


def test_check_when_more_repeats_than_allowed_then_problem() -> None:
    inputs, results, dead = good_run()
    again = [*results, *at(6, results[-10:])]
    assert check(inputs, again, dead, rules(10)).problems == ()
    findings = check(inputs, again, dead, rules(9))
    assert (findings.duplicated, findings.repeated) == (10, (10,))
    assert len(findings.problems) == 1


@pytest.mark.parametrize(
    ("first", "again", "committed"),
    [(0, 4, 0), (11, 12, 0), (0, 6, COUNT)],
    ids=["before any fault", "after the fault", "committed before it"],
)
def test_check_when_no_fault_explains_a_repeat_then_problem(first: int, again: int, committed: int) -> None:
    inputs, results, dead = good_run()
    log = [*results[:-1], *at(first, results[-1:]), *at(again, results[-1:])]
    held = rules(1000)
    held.windows[0].committed = {("in", 0): committed}
    findings = check(inputs, log, dead, held)
    assert findings.repeated == (0,)
    [problem] = findings.problems
    assert "which no fault explains" in problem


def test_check_when_an_orderly_fault_repeats_then_the_crash_before_it_does_not_pay() -> None:
    inputs, results, dead = good_run()
    log = [*results[:-10], *at(12, results[-10:]), *at(22, results[-10:])]
    held = rules(1000)
    held.windows.append(Window("join", 20.0, 25.0, 0))
    findings = check(inputs, log, dead, held)
    assert findings.repeated == (0, 10)
    [problem] = findings.problems
    assert "join" in problem


@pytest.mark.parametrize("repeated", [False, True])
def test_check_when_two_are_swapped_then_out_of_order(repeated: bool) -> None:
    inputs, results, dead = good_run()
    swapped = [*results[:20], results[21], results[20], *results[22:]]
    log = results + at(6, swapped[10:]) if repeated else swapped
    problems = check(inputs, log, dead, rules(COUNT)).problems
    assert len(problems) == 1
    assert "out of order" in problems[0]


def test_check_when_a_zombie_writes_between_the_next_owners_results_then_order_holds() -> None:
    inputs, results, dead = good_run()
    late = [entry for pair in zip(results[10:30], at(6, results[5:25]), strict=True) for entry in pair]
    log = [*results[:10], *late, *at(6, results[25:])]
    assert check(inputs, log, dead, rules(COUNT)).problems == ()


@pytest.mark.parametrize("first", ["record_refused", "result"])
def test_check_when_an_answer_is_of_another_kind_the_second_time_then_order_holds(first: str) -> None:
    """A document is answered, so is a later one; the worker dies, and its successor reads the topic's lowered limit."""
    inputs, results, dead = good_run()
    large, place = next(
        (n, entry) for n, entry in enumerate(inputs) if answer(entry.key, entry.value, READING).large
    )
    without = [entry for entry in results if source_of_result(entry) != (("in", 0), large)]
    before = [entry for entry in dead if source_of_dead_letter(entry)[1] < large]
    after = dead[len(before) :]
    once = [*before, dead_letter(place, "record_refused", 98), *after] if first == "record_refused" else dead
    log = [*once, *at(6, [dead_letter(place, "result_too_large", 99), *after])]
    answered = results if first == "result" else without
    assert check(inputs, answered, log, rules(COUNT, refused=True)).problems == ()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"output": {"embedding": [0.5] * 8}}, "wrong vector"),
        ({"id": "x"}, "wrong id"),
        ({"usage": {"truncated": False, "chunks": 9}}, "wrong chunks"),
        ({"metadata": {"n": -1}}, "wrong id"),
        ({"source": {"topic": "in", "partition": 0, "offset": COUNT}}, "result of no input"),
    ],
)
def test_check_when_a_result_is_wrong_then_it_is_named(fields: dict[str, object], found: str) -> None:
    inputs, results, dead = good_run()
    problems = check(inputs, [*results[:-1], changed(results[-1], fields)], dead, rules()).problems
    assert any(found in problem for problem in problems)


def test_check_when_a_document_is_buried_without_excuse_then_problem() -> None:
    inputs, results, dead = good_run()
    offset = orjson.loads(results[-1].value)["source"]["offset"]
    buried = [entry for entry in dead if int(dict(entry.headers)["inferstream.source.offset"]) < offset]
    later = [entry for entry in dead if entry not in buried]
    source = inputs[offset]
    dead = [*buried, dead_letter(source, "model_error", 99), *later]
    excused = rules(raised={answer(source.key, source.value, READING).digests[0][0]})
    assert check(inputs, results[:-1], dead, excused).problems == ()
    [problem] = check(inputs, results[:-1], dead, rules()).problems
    assert "model_error" in problem


def test_check_when_on_another_partition_than_its_key_says_then_problem() -> None:
    inputs, results, dead = good_run()
    problems = check(inputs, results, dead, Rules(1, 3, 1, READING)).problems
    assert any("wrong partition" in problem for problem in problems)
