"""The checker itself: a run that keeps every promise passes, and each broken one is found."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pytest
from aiokafka import ConsumerRecord

from inferstream.tasks.hash import hash_vectors
from tests.faults.checker import Rules, check, source_of_dead_letter
from tests.faults.documents import answer, header, record

SEED = 7
COUNT = 400
RULES = {"input_partitions": 1, "output_partitions": 1, "dead_letter_partitions": 1}


def consumed(
    topic: str, offset: int, key: bytes, value: bytes | None, headers: Sequence[tuple[str, bytes]]
) -> ConsumerRecord:
    return ConsumerRecord(
        topic, 0, offset, 0, 0, key, value, None, len(key), len(value or b""), tuple(headers)
    )


def good_run() -> tuple[list[ConsumerRecord], list[ConsumerRecord], list[ConsumerRecord]]:
    """Input, results and dead letters of a run that kept every promise."""
    inputs = [consumed("in", n, *record(SEED, n), header(SEED)) for n in range(COUNT)]
    results, dead = [], []
    for source in inputs:
        expected = answer(source.value)
        if expected.digest is not None:
            value = {
                "id": expected.id,
                "output": {"embedding": hash_vectors([expected.digest])[0].tolist()},
                "source": {"topic": "in", "partition": 0, "offset": source.offset},
            }
            if expected.metadata is not None:
                value["metadata"] = expected.metadata
            results.append(consumed("out", len(results), source.key, orjson.dumps(value), header(SEED)))
        else:
            dead.append(dead_letter(source, str(expected.reason), len(dead)))
    return inputs, results, dead


def dead_letter(source: ConsumerRecord, reason: str, offset: int) -> ConsumerRecord:
    told = {"error.reason": reason, "source.partition": "0", "source.offset": str(source.offset)}
    headers = [(f"inferstream.{name}", text.encode()) for name, text in told.items()]
    return consumed("dead", offset, source.key, source.value, [*header(SEED), *headers])


def changed(result: ConsumerRecord, fields: dict[str, object]) -> ConsumerRecord:
    value = orjson.loads(result.value) | fields
    return consumed("out", result.offset, result.key, orjson.dumps(value), result.headers)


def test_check_when_every_promise_was_kept_then_no_problem() -> None:
    inputs, results, dead = good_run()
    findings = check(inputs, results, dead, Rules(**RULES))
    assert (findings.documents, findings.lost, findings.duplicated, findings.problems) == (COUNT, 0, 0, ())
    assert len(results) > 300 and len(dead) > 3


def test_check_when_an_answer_is_missing_then_lost() -> None:
    inputs, results, dead = good_run()
    findings = check(inputs, results[:50] + results[51:], dead[1:], Rules(**RULES, repeats=1000))
    assert findings.lost == 2
    assert any("no answer" in problem for problem in findings.problems)


def test_check_when_more_repeats_than_allowed_then_problem() -> None:
    inputs, results, dead = good_run()
    again = [*results, *results[-10:]]
    assert check(inputs, again, dead, Rules(**RULES, repeats=10)).problems == ()
    findings = check(inputs, again, dead, Rules(**RULES, repeats=9))
    assert findings.duplicated == 10
    assert len(findings.problems) == 1


@pytest.mark.parametrize("repeated", [False, True])
def test_check_when_two_are_swapped_then_out_of_order(repeated: bool) -> None:
    inputs, results, dead = good_run()
    swapped = [*results[:20], results[21], results[20], *results[22:]]
    log = results + swapped[10:] if repeated else swapped
    problems = check(inputs, log, dead, Rules(**RULES, repeats=COUNT)).problems
    assert len(problems) == 1
    assert "out of order" in problems[0]


def test_check_when_a_zombie_writes_between_the_next_owners_results_then_order_holds() -> None:
    inputs, results, dead = good_run()
    late = [entry for pair in zip(results[10:30], results[5:25], strict=True) for entry in pair]
    log = [*results[:10], *late, *results[25:]]
    assert check(inputs, log, dead, Rules(**RULES, repeats=COUNT)).problems == ()


@pytest.mark.parametrize("first", ["record_refused", "result"])
def test_check_when_an_answer_is_of_another_kind_the_second_time_then_order_holds(first: str) -> None:
    """A document is answered, so is a later one; the worker dies, and its successor reads the topic's lowered limit."""
    inputs, results, dead = good_run()
    large, place = next((n, entry) for n, entry in enumerate(inputs) if answer(entry.value).large)
    without = [entry for entry in results if orjson.loads(entry.value)["source"]["offset"] != large]
    before = [entry for entry in dead if source_of_dead_letter(entry)[1] < large]
    after = dead[len(before) :]
    once = [*before, dead_letter(place, "record_refused", 98), *after] if first == "record_refused" else dead
    log = [*once, dead_letter(place, "result_too_large", 99), *after]
    answered = results if first == "result" else without
    assert check(inputs, answered, log, Rules(**RULES, repeats=COUNT, refused=True)).problems == ()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"output": {"embedding": [0.5] * 8}}, "wrong vector"),
        ({"id": "x"}, "wrong id"),
        ({"metadata": {"n": -1}}, "wrong id"),
        ({"source": {"topic": "in", "partition": 0, "offset": COUNT}}, "result of no input"),
    ],
)
def test_check_when_a_result_is_wrong_then_it_is_named(fields: dict[str, object], found: str) -> None:
    inputs, results, dead = good_run()
    problems = check(inputs, [*results[:-1], changed(results[-1], fields)], dead, Rules(**RULES)).problems
    assert any(found in problem for problem in problems)


def test_check_when_a_document_is_buried_without_excuse_then_problem() -> None:
    inputs, results, dead = good_run()
    offset = orjson.loads(results[-1].value)["source"]["offset"]
    buried = [entry for entry in dead if int(dict(entry.headers)["inferstream.source.offset"]) < offset]
    later = [entry for entry in dead if entry not in buried]
    source = inputs[offset]
    dead = [*buried, dead_letter(source, "model_error", 99), *later]
    excused = Rules(**RULES, raised={(answer(source.value).digest or b"")[0]})
    assert check(inputs, results[:-1], dead, excused).problems == ()
    [problem] = check(inputs, results[:-1], dead, Rules(**RULES)).problems
    assert "model_error" in problem


def test_check_when_on_another_partition_than_its_key_says_then_problem() -> None:
    inputs, results, dead = good_run()
    problems = check(inputs, results, dead, Rules(1, 3, 1)).problems
    assert any("wrong partition" in problem for problem in problems)
