"""How documents get onto the input topics: plainly, or in transactions of which some are aborted."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException, Message, Producer

from tests.faults.checker import Input
from tests.faults.documents import record
from tests.support.client import Kafka, Sent

AHEAD = 1_600  # documents of each partition that are there and not committed: more than any worker holds
ABORTS = 0.5  # how often a transaction is aborted before one that is not
ABORTED = 15  # records of such a one
LOOK_S = 0.2
CLIENT_TIMEOUT_MS = 5_000
TRANSACTION_S = 10.0  # for each step of one

Publish = Callable[[list[Sent]], Awaitable[int]]
"""Publishes the records; the offset behind the last one comes back."""


class Transactional:
    """Publishes to one partition in transactions, with librdkafka.  Blocks."""

    def __init__(self, bootstrap: str, source: Input) -> None:
        self._source = source
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "transactional.id": f"publisher-{source[0]}-{source[1]}",
                "transaction.timeout.ms": int(TRANSACTION_S * 1000),
                "delivery.timeout.ms": int(TRANSACTION_S * 1000),
                "linger.ms": 5,
                "reconnect.backoff.max.ms": 500,
                "log_level": 0,
            }
        )
        self._producer.init_transactions(TRANSACTION_S)

    def publish(self, records: list[Sent], commit: bool) -> int:
        """The offset behind the last record comes back; the transaction's marker is there.  KafkaException."""
        offsets = [-1]

        def delivered(error: object, message: Message) -> None:
            if error is None:
                offsets.append(message.offset())

        topic, partition = self._source
        self._producer.begin_transaction()
        for key, value, headers, _ in records:
            self._producer.produce(topic, value, key, partition, on_delivery=delivered, headers=list(headers))
        self._producer.flush(TRANSACTION_S)  # aborted records shall be in the log, too
        if commit:
            self._producer.commit_transaction(TRANSACTION_S)
        else:
            self._producer.abort_transaction(TRANSACTION_S)
        return max(offsets) + 1


class Feeder:
    """Publishes documents so that each input always has some that are not committed, AHEAD of them at most.

    ``inputs`` may grow.  ``committed`` and ``left`` (offsets published and not committed) are as when it was last
    looked; with a transactional publisher fewer than one in twenty of those left are a marker or an aborted record.
    """

    def __init__(
        self,
        kafka: Kafka,
        inputs: list[Input],
        group: str,
        seed: int,
        transactional: bool,
        note: Callable[[str], None],
    ) -> None:
        self._kafka = kafka
        self._note = note
        self.inputs = inputs
        self._group = group
        self._seed = seed
        self._transactional = transactional
        self._numbers = itertools.count()
        self._ends: dict[Input, int] = {}
        self._threads = ThreadPoolExecutor(8, "publisher")  # those that wait for a broker hold up nobody else
        self._stopping = asyncio.Event()
        self.committed: dict[Input, int] = {}

    @property
    def left(self) -> dict[Input, int]:
        return {source: self._ends.get(source, 0) - self.committed.get(source, 0) for source in self.inputs}

    async def run(self) -> None:
        """Until it is told to stop: then what it is publishing is published to its end."""
        feeding = 0
        try:
            async with asyncio.TaskGroup() as group:
                while not self._stopping.is_set():
                    for source in self.inputs[feeding:]:  # one may have no leader while the others go on
                        group.create_task(self._feed(source))
                    feeding = len(self.inputs)
                    with suppress(KafkaError, OSError):  # the coordinator is away
                        await self.look()
                    await self._pause()
        finally:
            self._threads.shutdown(wait=False)

    def stop(self) -> None:
        self._stopping.set()

    async def look(self) -> None:
        found = {}
        for topic in {topic for topic, _ in self.inputs}:
            for partition, offset in (await self._kafka.committed(self._group, topic)).items():
                found[topic, partition] = offset
        self.committed = found

    async def enough(self, most: int) -> bool:
        """Whether each input has more than ``most`` left."""
        await self.look()
        return min(self.left.values()) > most

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), LOOK_S)

    async def _feed(self, source: Input) -> None:
        publish = self._in_transactions(source) if self._transactional else self._plainly(source)
        while not self._stopping.is_set():
            missing = AHEAD - self.left[source]
            if missing > AHEAD // 2:
                records = [self._record(n, source) for n in itertools.islice(self._numbers, missing)]
                try:
                    self._ends[source] = await publish(records)
                except (KafkaError, KafkaException, OSError) as error:
                    self._note(f"publishing to {source} failed: {error!r}")
            await self._pause()

    def _record(self, number: int, source: Input) -> Sent:
        return Sent(*record(self._seed, number), source[1])

    def _plainly(self, source: Input) -> Publish:
        async def publish(records: list[Sent]) -> int:
            # Not idempotent, so that it gives up; what is there twice is input like any other.
            produced = await self._kafka.produce(
                source[0],
                records,
                enable_idempotence=False,
                acks="all",
                linger_ms=5,
                request_timeout_ms=CLIENT_TIMEOUT_MS,
            )
            return 1 + max(offset for _, offset in produced)

        return publish

    def _in_transactions(self, source: Input) -> Publish:
        chance = random.Random(f"{self._seed} {source[1]}")
        publisher: Transactional | None = None
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._threads)

        async def publish(records: list[Sent]) -> int:
            nonlocal publisher
            try:
                if publisher is None:
                    publisher = await in_thread(Transactional, self._kafka.bootstrap, source)
                if chance.random() < ABORTS:
                    await in_thread(publisher.publish, records[:ABORTED], False)
                return await in_thread(publisher.publish, records, True)
            except KafkaException:
                publisher = None  # a new one has the brokers abort what this one left open
                raise

        return publish
