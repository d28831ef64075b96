"""`publish`: what is sent, what is refused, and what is counted; against the embedded broker."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import MessageSizeTooLargeError, OutOfOrderSequenceNumber
from aiokafka.partitioner import murmur2

from inferstream.errors import Incomplete, KafkaRefused, SettingsError
from inferstream.settings import Settings, load_settings
from inferstream.tools import publish_reading
from inferstream.tools.embedded import EmbeddedBroker
from inferstream.tools.publish import Counts, Options, publish
from inferstream.tools.publish_reading import Bad, Chunk, Good, Reader, in_thread
from inferstream.tools.publish_sending import Outbox

pytestmark = pytest.mark.embedded

PARTITIONS = 4
TOPIC = "documents"


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        running.create_topic(TOPIC, PARTITIONS)
        yield running


def settings(bootstrap: str = "localhost:1", **others: Any) -> Settings:
    flags = {"kafka.bootstrap_servers": bootstrap}
    flags |= {name.replace("__", "."): value for name, value in others.items()}
    return load_settings((), {}, flags, require=False).settings


async def sent(broker: EmbeddedBroker) -> list[ConsumerRecord]:
    """All records of the topic, by partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(TOPIC, n) for n in range(PARTITIONS)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: list[ConsumerRecord] = []
        async with asyncio.timeout(20):
            while len(found) < sum(ends.values()):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
        return sorted(found, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


def read(source: Path, limit: int | None = None, **options: Any) -> list[Good | Bad]:
    reader = Reader(settings(**options.pop("settings", {})), Options((str(source),), TOPIC, **options))
    reader.limit = limit
    return [item for chunk in reader.chunks() for item in chunk.items]


def documents(items: list[Good | Bad]) -> list[Any]:
    return [json.loads(item.value) if isinstance(item, Good) else item.reason for item in items]


# ---- what becomes a record


def test_publish_when_lines_are_json_then_they_are_sent_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1,  "text": "one"}\r\n\n  \n{"text":"two"}')
    items = read(path)
    assert [item.value for item in items if isinstance(item, Good)] == [
        b'{"id": 1,  "text": "one"}',
        b'{"text":"two"}',
    ]
    assert [item.where for item in items] == [f"{path}:1", f"{path}:4"]


def test_publish_when_lines_are_text_then_each_is_a_document_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("first\n\nsecond, naïve\n")
    assert documents(read(path)) == [
        {"id": f"{path}:1", "text": "first"},
        {"id": f"{path}:3", "text": "second, naïve"},
    ]
    assert documents(read(path, id_from="line"))[1] == {"id": "3", "text": "second, naïve"}
    assert documents(read(path, id_from="none"))[1] == {"text": "second, naïve"}


def test_publish_when_json_has_no_id_then_the_line_gives_one_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text":"one"}\n{"id":"mine","text":"two"}\n')
    assert documents(read(path)) == [{"text": "one"}, {"id": "mine", "text": "two"}]
    assert documents(read(path, id_from="line")) == [
        {"text": "one", "id": "1"},
        {"id": "mine", "text": "two"},
    ]


