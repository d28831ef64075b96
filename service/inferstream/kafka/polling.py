"""One poll, bounded by bytes: what aiokafka hands over counts only records.

``getmany(max_records=n)`` unpacks n records whatever they weigh, and a megabyte on the wire may be gigabytes
unpacked.  But it unpacks them one by one.  So the first record is waited for with ``getmany``, and those that
lie at hand behind it are taken from the same buffers, until the bound is reached: a poll exceeds it by less
than its last record.

What no bound of ours reaches: a record batch is decompressed whole when its first record is taken, and stays
until its last one is.  Each partition holds at most one such batch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import FetchResult

from inferstream.credit import RECORD_OVERHEAD


async def poll(
    consumer: AIOKafkaConsumer,
    partitions: Collection[TopicPartition],
    timeout_ms: int,
    max_records: int,
    max_bytes: int,
) -> dict[TopicPartition, list[Any]]:
    """As ``getmany``, with less than ``max_bytes`` before the last record; raises what ``getmany`` raises.

    It waits only for the first record: when it returns, the positions have moved in this step of the event loop.
    """
    fetched: dict[TopicPartition, list[Any]] = await consumer.getmany(
        *partitions, timeout_ms=timeout_ms, max_records=1
    )
    if not fetched:
        return fetched
    left = max_records - 1
    room = max_bytes - sum(weight_of(record) for records in fetched.values() for record in records)
    fetcher = consumer._fetcher
    for tp, result in list(fetcher._records.items()):
        if left <= 0 or room <= 0:
            break
        if tp not in partitions or type(result) is not FetchResult:
            continue  # an error: the poll that finds nothing else raises it
        records = fetched.get(tp, [])
        before = len(records)
        room = _take(result, tp, records, left, room)
        left -= len(records) - before
        if records:
            fetched[tp] = records
        if not result.has_more():
            del fetcher._records[tp]
            fetcher._notify(fetcher._wait_consume_future)  # the partition may be fetched again
    return fetched


def _take(result: FetchResult, tp: TopicPartition, records: list[Any], left: int, room: int) -> int:
    """Append up to ``left`` records while there is room, and give the room that remains: ``getall`` by bytes."""
    if not result.has_more() or not result.check_assignment(tp):
        return room
    try:
        for record in result._partition_records:
            records.append(record)
            left -= 1
            room -= weight_of(record)
            if left <= 0 or room <= 0:
                result._update_position()
                return room
    except Exception:
        # A record that cannot be unpacked.  What came before it counts; the next fetch begins with it, and
        # raises this again in ``getmany``.
        pass
    result._update_position()
    result._partition_records = None  # nothing is left
    return room


def weight_of(record: Any) -> int:
    """The bytes a record takes in memory."""
    size = RECORD_OVERHEAD + len(record.value or b"") + len(record.key or b"")
    if record.headers:
        size += sum(len(name) + len(value or b"") for name, value in record.headers)
    return size
