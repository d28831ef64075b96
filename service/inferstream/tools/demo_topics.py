"""The demo's own clients: they write the documents and read what comes out, as any other program could."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition

from inferstream.tools.demo_ledger import DeadLetter, Ledger, Place

INPUT, OUTPUT, DEAD_LETTERS = "documents", "embeddings", "embeddings.dead-letters"
PARTITIONS = 8  # the embedded broker keeps about 5 MB of each

_MAX_RECORDS = 500  # of one poll: decoding is synchronous
_STOP_S = 2.0
_OUTPUTS = [TopicPartition(topic, n) for topic in (OUTPUT, DEAD_LETTERS) for n in range(PARTITIONS)]
_INPUTS = [TopicPartition(INPUT, n) for n in range(PARTITIONS)]


class Topics:
    """Writes the input topic and reads both output topics, into the ledger; an async context manager."""

    def __init__(self, bootstrap: str, ledger: Ledger) -> None:
        self._ledger = ledger
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=5)
        # No group: it only looks, from the first record on, while the worker writes.
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,  # a question for the end of a partition waits behind the fetch
        )
        self._reading: asyncio.Task[None] | None = None

    async def send(self, records: Sequence[tuple[str, bytes]]) -> None:
        """Write records (key, value) and note where the broker has put them."""
        sending = [await self._producer.send(INPUT, key=key.encode(), value=value) for key, value in records]
        for (key, _), future in zip(records, sending, strict=True):
            written = await future
            self._ledger.sent[Place(written.partition, written.offset)] = key

    async def caught_up(self) -> None:
        """Return when everything that is on the output topics by now has been read."""
        ends = await self._consumer.end_offsets(_OUTPUTS)
        for partition, end in ends.items():
            while await self._consumer.position(partition) < end:
                self.check()
                await asyncio.sleep(0.02)

    async def inputs(self) -> int:
        """How many records the input topic has taken."""
        return sum((await self._consumer.end_offsets(_INPUTS)).values())

    def check(self) -> None:
        """Raise what ended the reading, if something did."""
        if self._reading is not None and self._reading.done():
            self._reading.result()

    async def __aenter__(self) -> Self:
        try:
            await self._producer.start()
            await self._consumer.start()
        except BaseException:
            await self._stop()
            raise
        self._consumer.assign(_OUTPUTS)
        self._reading = asyncio.create_task(self._read(), name="read")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.gather(self._producer.stop(), self._consumer.stop(), return_exceptions=True)

    async def _read(self) -> None:
        while True:
            batches = await self._consumer.getmany(timeout_ms=200, max_records=_MAX_RECORDS)
            for partition, records in batches.items():
                take = read_result if partition.topic == OUTPUT else read_dead_letter
                for record in records:
                    take(record, self._ledger)


def document(name: str, text: str) -> tuple[str, bytes]:
    """Key and value of a document's record."""
    return name, orjson.dumps({"id": name, "text": text})


def read_result(record: ConsumerRecord, ledger: Ledger) -> None:
    """Enter a result (``schemas/result.v1``, base64) into the ledger."""
    result = orjson.loads(record.value)
    source = result["source"]
    vector = np.frombuffer(base64.b64decode(result["output"]["embedding_base64"]), "<f4")
    ledger.result(result["id"], Place(source["partition"], source["offset"]), vector)


def read_dead_letter(record: ConsumerRecord, ledger: Ledger) -> None:
    """Enter a dead letter (``schemas/dead-letter-headers.v1``) into the ledger."""
    headers = {name: (value or b"").decode() for name, value in record.headers}
    place = Place(int(headers["inferstream.source.partition"]), int(headers["inferstream.source.offset"]))
    ledger.dead_letter(DeadLetter((record.key or b"").decode(), place, headers["inferstream.error.reason"]))
