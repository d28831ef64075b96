"""What a test asks of a broker: topics, records in, records out, committed offsets.

Every call opens a client of its own and closes it: nothing is shared between tests, and a helper that was
called before a broker was killed has no connection left to mislead the test afterwards.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
    TopicAlreadyExistsError,
    for_code,
)
from aiokafka.record.util import calc_crc32c

DEADLINE_S = 60.0
"""How long a helper waits for the broker before it fails the test."""

PARTITIONS = 4

CRC_AT, BODY_AT = 17, 21
"""Where a v2 record batch has its checksum, and what that covers."""


class Sent(NamedTuple):
    """A record to produce; a plain tuple of the same shape, or a shorter one, does as well."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str | bytes, bytes | None]] = ()  # bytes: a name that is not UTF-8
    partition: int | None = None


def masked(name: bytes) -> bytes:
    """ASCII that takes a header name's place in a batch until it is built."""
    return bytes(byte & 0x7F for byte in name)


def unmasked(build: Callable[[], bytearray], names: Iterable[bytes]) -> bytearray:
    """The built batch, uncompressed, with its header names as they are to be, and the checksum of that."""
    data = build()
    for name in names:
        data = data.replace(masked(name), name)
    data[CRC_AT:BODY_AT] = calc_crc32c(data[BODY_AT:]).to_bytes(4, "big")
    return data


def unique(name: str) -> str:
    """A topic or group name that no other test has: one broker serves them all."""
    return f"{name}-{uuid.uuid4().hex[:10]}"


class Kafka:
    """A broker by its address, or several by their addresses with commas between."""

    replicas = 1  # of each topic that is created

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def unique(self, name: str) -> str:
        return unique(name)

    async def create_topic(
        self, name: str, partitions: int = PARTITIONS, configs: Mapping[str, str] | None = None
    ) -> str:
        """Create the topic and wait until each partition has a leader; its name comes back."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            topic = NewTopic(name, partitions, self.replicas, topic_configs=dict(configs or {}))
            answer = await admin.create_topics([topic])
            for _, code, *message in answer.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise error(f"create topic {name}: {message}")
            deadline = time.monotonic() + DEADLINE_S
            while time.monotonic() < deadline:
                [seen] = await admin.describe_topics([name])
                if len(seen["partitions"]) == partitions and all(
                    p["leader"] >= 0 for p in seen["partitions"]
                ):
                    return name
                await asyncio.sleep(0.02)
            raise TimeoutError(f"topic {name} has no leaders after {DEADLINE_S:.0f} s")
        finally:
            await admin.close()

    async def produce(
        self, topic: str, records: Iterable[Sent | tuple[Any, ...]], **options: Any
    ) -> list[tuple[int, int]]:
        """Send the records in order and wait for all; the (partition, offset) of each comes back.

        ``options`` go to the producer.
        """
        producer = AIOKafkaProducer(
            **{
                "bootstrap_servers": self.bootstrap,
                "enable_idempotence": True,
                "max_request_size": 64 << 20,  # the topic's limit decides, not ours
                **options,
            }
        )
        await producer.start()
        try:
            futures = []
            for record in records:
                key, value, headers, partition = Sent(*record)
                raw = [name for name, _ in headers if isinstance(name, bytes)]
                # send() refuses both; a batch does not
                if partition is not None and (raw or (key is None and value is None)):
                    await producer.flush()
                    batch = producer.create_batch()
                    names = [masked(name).decode() if name in raw else name for name, _ in headers]
                    values = [value for _, value in headers]
                    batch.append(
                        timestamp=None, key=key, value=value, headers=[*zip(names, values, strict=True)]
                    )
                    batch.close()
                    if raw:
                        batch._build = partial(unmasked, batch._build, raw)
                    futures.append(await producer.send_batch(batch, topic, partition=partition))
                    continue
                futures.append(
                    await producer.send(topic, value, key=key, headers=list(headers), partition=partition)
                )
            done = await asyncio.gather(*futures)
        finally:
            await producer.stop()
        return [(metadata.partition, metadata.offset) for metadata in done]

    async def read_all(
        self, topic: str, isolation: str = "read_committed", start: Mapping[int, int] | None = None
    ) -> list[ConsumerRecord]:
        """The topic from its beginning to the end it has now, partition by partition in offset order.

        ``start`` gives partitions a later first offset.  Under read_committed the end is before the first
        open transaction.
        """
        consumer = self._consumer(isolation_level=isolation)
        await consumer.start()
        try:
            partitions = await self._partitions(consumer, topic)
            consumer.assign(partitions)
            begin = await consumer.beginning_offsets(partitions)
            end = await consumer.end_offsets(partitions)
            for partition in partitions:
                consumer.seek(partition, (start or {}).get(partition.partition, begin[partition]))
            records: list[ConsumerRecord] = []
            deadline = time.monotonic() + DEADLINE_S
            # position() and not the count of records: compaction and transaction markers take offsets too.
            while left := [p for p in partitions if await consumer.position(p) < end[p]]:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{topic} is not read to its end after {DEADLINE_S:.0f} s: {left}")
                for partition, batch in (await consumer.getmany(*left, timeout_ms=200)).items():
                    records += [record for record in batch if record.offset < end[partition]]
        finally:
            await consumer.stop()
        return sorted(records, key=lambda record: (record.partition, record.offset))

    async def end_offsets(self, topic: str, isolation: str = "read_committed") -> dict[int, int]:
        """The next offset of each partition, as a reader with this isolation sees it."""
        consumer = self._consumer(isolation_level=isolation)
        await consumer.start()
        try:
            partitions = await self._partitions(consumer, topic)
            consumer.assign(partitions)
            return {p.partition: offset for p, offset in (await consumer.end_offsets(partitions)).items()}
        finally:
            await consumer.stop()

    async def committed(self, group: str, topic: str) -> dict[int, int]:
        """The committed offset of each partition that has one."""
        return {partition: offset for partition, (offset, _) in (await self.commits(group, topic)).items()}

    async def commits(self, group: str, topic: str) -> dict[int, tuple[int, str]]:
        """The committed offset and its metadata text, for each partition that has one."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            deadline = time.monotonic() + DEADLINE_S
            while True:
                try:
                    offsets = await admin.list_consumer_group_offsets(group)
                    break
                except (
                    GroupCoordinatorNotAvailableError,
                    GroupLoadInProgressError,
                    NotCoordinatorForGroupError,
                ):
                    # A fresh broker makes the offsets topic when it is first asked; a restarted one loads it.
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(0.05)
        finally:
            await admin.close()
        return {
            partition.partition: (found.offset, found.metadata or "")
            for partition, found in offsets.items()
            if partition.topic == topic and found.offset >= 0
        }

    @asynccontextmanager
    async def member_of_another_kind(self, group: str, topic: str) -> AsyncIterator[None]:
        """Meanwhile the group has a member that shares no assignor with a worker."""
        async with AIOKafkaConsumer(
            topic,
            bootstrap_servers=self.bootstrap,
            group_id=group,
            partition_assignment_strategy=(RangePartitionAssignor,),
        ):
            yield

    def _consumer(self, **options: Any) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=50,
            **options,
        )

    async def _partitions(self, consumer: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            [seen] = await admin.describe_topics([topic])
        finally:
            await admin.close()
        if seen["error_code"]:
            raise for_code(seen["error_code"])(f"topic {topic}")
        return sorted(TopicPartition(topic, p["partition"]) for p in seen["partitions"])
