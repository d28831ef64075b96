"""Reading the dead-letter topic: partition by partition, to the end it had when the reading began.

So letters that come meanwhile, such as those of documents that were just replayed and failed again, are left to
the next call.  No group is joined.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaConsumer, TopicPartition

from inferstream.errors import Incomplete, KafkaRefused
from inferstream.kafka.connection import TopicFacts, client_options, start_with_retry, topic_facts
from inferstream.kafka.polling import poll
from inferstream.tools.dead_letters import SKEW_MS, Filter, Letter, Place, letter_of

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka

MAX_RECORDS = 500
MAX_BYTES = 16 << 20
POLL_MS = 200
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of one partition, from ``start`` to before ``stop``; the partition goes from ``first`` to ``end``."""

    partition: int
    first: int
    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Page:
    """All letters of a partition from offset ``start`` to before ``stop``."""

    partition: int
    start: int
    stop: int
    letters: Sequence[Letter]


class Reader:
    """Reads one topic; see :func:`reading`."""

    def __init__(self, kafka: Kafka, topic: str, consumer: AIOKafkaConsumer, facts: TopicFacts) -> None:
        self._kafka = kafka
        self._topic = topic
        self._consumer = consumer
        self.partitions = facts.partitions
        # The embedded broker, which does not describe its topics, finds no offset for any time.
        self._by_time = facts.max_message_bytes is not None

    async def stretches(
        self, chosen: Filter | None = None, starts: Mapping[int, int] | None = None
    ) -> list[Stretch]:
        """What has to be read for the filter, by partition; ``starts`` are offsets not to read before.

        The times of a filter become offsets by the brokers' index, where they describe the topic.  The letters of a
        partition are not quite in the order of their times, as they come from the clocks of several workers: behind
        ``until_ms`` ten minutes more are read.
        """
        partitions = [TopicPartition(self._topic, n) for n in range(self.partitions)]
        consumer = self._consumer

        async def look() -> list[Stretch]:
            first = await consumer.beginning_offsets(partitions)
            # The last record that a reader of committed records sees, as far as it goes now.
            end = await consumer.end_offsets(partitions)
            begin, stop = dict(first), dict(end)
            for tp in partitions:
                begin[tp] = max(begin[tp], (starts or {}).get(tp.partition, 0))
            if self._by_time and chosen is not None and chosen.since_ms is not None:
                found = await consumer.offsets_for_times(dict.fromkeys(partitions, chosen.since_ms))
                for tp in partitions:
                    begin[tp] = max(begin[tp], found[tp].offset if found.get(tp) else end[tp])
            if self._by_time and chosen is not None and chosen.until_ms is not None:
                late = chosen.until_ms + SKEW_MS
                found = await consumer.offsets_for_times(dict.fromkeys(partitions, late))
                for tp in partitions:
                    if found.get(tp):
                        stop[tp] = min(stop[tp], found[tp].offset)
            return [
                Stretch(tp.partition, first[tp], begin[tp], max(begin[tp], stop[tp]), end[tp])
                for tp in partitions
            ]

        return await start_with_retry(self._kafka, look, self._kafka.connect_timeout_s)

    async def pages(
        self, stretch: Stretch, max_records: int = MAX_RECORDS, max_bytes: int = MAX_BYTES
    ) -> AsyncIterator[Page]:
        """The letters of a stretch in order; what retention deletes meanwhile is passed over.

        Raises Incomplete if the brokers give nothing for ``kafka.connect_timeout_s``.
        """
        tp = TopicPartition(self._topic, stretch.partition)
        if stretch.start >= stretch.stop:
            return
        consumer, stall_s = self._consumer, self._kafka.connect_timeout_s
        loop = asyncio.get_running_loop()
        consumer.assign([tp])
        consumer.seek(tp, stretch.start)
        position, moved = stretch.start, loop.time()
        while position < stretch.stop:
            found = await poll(consumer, [tp], POLL_MS, max_records, max_bytes)
            before, position = position, await consumer.position(tp)
            if position > before:
                moved = loop.time()
                letters = [letter_of(record) for record in found.get(tp, ()) if record.offset < stretch.stop]
                yield Page(stretch.partition, before, min(position, stretch.stop), letters)
                moved = loop.time()
            elif loop.time() - moved > stall_s:
                raise Incomplete(
                    f"the brokers gave no records of {tp.topic}:{tp.partition} from offset {position} on for "
                    f"{stall_s:g} s (kafka.connect_timeout_s)"
                )


@asynccontextmanager
async def reading(kafka: Kafka, topic: str) -> AsyncIterator[Reader]:
    """A reader of the topic; KafkaRefused if it does not exist or the brokers do not answer."""
    found = await facts(kafka, [topic])
    if topic not in found:
        raise KafkaRefused(f"topic {topic} does not exist on {','.join(kafka.bootstrap_servers)}")
    consumer = AIOKafkaConsumer(
        **client_options(kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_wait_ms=100,
    )
    try:
        await start_with_retry(kafka, consumer.start, kafka.connect_timeout_s)
        yield Reader(kafka, topic, consumer, found[topic])
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await consumer.stop()


async def facts(kafka: Kafka, topics: Sequence[str]) -> dict[str, TopicFacts]:
    """As ``topic_facts``, with the patience of a start."""
    return await start_with_retry(kafka, lambda: topic_facts(kafka, topics), kafka.connect_timeout_s)


async def find(kafka: Kafka, topic: str, place: Place) -> list[Letter]:
    """The letter at this place of the dead-letter topic, or every letter whose source is this place."""
    async with reading(kafka, topic) as reader:
        found: list[Letter] = []
        for stretch in await reader.stretches():
            if place.topic == topic:
                if place.partition != stretch.partition or place.offset is None:
                    continue
                at = max(stretch.start, place.offset)
                stretch = replace(stretch, start=at, stop=min(stretch.stop, place.offset + 1))
            async for page in reader.pages(stretch):
                for letter in page.letters:
                    if (letter.place if place.topic == topic else letter.source) == place:
                        found.append(letter)
        return found