def test_publish_when_the_source_is_a_folder_then_each_file_is_a_document_named_by_its_path(
    tmp_path: Path,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/y.txt", ".git/x.txt", ".hidden"):
        (tmp_path / name).write_text(f"text of {name}\nsecond line")
    assert documents(read(tmp_path)) == [
        {"id": "z.txt", "text": "text of z.txt\nsecond line"},
        {"id": "b/y.txt", "text": "text of b/y.txt\nsecond line"},
    ]


def test_publish_when_fields_are_configured_then_documents_are_built_with_them(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("words\n")
    fields = {"input__text_field": "/doc/body", "input__id_field": "/doc/name"}
    assert documents(read(path, id_from="line", settings=fields)) == [{"doc": {"name": "1", "body": "words"}}]


def test_publish_when_the_input_format_is_text_then_lines_are_sent_bare(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("words\n")
    assert read(path, settings={"input__format": "text"}) == [Good(f"{path}:1", None, b"words")]


def test_publish_when_a_key_field_is_given_then_strings_and_integers_become_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"user":{"id":"a"},"text":"t"}', '{"user":{"id":7},"text":"t"}', '{"text":"t"}']
    path.write_text("\n".join([*lines, '{"user":{"id":[1]},"text":"t"}']))
    items = read(path, key_field="/user/id")
    assert [item.key for item in items if isinstance(item, Good)] == [b"a", b"7", None]
    assert documents(items)[3] == "invalid_key"


# ---- what is refused


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{nonsense", "invalid_json"),
        (b'{"id": 1}', "missing_text"),
        (b'{"text": "  "}', "invalid_text"),
        (b'{"text": 5}', "invalid_text"),
        (b'{"text": "t", "id": [1]}', "invalid_id"),
        (b'{"text": "\xff"}', "invalid_utf8"),
    ],
)
def test_publish_when_a_document_breaks_the_schema_then_it_is_refused_and_its_neighbours_are_not(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"before"}\n' + line + b'\n{"text":"after"}\n')
    assert documents(read(path)) == [{"text": "before"}, reason, {"text": "after"}]


def test_publish_when_raw_then_nothing_is_refused_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":1}\n\xff\xfe\nno json\n')
    values = [item.value for item in read(path, raw=True, key_field="id") if isinstance(item, Good)]
    assert values == [b'{"id":1}', b"\xff\xfe", b"no json"]


def test_publish_when_a_document_is_larger_than_the_topics_limit_then_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    repetitive, random = "a" * 50_000, os.urandom(30_000).hex()
    path.write_text("\n".join(json.dumps({"text": text}) for text in (repetitive, random, "small")))
    kept = [item if isinstance(item, Bad) else "sent" for item in read(path, limit=20_000)]
    assert kept[0] == kept[2] == "sent"  # the first fits compressed, as it is sent
    assert isinstance(kept[1], Bad) and kept[1].reason == "too_large"


def test_publish_when_a_line_never_ends_then_it_is_refused_with_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_reading, "MAX_RECORD_BYTES", 100_000)
    monkeypatch.setattr(publish_reading, "READ_BYTES", 4_096)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text":"before"}\n' + "x" * 1_000_000 + '\n{"text":"after"}\n' + "y" * 300_000)
    items = read(path)
    assert documents(items) == [{"text": "before"}, "too_large", {"text": "after"}, "too_large"]
    assert [item.where for item in items] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


def test_publish_when_a_source_is_one_json_array_then_it_says_how_to_make_lines_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "one"}\n]\n')
    with pytest.raises(SettingsError, match="jq"):
        read(path)


def test_publish_when_a_source_is_missing_then_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere: no such file or folder"):
        read(tmp_path / "nowhere")


def test_publish_when_a_source_is_the_empty_text_then_the_current_folder_is_not_sent() -> None:
    with pytest.raises(SettingsError, match="a name is empty"):
        Reader(settings(), Options(("",), TOPIC))


@pytest.mark.parametrize(
    ("options", "others"), [({"raw": True}, {}), ({"id_from": "path"}, {"input__format": "text"})]
)
def test_publish_when_an_id_would_not_be_added_then_asking_for_it_is_refused(
    options: dict[str, Any], others: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match="--id-from"):
        Reader(settings(**others), Options(("-",), TOPIC, **{"id_from": "line", **options}))


# ---- sending


async def test_publish_when_all_is_well_then_every_document_arrives_once_and_is_counted(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"text {n}"}) + "\n" for n in range(5_000)))
    counts = Counts()
    await publish(settings(broker.bootstrap), Options((str(path),), TOPIC, key_field="id"), counts)
    assert (counts.accepted, counts.failed) == (5_000, 0)
    assert counts.read_bytes == counts.total_bytes == path.stat().st_size
    records = await sent(broker)
    assert sorted(json.loads(record.value)["id"] for record in records) == list(range(5_000))
    # Where every other client puts the same key.
    assert all(record.partition == (murmur2(record.key) & 0x7FFFFFFF) % PARTITIONS for record in records)


