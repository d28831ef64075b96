"""`consume`: which records are read, and how each becomes a line; against the embedded broker."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer

from inferstream.documents import Headers, Record
from inferstream.errors import Incomplete, KafkaRefused
from inferstream.settings.tree import Kafka as Connection
from inferstream.tools.consume import Format, Selection, consume, line
from inferstream.tools.embedded import EmbeddedBroker
from tests.support.client import Kafka

pytestmark = pytest.mark.embedded

TOPIC = "results"
PARTITIONS = 4


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        running.create_topic(TOPIC, PARTITIONS)
        yield running


async def produce(broker: EmbeddedBroker, first: int, count: int) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
    await producer.start()
    try:
        for n in range(first, first + count):
            await producer.send_and_wait(TOPIC, b'{"n": %d}' % n, partition=n % PARTITIONS)
    finally:
        await producer.stop()


@dataclass
class Read:
    """What a call of consume gave."""

    numbers: list[int]

    def __call__(self, records: Sequence[Record]) -> None:
        self.numbers += [json.loads(record.value or b"")["n"] for record in records]


def at(broker: EmbeddedBroker) -> Connection:
    return Connection(bootstrap_servers=[broker.bootstrap], connect_timeout_s=3)


async def test_consume_when_from_the_beginning_then_all_come_in_order_per_partition(
    broker: EmbeddedBroker,
) -> None:
    await produce(broker, 0, 40)
    read = Read([])
    written = await consume(at(broker), Selection((TOPIC,), from_beginning=True, max_records=40), read)
    assert written == 40
    for partition in range(PARTITIONS):
        assert [n for n in read.numbers if n % PARTITIONS == partition] == list(range(partition, 40, 4))


async def test_consume_when_a_maximum_is_given_then_not_one_more_is_written(broker: EmbeddedBroker) -> None:
    await produce(broker, 0, 40)
    read = Read([])
    await consume(at(broker), Selection((TOPIC,), from_beginning=True, max_records=3), read)
    assert len(read.numbers) == 3


async def test_consume_when_records_are_huge_once_unpacked_then_few_are_held_at_once(kafka: Kafka) -> None:
    """A fetch is bounded in compressed bytes: these 60 come with one of them, and are 60 MiB.  The embedded
    broker answers with one batch at a time."""
    topic = await kafka.create_topic(kafka.unique("huge"), partitions=1)
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, compression_type="zstd", max_request_size=4 << 20
    )
    await producer.start()
    await asyncio.gather(*[await producer.send(topic, b" " * (1 << 20), partition=0) for _ in range(60)])
    await producer.stop()
    sizes: list[int] = []

    await consume(
        Connection(bootstrap_servers=[kafka.bootstrap]),
        Selection((topic,), from_beginning=True, max_records=60),
        lambda records: sizes.append(len(records)),
    )

    assert sum(sizes) == 60
    assert max(sizes) <= 16


async def test_consume_when_not_from_the_beginning_then_only_what_comes_after_it_is_ready(
    broker: EmbeddedBroker,
) -> None:
    await produce(broker, 0, 8)
    read, ready = Read([]), asyncio.Event()
    reading = asyncio.create_task(
        consume(at(broker), Selection((TOPIC,), max_records=4), read, lambda _: ready.set())
    )
    await asyncio.wait_for(ready.wait(), 10)
    await produce(broker, 100, 4)
    await asyncio.wait_for(reading, 10)
    assert sorted(read.numbers) == [100, 101, 102, 103]


async def test_consume_when_the_maximum_does_not_come_in_time_then_it_is_incomplete(
    broker: EmbeddedBroker,
) -> None:
    await produce(broker, 0, 2)
    selection = Selection((TOPIC,), from_beginning=True, max_records=3, timeout_s=1.0)
    with pytest.raises(Incomplete, match="2 of 3 records"):
        await consume(at(broker), selection, Read([]))


async def test_consume_when_there_is_only_a_timeout_then_it_ends_well(broker: EmbeddedBroker) -> None:
    await produce(broker, 0, 2)
    selection = Selection((TOPIC,), from_beginning=True, timeout_s=1.0)
    assert await consume(at(broker), selection, Read([])) == 2


async def test_consume_when_the_topic_is_missing_then_it_is_refused(broker: EmbeddedBroker) -> None:
    with pytest.raises(KafkaRefused, match="topic nowhere does not exist"):
        await consume(at(broker), Selection(("nowhere",)), Read([]))


# ---- lines


@dataclass(frozen=True)
class FakeRecord:
    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()
    topic: str = "results"
    partition: int = 3
    offset: int = 41
    timestamp: int = 1_700_000_000_000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b'{"a": 1.50}', b'{"a": 1.50}'),
        (b'{\n "a": 1\n}', b'{"a":1}'),
        (None, b"null"),
        (b"not json", b'"not json"'),
        (b"", b'""'),
        (b"\xff\x00", b'{"base64":"/wA="}'),
    ],
)
def test_line_when_a_value_is_anything_then_it_is_one_line_of_json(
    value: bytes | None, expected: bytes
) -> None:
    assert line(FakeRecord(value), Format()) == expected


def test_line_when_headers_are_asked_for_then_the_whole_record_is_there() -> None:
    headers = (("a", b"1"), ("b", None), ("a", b"2"), ("c", b"\xff"))
    assert json.loads(line(FakeRecord(None, b"k", headers), Format(whole=True))) == {
        "topic": "results",
        "partition": 3,
        "offset": 41,
        "timestamp_ms": 1_700_000_000_000,
        "key": "k",
        "headers": {"a": ["1", "2"], "b": None, "c": {"base64": "/w=="}},
        "value": None,
    }


@pytest.mark.parametrize(("encoding", "dtype"), [("base64-f32", "<f4"), ("base64-f16", "<f2")])
def test_line_when_a_vector_is_in_base64_then_decode_makes_it_a_list(encoding: str, dtype: str) -> None:
    vector = np.array([0.5, -0.1, 1e-3], dtype)
    text = base64.b64encode(vector.tobytes()).decode()
    output: dict[str, Any] = {"embedding_base64": text, "encoding": encoding, "dimensions": 3}
    record = FakeRecord(json.dumps({"id": "x", "output": output}).encode())
    assert json.loads(line(record, Format()))["output"] == output
    decoded = json.loads(line(record, Format(decode=True)))
    assert decoded["id"] == "x"
    assert decoded["output"].keys() == {"embedding", "dimensions"}
    assert np.array_equal(np.array(decoded["output"]["embedding"], dtype), vector)


def test_line_when_there_is_nothing_to_decode_then_the_value_is_left_alone() -> None:
    for value in (b'{"output": {"embedding": [1.0]}}', b'{"output": 5}', b"[1]"):
        assert line(FakeRecord(value), Format(decode=True)) == value
    broken = b'{"output": {"embedding_base64": "!", "encoding": "base64-f32"}}'
    assert line(FakeRecord(broken), Format(decode=True)) == broken
