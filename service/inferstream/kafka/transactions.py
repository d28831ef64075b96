"""Exactly once: results, dead letters and offsets of a tick in one Kafka transaction.

To the pipeline this is a sink, to the source what commits its offsets.  Slots are acknowledged, and give their
credit back, when their transaction is known to be committed; see ``ticks.py`` for what is in which transaction.

A tick ends a transaction: nothing more goes in; its offsets are sent while the last batches are on their way
(TxnOffsetCommit, with the identity of the epoch); when the brokers have all of it, EndTxn.  What is released
meanwhile goes into the next.

A transaction has three ends.  *Committed*: EndTxn was answered.  *Aborted*: anything failed before EndTxn was sent.
*Unknown*: EndTxn was sent and the answer is not a good one.  After the last two the producer is thrown away.  The new
one's InitProducerId has the broker abort what is open, or finish what it had begun to commit; after an unknown end the
group's stable offset on one of its partitions then says which it was.  What was aborted is sent again, in order,
in the next transaction; nothing is sent again before that is known.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InvalidTxnState,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.structs import OffsetAndMetadata

from inferstream.documents import Outgoing
from inferstream.errors import KafkaRefused
from inferstream.kafka.commit import CommitFailed, CommitRefused, EpochEnded
from inferstream.kafka.connection import stop_client
from inferstream.kafka.epochs import Epoch, current_identity
from inferstream.kafka.offsets import committed_offsets
from inferstream.kafka.sink import (
    ERROR_BACKOFF_S,
    STOP_TIMEOUT_S,
    OutputTopic,
    Sender,
    Sink,
    take_back,
)
from inferstream.kafka.ticks import Ticks
from inferstream.kafka.txn_protocol import Fenced, MemberGone, TransactionalProducer
from inferstream.lanes import DROPPED, Lane, Slot
from inferstream.settings import Settings
from inferstream.telemetry.timeline import Timeline

log = logging.getLogger(__name__)

ENDING_SHARE = 1 / 2  # of the transaction's timeout, for ending it; it is open for a third before
FENCED_TWICE_WITHIN_S = 60.0  # once may be a request of our own that a broken connection has delayed
REFUSED_FOR_S = 60.0
_REFUSED = (
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
# After these the next attempt is another one, and need not wait.
_AT_ONCE = (MessageSizeTooLargeError, RecordListTooLargeError, EpochEnded, MemberGone)
# What a producer hears whose successor is there: at the coordinator, and where its transaction is gone already.
_FENCED = (Fenced, ProducerFenced, InvalidTxnState)


class TransactionListener(Protocol):
    """Who hears what became of a record, on the event loop."""

    def acknowledged(self, slots: list[Slot], *, committed: bool = False) -> None: ...

    def refused(self, slot: Slot, error: KafkaError) -> Outgoing: ...

    def handed_over(self, lane: Lane) -> None:
        """What the lane has released is in the open transaction."""
        ...


class Transactions(Sink):
    """The sink that publishes in transactions, and settles with them.

    Its producers are TransactionalProducers, all with the same transactional id.
    """

    producer: TransactionalProducer

    def __init__(
        self,
        settings: Settings,
        make_producer: Callable[[], TransactionalProducer],
        output: OutputTopic,
        dead_letters: OutputTopic,
        input_partitions: Mapping[str, int],
        listener: TransactionListener,
        failed: Callable[[BaseException], None],
        timeline: Timeline,
        consumer: AIOKafkaConsumer,
    ) -> None:
        super().__init__(make_producer, output, dead_letters, input_partitions, listener, failed, timeline)
        self._listener = listener
        self._consumer = consumer
        self._group_id = settings.kafka.group_id
        self._instance = settings.kafka.group_instance_id
        self._transactional_id = settings.kafka.transactional_id
        self._timeout_s = settings.delivery.transaction_timeout_ms / 1000
        self._ticks = Ticks()
        self._settling = asyncio.Lock()
        self._published: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ending: dict[Lane, int] | None = None  # what EndTxn was sent for, until its end is known
        self._covered: dict[Lane, int] = {}  # committed, and not yet told to who settles
        self._fenced_at: float | None = None
        self._refused_since: float | None = None
        self._stopping = False

    # ---- the sink

    async def start(self) -> None:
        await self.producer.start()
        self._open()
        self.producing.set()

    async def stop(self, timeout_s: float) -> None:
        """End the open transaction, if there is one, and stop."""
        self._stopping = True
        self.abandon()
        if self._replacing is not None and not self._replacing.done():
            await asyncio.wait({self._replacing}, timeout=timeout_s)
        for task in [sender.task for sender in self._senders.values()] + [self._replacing]:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await _discard(self.producer, timeout_s)

    def send(self, lane: Lane, slots: Collection[Slot]) -> None:
        """Take a lane's released run, into the open transaction or the next."""
        if self._ticks.add(run := list(slots)):
            super().send(lane, run)
            self._listener.handed_over(lane)

    def withdraw(self) -> None:
        # What is in the transaction stays: it is committed as a whole, or not at all.
        take_back(self._ticks.withdraw())

    def withdraw_from(self, sender: Sender) -> None:
        sender.forget_dropped()  # the failed transaction is given up: what is in it comes back with its end

    @property
    def queued(self) -> int:
        return len(self._ticks)

    def acknowledged(self, slots: list[Slot]) -> None:
        self._ticks.acknowledged(len(slots))
        if self._ticks.closed and self._ticks.published and not self._published.done():
            self._published.set_result(None)

    def reroute(self, slot: Slot, error: KafkaError) -> bool:
        if slot.state != DROPPED:  # it is sent in the next transaction, as the dead letter that it is now
            slot.outcome = self._listener.refused(slot, error)
        return True

    def publishing_failed(self, producer: Any, error: KafkaError, handed_over: bool) -> None:
        if producer is self.producer:
            self._give_up(error)

    # ---- settling, for the source

    async def settle(
        self, epoch: Epoch, committed: Mapping[Lane, int], metadata: Mapping[str, str], timeout_s: float
    ) -> dict[Lane, tuple[int, int]]:
        """End the transaction with the offsets of what it holds; see :class:`inferstream.kafka.commit.Settler`."""
        started = time.monotonic()
        # Only a closing has to be quick: what a tick gives up is sent again, and with slow brokers in vain again.
        limit_s = self._timeout_s * ENDING_SHARE
        if epoch.closing:
            limit_s = min(limit_s, timeout_s)
        try:
            async with asyncio.timeout(limit_s), self._settling:
                await self.producing.wait()
                if await self._end(epoch, committed, metadata):
                    self.timeline.span("commit", "commit", started, time.monotonic())
        except TimeoutError:
            raise CommitFailed(f"not confirmed within {limit_s:.1f} s") from None
        except MemberGone as error:
            raise EpochEnded(str(error)) from error
        except _REFUSED as error:
            raise CommitRefused(type(error).__name__) from error
        except KafkaError as error:
            raise CommitFailed(f"{type(error).__name__}: {error}") from error
        covered, self._covered = self._covered, {}
        return {lane: (offset, lane.settled) for lane, offset in covered.items()}

    async def offsets(
        self, assigned: Collection[TopicPartition], others: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """The group's offsets; those of ``assigned`` once no transaction is pending that could change them."""
        found = await committed_offsets(self._consumer, self._group_id, others) if others else {}
        await self.producing.wait()
        return found | await self.producer.stable_offsets(self._group_id, assigned)

    def abandon(self) -> None:
        """See that nothing of an ended epoch becomes visible any more."""
        if self.producing.is_set() and (self._ticks.inside or self.producer.since is not None):
            self._give_up(EpochEnded("its epoch has ended"))

    async def _end(self, epoch: Epoch, committed: Mapping[Lane, int], metadata: Mapping[str, str]) -> bool:
        """Commit what is in the transaction and open the next; False if there was nothing to commit."""
        self._check(epoch)
        marks = self._ticks.marks()
        offsets = {
            lane: offset
            for lane in epoch.lanes.values()
            if lane in committed
            and (offset := max(lane.watermark, marks.get(lane, 0))) > self._covered.get(lane, committed[lane])
        }
        if not offsets and not marks:
            return False
        producer = self.producer
        self._published = asyncio.get_running_loop().create_future()
        self._ticks.close()
        if self._ticks.published:
            self._published.set_result(None)
        try:
            if not marks.keys() <= offsets.keys():
                raise EpochEnded("the transaction holds results of a partition that was begun anew")
            to_commit = {
                TopicPartition(lane.topic, lane.partition): (offset, metadata.get(lane.topic, ""))
                for lane, offset in offsets.items()
            }
            sending = asyncio.create_task(self._send_offsets(producer, epoch, to_commit), name="send-offsets")
            try:
                await asyncio.gather(self._published, sending)
            finally:
                sending.cancel()
            self._require_current(producer)
            self._ending = offsets
            await producer.commit()
            self._require_current(producer)
        except BaseException as error:  # a timeout or a cancellation leaves it as open as an error does
            if (
                isinstance(error, MemberGone)
                and error.rejoin
                and epoch.identity == current_identity(self._consumer)
            ):
                # the heartbeat will hear the same; waiting for it would only cost time
                self._consumer._coordinator.reset_generation()
            if producer is self.producer:
                self._give_up(error)
            raise
        self._know_committed()
        producer.begin()
        self._open()
        return True

    async def _send_offsets(
        self, producer: TransactionalProducer, epoch: Epoch, offsets: Mapping[TopicPartition, tuple[int, str]]
    ) -> None:
        await producer.add_group(self._group_id)
        await producer.commit_offsets(
            self._group_id, epoch.identity, self._instance, offsets, lambda: self._check(epoch)
        )

    def _check(self, epoch: Epoch) -> None:
        """Raise EpochEnded unless we still are who we were when the epoch was assigned."""
        identity = epoch.identity
        if not identity.valid or identity != current_identity(self._consumer):
            raise EpochEnded(f"the group has moved on from generation {identity.generation}")

    def _require_current(self, producer: TransactionalProducer) -> None:
        """Raise CommitFailed if the transaction was given up meanwhile: how it ends is found out elsewhere."""
        if producer is not self.producer or not self.producing.is_set():
            raise CommitFailed("the transaction was given up meanwhile")

    def _know_committed(self) -> None:
        assert self._ending is not None
        self._covered |= self._ending
        self._ending = None
        self._listener.acknowledged(self._ticks.committed(), committed=True)

    def _open(self) -> None:
        """Begin the next transaction with what waits, but for what goes back to suspended lanes."""
        self.withdraw()
        for lane, run in groupby(self._ticks.open(), key=attrgetter("lane")):
            super().send(lane, list(run))
            self._listener.handed_over(lane)

    # ---- when something fails

    def _give_up(self, why: BaseException) -> None:
        """Throw the producer away; the open transaction is aborted, or its unknown end found out."""
        if not self.producing.is_set():
            return
        self.producing.clear()
        self._ticks.close()
        state = "its end is unknown" if self._ending is not None else "it is aborted"
        log.warning(
            f"a transaction was given up; {state}", extra={"error": repr(why), "records": self._ticks.inside}
        )
        if not self._published.done():
            self._published.set_exception(CommitFailed("the transaction was given up"))
            self._published.exception()  # nobody has to wait for it
        if self._note_refusal(why):
            return  # a new producer would put out the worker that is to stay
        backoff_s = 0.0 if isinstance(why, _AT_ONCE) else ERROR_BACKOFF_S
        self._replacing = asyncio.create_task(self._renew(self.producer, backoff_s), name="replace-producer")
        self._replacing.add_done_callback(self.task_ended)

    async def _renew(self, old: TransactionalProducer, backoff_s: float) -> None:
        for sender in self._senders.values():
            await sender.restart()
        await _discard(old, STOP_TIMEOUT_S)
        await asyncio.sleep(backoff_s)
        while True:
            self.producer = self._make_producer()
            try:
                await self.producer.start()
                committed = self._ending is not None and await self._was_committed(self._ending)
                break
            except KafkaError as error:
                log.warning("no new producer yet; trying again", extra={"error": repr(error)})
                if self._note_refusal(error):
                    return
                await _discard(self.producer, STOP_TIMEOUT_S)
                await asyncio.sleep(ERROR_BACKOFF_S)
        if committed:
            self._know_committed()
        else:
            self._ending = None
            self._ticks.aborted()
        self._refused_since = None
        if not self._stopping:
            self._open()
            self.producing.set()

    async def _was_committed(self, offsets: Mapping[Lane, int]) -> bool:
        """Whether the group's offsets are those of the transaction, or past them.

        All of them: a partition that was given away since may have been moved on by its new owner, one that comes
        back to us can only have been moved by the transaction.  Those that nothing is kept of do not matter.
        """
        alive = self._ticks.alive()
        sent = {
            TopicPartition(lane.topic, lane.partition): offset
            for lane, offset in offsets.items()
            if lane in alive
        }
        found = await self.producer.stable_offsets(self._group_id, sent) if sent else {}
        committed = bool(sent) and all(
            tp in found and found[tp].offset >= offset for tp, offset in sent.items()
        )
        log.info(f"the unknown transaction was {'committed' if committed else 'aborted'}")
        return committed

    def _note_refusal(self, error: BaseException) -> bool:
        """Whether this ends the process: another worker has our transactional id, or a right is missing for long."""
        now = time.monotonic()
        named = f"kafka.transactional_id={self._transactional_id!r}"
        if isinstance(error, _FENCED):
            since = self.producer.since
            if since is not None and now - since >= self._timeout_s:
                return False  # the broker has timed the transaction out: that looks the same
            first, self._fenced_at = self._fenced_at, now
            if first is not None and now - first < FENCED_TWICE_WITHIN_S:
                self._failed(
                    KafkaRefused(
                        f"another live worker has {named}: give each worker its own, or leave it unset"
                    )
                )
                return True
        elif isinstance(error, TransactionalIdAuthorizationFailed):
            if self._refused_since is None:
                self._refused_since = now
            elif now - self._refused_since > REFUSED_FOR_S:
                self._failed(
                    KafkaRefused(
                        f"{named} has been refused for {REFUSED_FOR_S:.0f} s: grant WRITE and DESCRIBE on it"
                    )
                )
                return True
        return False


async def _discard(producer: TransactionalProducer, timeout_s: float) -> None:
    if (problem := await stop_client(producer.discard(), timeout_s)) is not None:
        log.warning("a producer did not stop in order", extra={"error": problem})


async def end_predecessor(make_producer: Callable[[], TransactionalProducer]) -> None:
    """Have the broker end what the last worker with this transactional id left open.

    Raises what starting a producer raises.
    """
    producer = make_producer()
    try:
        await producer.start()
    finally:
        await _discard(producer, STOP_TIMEOUT_S)
