"""Records that aiokafka alone cannot unpack, in fetch responses built byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder

from inferstream.kafka.unpacking import Fetched, Unpacked

NO_NAME = b"\xff\xfe\xfd"


class Name(str):
    """A header's name that is not UTF-8 on the wire."""

    def encode(self, *_: Any) -> bytes:
        return NO_NAME


def batch(first: int, names: list[str], compression: int = 0) -> bytes:
    """A batch of one record per header name; the offsets count up from ``first``."""
    builder = _DefaultRecordBatchBuilderPy(2, compression, False, -1, -1, -1, 1 << 20)
    for n, name in enumerate(names):
        value = b"value %d" % (first + n)
        assert builder.append(n, 5, b"key", value, [(name, b"1"), ("after", None)]) is not None
    raw = builder.build()
    raw[:8] = first.to_bytes(8, "big")  # the checksum does not cover it
    return bytes(raw)


def unpack(data: bytes, offset: int = 0) -> list[Any]:
    """What a poll finds in the data of a fetch from ``offset`` on."""
    return list(
        Unpacked(TopicPartition("topic", 0), Fetched(data), [], offset, None, None, True, READ_COMMITTED)
    )


@pytest.mark.parametrize("compression", [0, _DefaultRecordBatchBuilderPy.CODEC_ZSTD])
def test_header_names_when_they_are_not_utf8_then_every_record_is_there_once(compression: int) -> None:
    data = batch(10, ["a", "b"]) + batch(12, ["c", Name(), "d", Name()], compression) + batch(16, ["e"])

    records = unpack(data, 10)

    assert [record.offset for record in records] == list(range(10, 17))
    assert [record.value for record in records] == [b"value %d" % offset for offset in range(10, 17)]
    assert [record.headers[0][0] for record in records] == ["a", "b", "c", "�" * 3, "d", "�" * 3, "e"]
    assert all(record.headers[0][1] == b"1" and record.headers[1] == ("after", None) for record in records)


def test_header_names_when_reading_begins_within_the_batch_then_nothing_before_it_comes() -> None:
    assert [record.offset for record in unpack(batch(0, ["a", "b", "c", Name(), "e"]), 3)] == [3, 4]


def test_batch_when_it_is_damaged_then_it_is_not_read_all_the_same() -> None:
    data = bytearray(batch(0, ["a", Name()]))
    data[-3] ^= 1

    with pytest.raises(CorruptRecordException):
        unpack(bytes(data))


def test_timestamp_when_the_format_has_none_then_it_is_minus_one() -> None:
    old = LegacyRecordBatchBuilder(magic=0, compression_type=0, batch_size=1 << 20)
    old.append(0, timestamp=None, key=b"key", value=b"old")

    [record] = unpack(bytes(old.build()))

    assert (record.timestamp, record.key, record.value, record.headers) == (-1, b"key", b"old", ())