async def test_publish_when_documents_have_no_key_then_they_are_spread_evenly(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {n}\n" for n in range(40)))
    await publish(settings(broker.bootstrap), Options((str(path),), TOPIC), Counts())
    partitions = [record.partition for record in await sent(broker)]
    assert [partitions.count(n) for n in range(PARTITIONS)] == [10] * PARTITIONS


async def test_publish_when_a_document_is_several_megabytes_then_it_is_sent(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 1_000_000}) + "\n")
    counts = Counts()
    await publish(settings(broker.bootstrap), Options((str(path),), TOPIC), counts)
    assert counts.accepted == 1


async def test_publish_when_the_topic_is_missing_then_it_is_refused_and_not_created(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\n")
    for _ in range(2):
        with pytest.raises(KafkaRefused, match="topic nowhere does not exist"):
            await publish(settings(broker.bootstrap), Options((str(path),), "nowhere"), Counts())


async def test_publish_when_no_broker_answers_then_it_gives_up_and_names_the_host(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\n")
    one = settings("127.0.0.1:1", kafka__connect_timeout_s=1)
    with pytest.raises(KafkaRefused, match=r"127\.0\.0\.1:1 \(connection refused\)"):
        await publish(one, Options((str(path),), TOPIC), Counts())


async def test_publish_when_the_broker_goes_away_for_good_then_the_rest_is_counted_as_failed(
    broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\n" * 50)
    started = Outbox.start

    async def start_and_lose_the_broker(self: Outbox) -> None:
        await started(self)
        broker.set_reachable(False)

    monkeypatch.setattr(Outbox, "start", start_and_lose_the_broker)
    counts = Counts()
    one = settings(broker.bootstrap, kafka__connect_timeout_s=1)
    with pytest.raises(Incomplete, match="acknowledged nothing"):
        await publish(one, Options((str(path),), TOPIC), counts)
    assert (counts.accepted, counts.lost) == (0, 50)


async def test_publish_when_a_record_is_refused_then_the_rest_still_arrives_once_and_in_order(
    broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a real broker does with a record that is too large: refused, and its successors out of sequence."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": "text"}) + "\n" for n in range(200)))
    hand_over = Outbox._handed_over
    broken_producers: list[Any] = []  # the objects, not their ids: a new one may have an old one's id

    async def refuse(self: Outbox, record: Good, partition: int) -> asyncio.Future[Any]:
        broken = any(self._producer is producer for producer in broken_producers)
        if json.loads(record.value)["id"] == 50 or broken:
            broken_producers.append(self._producer)
            refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            refused.set_exception(OutOfOrderSequenceNumber() if broken else MessageSizeTooLargeError())
            return refused
        return await hand_over(self, record, partition)

    monkeypatch.setattr(Outbox, "_handed_over", refuse)
    counts = Counts()
    await publish(settings(broker.bootstrap), Options((str(path),), TOPIC), counts)
    assert (counts.accepted, counts.lost) == (199, 1)
    assert counts.problems[0].startswith(f"{path}:51: not_accepted: ")
    ids = [(record.partition, json.loads(record.value)["id"]) for record in await sent(broker)]
    assert ids == sorted(ids)
    assert sorted(n for _, n in ids) == [n for n in range(200) if n != 50]


async def test_publish_when_a_chunk_is_slow_to_come_then_the_ones_before_are_not_held_back() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, True)
    reader = Reader(settings(), Options(("-",), TOPIC, format="text"))
    chunks = in_thread(reader._lines("stdin", reading))
    try:
        os.write(writing, b"first\n")
        first = await asyncio.wait_for(anext(chunks), 5)
        os.write(writing, b"second\n")
        second = await asyncio.wait_for(anext(chunks), 5)
    finally:
        os.close(writing)
    assert documents([*first.items, *second.items]) == [
        {"id": "stdin:1", "text": "first"},
        {"id": "stdin:2", "text": "second"},
    ]
    assert [chunk async for chunk in chunks] == [Chunk([], 0)]
    os.close(reading)
