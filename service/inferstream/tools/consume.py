"""Read records of topics and write each as one line of JSON; no group, and nothing is ever committed.

A record is written as its value: JSON as it is, other text as a JSON string, a null value as ``null``, bytes
that are no text as ``{"base64": …}``.  Keys, headers and places come along on request.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from inferstream.documents import Headers, Record
from inferstream.errors import Incomplete, KafkaRefused
from inferstream.kafka.connection import client_options, start_with_retry, topic_facts
from inferstream.kafka.rights import Right

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka

MAX_RECORDS = 500  # decoded at once, on the event loop
# Until their size is known.  A fetch is bounded in compressed bytes: 1 MiB of it may be gigabytes of records.
FIRST_RECORDS = 16
MAX_BYTES = 16 << 20
POLL_MS = 200
STOP_TIMEOUT_S = 5.0
_FLOATS = {"base64-f32": "<f4", "base64-f16": "<f2"}


@dataclass(frozen=True, slots=True)
class Selection:
    """What to read.  ``max_records`` and ``timeout_s`` of None mean no end."""

    topics: tuple[str, ...]
    from_beginning: bool = False
    max_records: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How a record becomes a line: ``decode`` turns base64 vectors into lists, ``whole`` adds all but the value."""

    decode: bool = False
    whole: bool = False


async def consume(
    kafka: Kafka,
    selection: Selection,
    write: Callable[[Sequence[Record]], None],
    ready: Callable[[int], None] = lambda partitions: None,
) -> int:
    """Give the records to ``write`` as they come, per partition in order; the number written comes back.

    A poll that brought nothing gives it nothing, so that it can end the reading.

    ``ready`` is called with the number of partitions once the start positions stand: from then on no record
    is missed.  Partitions that are added later are not read.  Raises Incomplete if ``timeout_s`` passes
    before ``max_records`` were written, KafkaRefused for a missing topic or brokers that do not answer.
    """
    partitions = await _partitions(kafka, selection.topics)
    consumer = AIOKafkaConsumer(
        **client_options(kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # what retention deletes while we read is skipped
        isolation_level="read_committed",
        fetch_max_wait_ms=100,
    )
    written, at_once = 0, FIRST_RECORDS
    try:
        await start_with_retry(kafka, consumer.start, kafka.connect_timeout_s)
        consumer.assign(partitions)
        await start_with_retry(kafka, lambda: _seek(consumer, selection), kafka.connect_timeout_s)
        ready(len(partitions))
        try:
            async with asyncio.timeout(selection.timeout_s):
                while selection.max_records is None or written < selection.max_records:
                    rest = at_once if selection.max_records is None else selection.max_records - written
                    found = await consumer.getmany(timeout_ms=POLL_MS, max_records=min(rest, at_once))
                    for records in found.values() or ((),):
                        write(records)
                        written += len(records)
                    at_once = _at_once([*chain.from_iterable(found.values())]) or at_once
        except TimeoutError:
            if selection.max_records is not None:
                raise Incomplete(
                    f"{written} of {selection.max_records} records came within {selection.timeout_s:g} s"
                ) from None
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await consumer.stop()
    return written


def _at_once(records: Sequence[Record]) -> int:
    """How many records like these may be decoded together; 0 if there are none."""
    size = sum(len(record.value or b"") for record in records)
    return min(MAX_RECORDS, max(1, MAX_BYTES * len(records) // max(size, 1))) if records else 0


async def _partitions(kafka: Kafka, topics: Sequence[str]) -> list[TopicPartition]:
    needed = [Right("READ", "topic", name) for name in topics]
    facts = await start_with_retry(kafka, lambda: topic_facts(kafka, topics, needed), kafka.connect_timeout_s)
    missing = [name for name in topics if name not in facts]
    if missing:
        raise KafkaRefused(
            f"topic {', '.join(missing)} does not exist on {','.join(kafka.bootstrap_servers)}"
        )
    return [TopicPartition(name, n) for name in topics for n in range(facts[name].partitions)]


async def _seek(consumer: AIOKafkaConsumer, selection: Selection) -> None:
    if selection.from_beginning:
        await consumer.seek_to_beginning()
    else:
        await consumer.seek_to_end()


def line(record: Record, form: Format) -> bytes:
    """The record as one line of JSON, without the line's end."""
    value = _value(record.value, form.decode)
    if not form.whole:
        return value
    return orjson.dumps(
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "timestamp_ms": record.timestamp,
            "key": text_or_base64(record.key),
            "headers": headers_object(record.headers),
            "value": orjson.Fragment(value),
        }
    )


def _value(value: bytes | None, decode: bool) -> bytes:
    if value is None:
        return b"null"
    try:
        tree = orjson.loads(value)
    except orjson.JSONDecodeError:
        return orjson.dumps(text_or_base64(value))
    if decode and isinstance(tree, dict):
        output = tree.get("output")
        if isinstance(output, dict) and (decoded := _decoded(output)) is not None:
            return orjson.dumps({**tree, "output": decoded}, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"\n" in value or b"\r" in value:
        return orjson.dumps(tree)  # written over several lines
    return value


def _decoded(output: dict[str, Any]) -> dict[str, Any] | None:
    """The output with its vector as numbers, as ``output.encoding: json`` writes it; None if it has none."""
    text, encoding = output.get("embedding_base64"), output.get("encoding")
    if not isinstance(text, str) or encoding not in _FLOATS:
        return None
    try:
        vector = np.frombuffer(base64.b64decode(text, validate=True), _FLOATS[encoding])
    except (binascii.Error, ValueError):
        return None  # not ours: left as it is
    rest = {name: value for name, value in output.items() if name not in ("embedding_base64", "encoding")}
    return {"embedding": vector, **rest}


def headers_object(headers: Headers) -> dict[str, Any]:
    """Name → value; a name that stands there several times has the list of its values."""
    values: dict[str, list[Any]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(text_or_base64(value))
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def text_or_base64(value: bytes | None) -> str | dict[str, str] | None:
    """Bytes as JSON can hold them."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
