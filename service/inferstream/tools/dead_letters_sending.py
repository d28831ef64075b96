"""The sending part of ``dead-letters replay``: records to given partitions, each acknowledged or refused.

Per partition in the order given, one batch on the way at a time.  After a refused batch every later one of its
partition would be refused as out of sequence, so the producer is replaced, and what is left goes one by one:
what is refused alone is refused for good, the rest arrives.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaProducer
from aiokafka.codec import has_zstd
from aiokafka.errors import ClusterAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError

from inferstream.documents import Headers
from inferstream.errors import Incomplete, KafkaRefused
from inferstream.kafka.connection import client_options, start_with_retry, stop_client
from inferstream.tools.dead_letters import Letter

if TYPE_CHECKING:
    from inferstream.kafka.connection import TopicFacts
    from inferstream.settings.tree import Kafka

BATCH_BYTES = 256 * 1024
BATCH_OVERHEAD = 256  # the batch's own header and what compression may add to what does not compress
STOP_TIMEOUT_S = 5.0
NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Replay:
    """A letter and what it is sent as; ``size`` is an upper bound of its bytes in a batch."""

    letter: Letter
    topic: str
    partition: int
    headers: Headers
    size: int


class Sender:
    """Sends replays.  ``facts`` are those of the topics, and may grow."""

    def __init__(self, kafka: Kafka, facts: Mapping[str, TopicFacts]) -> None:
        self._kafka = kafka
        self._facts = facts
        self._producer: AIOKafkaProducer | None = None

    async def stop(self) -> None:
        """What is unacknowledged then is given up; never raises."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await stop_client(producer.stop(), STOP_TIMEOUT_S)

    async def send(
        self,
        replays: Sequence[Replay],
        acknowledged: Callable[[Replay], None],
        refused: Callable[[Replay, str], None],
    ) -> None:
        """Send all, and return when each was acknowledged or refused.

        Raises KafkaRefused for a missing right, Incomplete if the brokers acknowledge nothing for
        ``kafka.connect_timeout_s``; what was acknowledged until then was told.
        """
        stall_s = self._kafka.connect_timeout_s
        queues: defaultdict[tuple[str, int], deque[Replay]] = defaultdict(deque)
        for replay in replays:
            queues[replay.topic, replay.partition].append(replay)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(stall_s) as stall:

                def moved(done: Replay) -> None:
                    acknowledged(done)
                    stall.reschedule(loop.time() + stall_s)

                await self._start()
                stall.reschedule(loop.time() + stall_s)
                ends = await asyncio.gather(
                    *(self._in_order(queue, moved) for queue in queues.values()), return_exceptions=True
                )
                for end in ends:
                    if isinstance(end, BaseException):
                        raise end
                if any(ends):
                    await self._one_by_one(queues, moved, refused)
        except TimeoutError:
            raise Incomplete(
                f"the brokers acknowledged nothing for {stall_s:g} s (kafka.connect_timeout_s): given up; what "
                "was on the way may or may not have arrived, and will be replayed again"
            ) from None

    async def _in_order(self, queue: deque[Replay], acknowledged: Callable[[Replay], None]) -> bool:
        """Send until the queue is empty or the brokers refuse a batch; whether they did."""
        while queue:
            limit = self._limit(queue[0].topic)
            size = 0
            batch: list[Replay] = []
            for replay in queue:
                size += replay.size
                if batch and size > limit:
                    break
                batch.append(replay)
            try:
                await self._send(batch)
            except KafkaError as error:
                _raise_for_right(error, batch[0].topic)
                return True
            for _ in batch:
                acknowledged(queue.popleft())
        return False

    async def _one_by_one(
        self,
        queues: Mapping[tuple[str, int], deque[Replay]],
        acknowledged: Callable[[Replay], None],
        refused: Callable[[Replay, str], None],
    ) -> None:
        await self._restart()
        for queue in queues.values():
            while queue:
                try:
                    await self._send([queue[0]])
                except KafkaError as error:
                    _raise_for_right(error, queue[0].topic)
                    refused(queue.popleft(), " ".join(str(error).split()) or type(error).__name__)
                    await self._restart()
                else:
                    acknowledged(queue.popleft())

    async def _send(self, replays: Sequence[Replay]) -> None:
        producer = self._producer
        assert producer is not None
        batch = producer.create_batch()
        now = int(time.time() * 1000)
        for replay in replays:
            record = replay.letter.record
            # The batch takes what send() does not: a record with neither key nor value.
            taken: Any = batch.append(
                timestamp=now, key=record.key, value=record.value, headers=list(replay.headers)
            )
            assert taken is not None  # the producer's own limit is far above ours
        batch.close()
        future = await producer.send_batch(batch, replays[0].topic, partition=replays[0].partition)
        await future

    def _limit(self, topic: str) -> int:
        known = self._facts.get(topic)
        limit = known.max_message_bytes if known is not None else None
        return min(BATCH_BYTES, (limit or BATCH_BYTES) - BATCH_OVERHEAD)

    async def _start(self) -> None:
        if self._producer is None:
            self._producer = AIOKafkaProducer(
                **client_options(self._kafka),
                enable_idempotence=True,
                acks="all",
                compression_type="zstd" if has_zstd() else None,
                max_batch_size=NO_LIMIT,
                max_request_size=NO_LIMIT,  # the brokers say what is too large
            )
            await start_with_retry(self._kafka, self._producer.start, self._kafka.connect_timeout_s)

    async def _restart(self) -> None:
        await self.stop()
        await self._start()


def _raise_for_right(error: KafkaError, topic: str) -> None:
    if isinstance(error, TopicAuthorizationFailedError):
        raise KafkaRefused(f"topic {topic}: no right to write to it (ACL: Write)") from error
    if isinstance(error, ClusterAuthorizationFailedError):
        raise KafkaRefused(
            "no right to produce idempotently (ACL: IdempotentWrite on the cluster)"
        ) from error
