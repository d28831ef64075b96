"""The sink: one sender per output partition, batches below the topic's limit, errors by rule.

Each sender keeps one batch on the way and collects the next behind it, so what it is given comes out in that
order.  The producer is idempotent; after an error that it does not retry itself its sequence numbers have a
hole and the broker would refuse every later batch of that partition, so the producer is thrown away: release
stops, the healthy batches are awaited, a new producer is made, and what is not acknowledged is sent again in
order.

A refused batch of several records is halved until the refused record is alone.  Each of its records remembers, until
its fate is settled, how large a batch with it may be: under exactly-once all is sent again from the start after each
refusal, and what has found its size must not be made into the refused batch again.  A batch with a refused record
is at most half of the last one with it, so the record is alone after at most 19 refusals.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, Protocol

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownError,
    UnknownTopicOrPartitionError,
)
from aiokafka.partitioner import murmur2

from inferstream.documents import Kind, Outgoing
from inferstream.errors import KafkaRefused
from inferstream.kafka.connection import stop_client
from inferstream.lanes import DROPPED, RELEASED, Lane, Slot
from inferstream.telemetry.timeline import Timeline

log = logging.getLogger(__name__)

BATCH_BYTES = 512 * 1024  # what one request to one partition carries at most
BATCH_OVERHEAD = 256  # batch header and what compression may add to a batch that does not compress
REFUSED_FOR_S = 60.0
ERROR_BACKOFF_S = 0.5
STOP_TIMEOUT_S = 5.0

# INVALID_RECORD (87, say no key on a compacted topic) is a code that aiokafka 0.14 reports as UnknownError
_REFUSES_THE_RECORD = (MessageSizeTooLargeError, RecordListTooLargeError, UnknownError)
UNKNOWN_ERROR_STRIKES = 3  # UnknownError may also be a passing server error: refused only when it repeats


@dataclass(frozen=True, slots=True)
class OutputTopic:
    """Where one kind of record goes: name, partition count and the broker's limit for one batch in bytes."""

    name: str
    partitions: int
    max_message_bytes: int


def take_back(slots: Iterable[Slot]) -> None:
    """Return released slots that nobody was handed to their lanes, which are suspended."""
    for lane, own in groupby(sorted(slots, key=lambda slot: id(slot.lane)), key=attrgetter("lane")):
        lane.take_back(own)


class Acknowledgements(Protocol):
    """Who hears what became of a record, on the event loop."""

    def acknowledged(self, slots: list[Slot]) -> None: ...

    def refused(self, slot: Slot, error: KafkaError) -> Outgoing:
        """An outcome that the broker will never take: what to send instead.  Raises to end the process."""
        ...


