"""The sending part of ``publish``: records to the brokers, a bounded number of them unacknowledged.

It counts each record as accepted or lost, keeps those without a key evenly spread, and goes on after one that
the brokers refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaProducer
from aiokafka.codec import has_zstd
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import murmur2

from inferstream.errors import KafkaRefused
from inferstream.kafka.connection import client_options, start_with_retry
from inferstream.kafka.rights import Right, refused_line

if TYPE_CHECKING:
    from inferstream.kafka.connection import TopicFacts
    from inferstream.settings import Settings
    from inferstream.tools.publish import Counts
    from inferstream.tools.publish_reading import Good

MAX_UNACKNOWLEDGED = 20_000
MAX_UNACKNOWLEDGED_BYTES = 32 << 20
LARGEST_BATCH = 256 * 1024
SMALLEST_BATCH = 16 * 1024
NO_LIMIT = 1 << 30
STALL_STEP_S = (
    0.2  # the stall is put off in steps: once per acknowledgement would cost as much as the sending
)
STOP_TIMEOUT_S = 5.0


class Outbox:
    """Sends records with a bounded number unacknowledged, and survives the refusal of one.

    After a refused batch every later one of its partition is refused as out of sequence.  So the producer is
    replaced then, and what was not acknowledged is sent again one by one, in order: what is refused alone is
    lost and counted, the rest arrives.
    """

    def __init__(self, settings: Settings, topic: str, facts: TopicFacts, counts: Counts) -> None:
        self._kafka = settings.kafka
        self._topic = topic
        self._partitions = facts.partitions
        self._counts = counts
        share = MAX_UNACKNOWLEDGED_BYTES // (2 * facts.partitions)
        limit = facts.max_message_bytes or LARGEST_BATCH
        self._batch_bytes = min(limit, max(SMALLEST_BATCH, min(LARGEST_BATCH, share)))
        self._stall: asyncio.Timeout | None = None
        self._stall_s = 0.0
        self._producer: AIOKafkaProducer | None = None
        self._waiting: dict[int, tuple[Good, int]] = {}  # number → record and partition, unacknowledged
        self._failed: dict[int, BaseException] = {}
        self._bytes = 0
        self._number = 0
        self._next_partition = 0
        self._moved = asyncio.Event()

    async def start(self) -> None:
        producer = AIOKafkaProducer(
            **client_options(self._kafka),
            enable_idempotence=True,
            acks="all",
            compression_type="zstd" if has_zstd() else None,
            max_batch_size=self._batch_bytes,
            max_request_size=NO_LIMIT,  # the size was checked against the topic's own limit
            linger_ms=5,
        )
        self._producer = producer

        async def start() -> None:
            await producer.start()
            await producer.partitions_for(self._topic)  # else the first send would wait for it

        await start_with_retry(self._kafka, start, self._kafka.connect_timeout_s)

    def watch(self, stall: asyncio.Timeout, stall_s: float) -> None:
        """Let ``stall`` expire once something is unacknowledged and nothing has moved for ``stall_s``."""
        self._stall, self._stall_s = stall, stall_s

    def give_up(self) -> None:
        """Count what is unacknowledged as lost."""
        for record, _ in self._waiting.values():
            self._counts.lose(record.where, "not acknowledged in time; it may or may not have arrived")
        self._waiting.clear()

    async def send(self, record: Good) -> None:
        """Hand the record over, after waiting for room."""
        while self._failed or self._is_full(len(record.value)):
            await self._progress()
        if record.key is not None:
            partition = (murmur2(record.key) & 0x7FFFFFFF) % self._partitions
        else:
            partition = self._next_partition
            self._next_partition = (partition + 1) % self._partitions
        number = self._number
        self._number += 1
        self._waiting[number] = record, partition
        if len(self._waiting) == 1:
            self._moves()
        self._bytes += len(record.value)
        try:
            future = await self._handed_over(record, partition)
        except KafkaError as error:
            self._failed[number] = error
            return
        future.add_done_callback(functools.partial(self._acknowledged, number))

    async def drain(self) -> None:
        """Wait until every record is acknowledged or lost."""
        while self._waiting:
            await self._progress()

    async def stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(TimeoutError, KafkaError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await producer.stop()

    async def _handed_over(self, record: Good, partition: int) -> asyncio.Future[Any]:
        assert self._producer is not None
        future: asyncio.Future[Any] = await self._producer.send(
            self._topic, record.value, key=record.key, partition=partition
        )
        return future

    def _acknowledged(self, number: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if number not in self._waiting:
            return
        if error is None:
            self._settle(number)
            self._counts.accepted += 1
        else:
            self._failed[number] = error
        self._moved.set()

    def _settle(self, number: int) -> None:
        record, _ = self._waiting.pop(number)
        self._bytes -= len(record.value)
        self._moves()

    def _moves(self) -> None:
        """Put the stall off; without anything to wait for there is none."""
        if self._stall is None:
            return
        if not self._waiting:
            self._stall.reschedule(None)
            return
        when, wanted = self._stall.when(), asyncio.get_running_loop().time() + self._stall_s
        if when is None or wanted - when > STALL_STEP_S:
            self._stall.reschedule(wanted)

    def _is_full(self, size: int) -> bool:
        if len(self._waiting) >= MAX_UNACKNOWLEDGED:
            return True
        return bool(self._waiting) and self._bytes + size > MAX_UNACKNOWLEDGED_BYTES

    async def _progress(self) -> None:
        """Until an answer comes; what was refused is seen to."""
        if self._failed:
            await self._recover()
            return
        self._moved.clear()
        await self._moved.wait()

    async def _recover(self) -> None:
        """Take a new producer and send what is left one by one."""
        self._refused_for_good(self._failed.values())
        while len(self._failed) < len(self._waiting):  # healthy partitions are still answering
            self._moved.clear()
            await self._moved.wait()
        await self._replace_producer()
        self._failed.clear()
        for number in sorted(self._waiting):
            record, partition = self._waiting[number]
            try:
                await (await self._handed_over(record, partition))
            except KafkaError as error:
                self._refused_for_good([error])
                self._counts.lose(record.where, " ".join(str(error).split()) or type(error).__name__)
                await self._replace_producer()
            else:
                self._counts.accepted += 1
            self._settle(number)

    async def _replace_producer(self) -> None:
        await self.stop()
        await self.start()

    def _refused_for_good(self, errors: Iterable[BaseException]) -> None:
        for error in errors:
            if isinstance(error, TopicAuthorizationFailedError):
                raise KafkaRefused(refused_line(self._kafka, [Right("WRITE", "topic", self._topic)]))
            if isinstance(error, ClusterAuthorizationFailedError):
                right = Right("IDEMPOTENT_WRITE", "cluster", "kafka-cluster")
                raise KafkaRefused(refused_line(self._kafka, [right]))