class Sender:
    """Publishes to one partition, in the order it is given."""

    def __init__(self, sink: Sink, topic: OutputTopic, partition: int) -> None:
        self._sink = sink
        self._topic = topic
        self._partition = partition
        self.queue: deque[Slot] = deque()
        self.sending = 0  # how many at the head of the queue are with the producer
        # Of the records of refused batches: how large a batch of this one and others may be.
        self._limits: dict[Slot, int] = {}
        self._suspect: Slot | None = None  # the record that was refused alone
        self._strikes = 0  # how often
        self._refused_since: float | None = None  # since when a right or the topic is missing
        self._wake = asyncio.Event()
        self._track = f"send-{topic.name}-{partition}"
        self.task = self._start()

    def _start(self) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(), name=self._track)
        task.add_done_callback(self._sink.task_ended)
        return task

    async def restart(self) -> None:
        """Stop waiting for the producer, forget what is queued, and begin anew."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.queue.clear()
        self.task = self._start()

    def put(self, slots: Sequence[Slot]) -> None:
        self.queue.extend(slots)
        if not self._wake.is_set():
            self._wake.set()

    def forget_dropped(self) -> None:
        """Take out what was not handed to the producer and was dropped."""
        self._keep(lambda slot: slot.state != DROPPED)

    def withdraw(self) -> None:
        """Take out what was not handed to the producer and was dropped, or goes back to a suspended lane."""
        back = [slot for n, slot in enumerate(self.queue) if n >= self.sending and slot.lane.suspended]
        self._keep(lambda slot: slot.state != DROPPED and not slot.lane.suspended)
        take_back(back)

    def _keep(self, wanted: Callable[[Slot], bool]) -> None:
        handed = self.sending
        self.queue = deque(slot for n, slot in enumerate(self.queue) if n < handed or wanted(slot))

    async def _run(self) -> None:
        while True:
            if not self.queue:
                self._wake.clear()
                await self._wake.wait()
            await self._sink.producing.wait()
            if self.queue:
                await self._send()

    async def _send(self) -> None:
        producer = self._sink.producer
        batch = producer.create_batch()
        limit = min(BATCH_BYTES, self._topic.max_message_bytes - BATCH_OVERHEAD)
        if self._limits:
            self._limits = {slot: most for slot, most in self._limits.items() if slot.state == RELEASED}
        limits = self._limits
        now = int(time.time() * 1000)  # a record's timestamp is its production time
        size = count = 0
        for slot in self.queue:
            outgoing = slot.outcome
            assert outgoing is not None  # it was released and is not acknowledged
            grown = size + outgoing.size
            if slot in limits:
                limit = min(limit, limits[slot])
            if count and grown > limit:
                break
            taken = batch.append(
                timestamp=now, key=outgoing.key, value=outgoing.value, headers=list(outgoing.headers)
            )
            if taken is None:
                break
            size, count = grown, count + 1
        batch.close()
        self.sending = count
        started = time.monotonic()
        handed_over = failed = later = False
        self._sink.left()
        try:
            future = await producer.send_batch(batch, self._topic.name, partition=self._partition)
            handed_over = True
            await future
        except KafkaError as error:
            failed = True
            self._sink.publishing_failed(producer, error, handed_over)
            later = self._failed(error, count, size)
        else:
            self._sink.timeline.span(self._track, "publish", started, time.monotonic(), records=count)
            sent = [self.queue.popleft() for _ in range(count)]
            self._refused_since = None
            if sent[0] is self._suspect:
                self._suspect = None
            self._sink.acknowledged(sent)
        finally:
            self.sending = 0
            self._sink.came_back()
        if failed:
            self._sink.withdraw_from(self)  # what failed for an ended epoch is not sent again
        if later:
            await asyncio.sleep(ERROR_BACKOFF_S)

    def _failed(self, error: KafkaError, count: int, size: int) -> bool:
        """Decide what is sent next; True if it is the same again, which deserves some time."""
        where = f"{self._topic.name}:{self._partition}"
        if not isinstance(error, _REFUSES_THE_RECORD):
            log.warning(
                "publishing failed; sending again",
                extra={"to": where, "error": repr(error), "records": count},
            )
            self._count_refusal(error, where)
            return True
        if count > 1:
            log.warning("a batch was refused; splitting it", extra={"to": where, "records": count})
            self._limits |= dict.fromkeys(islice(self.queue, count), size // 2)
            return False
        if self.queue[0] is not self._suspect:
            self._suspect = self.queue[0]
            self._strikes = 0
        self._strikes += 1
        self._limits[self._suspect] = 0
        if self._strikes < (UNKNOWN_ERROR_STRIKES if isinstance(error, UnknownError) else 1):
            return True
        del self._limits[self._suspect]
        self._suspect = None
        if self._sink.reroute(self.queue[0], error):
            self.queue.popleft()
        return False

    def _count_refusal(self, error: KafkaError, where: str) -> None:
        """End the process when a missing right or topic has lasted for too long."""
        if not isinstance(error, TopicAuthorizationFailedError | UnknownTopicOrPartitionError):
            return
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        elif now - self._refused_since > REFUSED_FOR_S:
            raise KafkaRefused(
                f"publishing to {where} has been refused for {REFUSED_FOR_S:.0f} s: {type(error).__name__}; "
                f"grant WRITE on topic {self._topic.name}, or create it"
            )


class Sink:
    """Publishes results and dead letters and tells who waits for them."""

    def __init__(
        self,
        make_producer: Callable[[], AIOKafkaProducer],
        output: OutputTopic,
        dead_letters: OutputTopic,
        input_partitions: Mapping[str, int],
        acknowledgements: Acknowledgements,
        failed: Callable[[BaseException], None],
        timeline: Timeline,
    ) -> None:
        self._make_producer = make_producer
        self._output = output
        self._dead_letters = dead_letters
        self._input_partitions = input_partitions
        self._acknowledgements = acknowledgements
        self._failed = failed
        self.timeline = timeline
        self._senders: dict[tuple[str, int], Sender] = {}
        self._replacing: asyncio.Task[None] | None = None
        self.producer: AIOKafkaProducer = make_producer()
        self.producing = asyncio.Event()
        self._in_flight = 0
        self._quiet = asyncio.Event()  # nothing is with the producer
        self._quiet.set()

    async def start(self) -> None:
        """Connect; raises aiokafka's KafkaError, which the caller retries."""
        await self.producer.start()
        self.producing.set()

    async def stop(self, timeout_s: float) -> None:
        """Stop the senders and the producer; what is not acknowledged is not committed and comes again."""
        tasks: list[asyncio.Task[Any]] = [sender.task for sender in self._senders.values()]
        if self._replacing is not None:
            tasks.append(self._replacing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _stop_producer(self.producer, timeout_s)

    def send(self, lane: Lane, slots: Sequence[Slot]) -> None:
        """Queue a lane's released run, each record behind what its partition was given before."""
        # Usually all results of a lane go to the partition of its number.
        own = self._sender(self._output, lane.partition) if self._aligned(lane, self._output) else None
        run: list[Slot] = []
        for slot in slots:
            outgoing = slot.outcome
            assert outgoing is not None  # it was released
            if own is not None and outgoing.kind is not Kind.DEAD_LETTER:
                run.append(slot)
            else:
                self._queue(slot, outgoing)
        if own is not None and run:
            own.put(run)

    def _queue(self, slot: Slot, outgoing: Outgoing) -> None:
        topic = self._dead_letters if outgoing.kind is Kind.DEAD_LETTER else self._output
        self._sender(topic, self._partition(slot.lane, outgoing, topic)).put((slot,))

    def _sender(self, topic: OutputTopic, partition: int) -> Sender:
        sender = self._senders.get((topic.name, partition))
        if sender is None:
            sender = self._senders[topic.name, partition] = Sender(self, topic, partition)
        return sender

    def withdraw(self) -> None:
        """Let go of what is not with the producer and was dropped, or goes back to a suspended lane."""
        for sender in self._senders.values():
            sender.withdraw()

    def withdraw_from(self, sender: Sender) -> None:
        """The same after a batch of the sender's has failed."""
        sender.withdraw()

    @property
    def queued(self) -> int:
        return sum(len(sender.queue) for sender in self._senders.values())

    def left(self) -> None:
        """A batch goes to the producer."""
        self._in_flight += 1
        self._quiet.clear()

    def came_back(self) -> None:
        """A batch was answered."""
        self._in_flight -= 1
        if not self._in_flight:
            self._quiet.set()

    def acknowledged(self, slots: list[Slot]) -> None:
        self._acknowledgements.acknowledged(slots)

    def reroute(self, slot: Slot, error: KafkaError) -> bool:
        """Give a refused record another outcome; False if that keeps its place: a dead letter without its value."""
        if slot.state == DROPPED:
            return True
        before, slot.outcome = slot.outcome, self._acknowledgements.refused(slot, error)
        if before is not None and before.kind is Kind.DEAD_LETTER:
            return False
        if slot.lane.suspended:
            take_back([slot])
        else:
            self._queue(slot, slot.outcome)
        return True

    def publishing_failed(self, producer: AIOKafkaProducer, error: KafkaError, handed_over: bool) -> None:
        """A batch failed; if the producer had it already, the producer is thrown away, once, for a new one.

        The batch's sequence numbers are used up: the next one of its partition would be refused.
        """
        if handed_over and producer is self.producer and self.producing.is_set():
            self.producing.clear()
            self._replacing = asyncio.create_task(self._replace(producer), name="replace-producer")
            self._replacing.add_done_callback(self.task_ended)

    async def _replace(self, old: AIOKafkaProducer) -> None:
        # The senders whose batches are healthy get their answers from the old producer; the others come
        # back with errors and wait at `producing`.
        await self._quiet.wait()
        await _stop_producer(old, STOP_TIMEOUT_S)
        while True:
            fresh = self._make_producer()
            try:
                await fresh.start()
                break
            except KafkaError as error:
                log.warning("no new producer yet; trying again", extra={"error": repr(error)})
                await _stop_producer(fresh, STOP_TIMEOUT_S)
                await asyncio.sleep(ERROR_BACKOFF_S)
        self.producer = fresh
        self.producing.set()

    def task_ended(self, task: asyncio.Task[None]) -> None:
        """What ends a task of ours ends the process."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def _aligned(self, lane: Lane, topic: OutputTopic) -> bool:
        """Whether a lane's records go to the partition of its number; not those of one born after the start."""
        return (
            self._input_partitions.get(lane.topic) == topic.partitions and lane.partition < topic.partitions
        )

    def _partition(self, lane: Lane, outgoing: Outgoing, topic: OutputTopic) -> int:
        if self._aligned(lane, topic):
            return lane.partition
        if outgoing.key is not None:
            return int((murmur2(outgoing.key) & 0x7FFFFFFF) % topic.partitions)
        return lane.partition % topic.partitions


async def _stop_producer(producer: AIOKafkaProducer, timeout_s: float) -> None:
    """An idempotent producer's stop() waits for its batches, for ever when the brokers are away."""
    if (problem := await stop_client(producer.stop(), timeout_s)) is not None:
        log.warning("a producer did not stop in order", extra={"error": problem})
