"""The source: polls what there is credit for, and keeps the epochs.

One task calls ``getmany`` and nothing else does; it is never cancelled while it runs, because a cancelled
``getmany`` leaves aiokafka's liveness check off for good.  Records are admitted in the same step of the event
loop in which ``getmany`` moved the position, so a position never runs ahead of what a lane has seen.

aiokafka 0.14 rebalances eagerly: every rebalance revokes and assigns all partitions, and ``getmany`` may give
records before ``on_partitions_assigned`` has returned.  Hence the epochs and their gate (see ``epochs.py``).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from inferstream.errors import InferstreamError, KafkaRefused
from inferstream.kafka.caution import Caution, judge
from inferstream.kafka.commit import CommitFailed, CommitRefused, Committer, EpochEnded, Settler
from inferstream.kafka.connection import client_options, stop_client
from inferstream.kafka.epochs import Epoch, Suspended, current_identity
from inferstream.kafka.intake import Intake, SourceListener
from inferstream.kafka.notes import Note
from inferstream.kafka.offsets import OffsetLost, Opening, open_positions
from inferstream.kafka.polling import poll
from inferstream.kafka.refusals import Refusals, refusal_line, refusal_of
from inferstream.lanes import Lane
from inferstream.settings import Settings
from inferstream.telemetry.timeline import Timeline

log = logging.getLogger(__name__)

NOTHING = TopicPartition("__none__", 0)  # polling it keeps the member alive and leaves prefetched data alone
MAX_RECORDS = 500  # decoding is synchronous, ~2.5 µs a record: bounds how long one poll holds the loop
POLL_TIMEOUT_MS = 200
PARTIAL_POLL_TIMEOUT_MS = 20  # while lanes sit out: theirs may be the records, and their credit may come back
KEEP_ALIVE_S = 1.0
ERROR_BACKOFF_S = 0.5
MAX_EVICTIONS = 3  # one may be an administrator's doing
COMMIT_RESERVE_S = 0.25  # the share of the revoke's time that is kept for its commit
NEVER_COMMITTED = -1
COMPLAIN_S = 60.0  # how often a partition that cannot be read is said to stand still
_NEVER_MS = 24 * 3600 * 1000


class Source(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """Reads the input topics for one pipeline."""

    def __init__(
        self, settings: Settings, intake: Intake, listener: SourceListener, timeline: Timeline
    ) -> None:
        kafka, entry = settings.kafka, settings.input
        self._settings = settings
        self._intake = intake
        self._listener = listener
        # Every argument whose default facts have proven dangerous is spelled out.
        self.consumer = AIOKafkaConsumer(
            **client_options(kafka),
            group_id=kafka.group_id,
            group_instance_id=kafka.group_instance_id,
            client_rack=kafka.client_rack,
            enable_auto_commit=False,  # only acknowledged work is committed
            auto_offset_reset="none",  # a reset would skip or repeat silently; see offsets.py
            isolation_level=entry.isolation,
            session_timeout_ms=kafka.session_timeout_ms,
            heartbeat_interval_ms=kafka.heartbeat_interval_ms,
            rebalance_timeout_ms=kafka.rebalance_timeout_ms,
            max_poll_interval_ms=_NEVER_MS,  # client side only; our own watchdog judges progress
            fetch_max_bytes=kafka.fetch_max_bytes,
            max_partition_fetch_bytes=kafka.max_partition_fetch_bytes,
            fetch_max_wait_ms=100,
            check_crcs=True,
            partition_assignment_strategy=(StickyPartitionAssignor,),
            key_deserializer=None,  # a deserialiser that raises is refetched for ever
            value_deserializer=None,
        )
        self._committer = Committer(self.consumer, kafka.group_id, timeline)
        self.settler: Settler = self._committer  # under exactly-once, the transactions
        self._epoch: Epoch | None = None
        self._closing_epoch: Epoch | None = None
        self._closing_until = 0.0
        self._suspended: Suspended | None = None
        self._epochs = 0
        self._metadata: dict[str, str] = {}  # what the commits of a topic note where there is progress
        self._notes: dict[TopicPartition, Note] = {}  # what the commits of an epoch's start noted
        self._committed: dict[Lane, int] = {}
        self._stopping = False
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()  # no epoch is being closed
        self._closed.set()
        self._hurried = False  # a rebalance cut a drain short
        self._refusals = Refusals(kafka, entry.topics)
        self._assigned_at = 0.0
        self._evictions = 0  # in a row, each sooner than a session can end
        self._complained_at = -math.inf  # of a batch that cannot be read
        self.rebalancing = False
        self.last_admitted = time.monotonic()

    async def start(self) -> None:
        """Join the group; raises aiokafka's KafkaError, which the caller retries."""
        await self.consumer.start()

    def subscribe(self) -> None:
        self.consumer.subscribe(topics=self._settings.input.topics, listener=self)

    async def stop(self, timeout_s: float) -> None:
        """Leave the group and close the connections; never raises."""
        if (problem := await stop_client(self.consumer.stop(), timeout_s)) is not None:
            log.warning("the group was not left in order", extra={"error": problem})

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that are polled; none before their epoch's gate is open."""
        epoch = self._epoch
        return list(epoch.lanes.values()) if epoch is not None and epoch.gate.is_set() else []

    @property
    def cautious(self) -> bool:
        """Whether documents go one at a time; see ``caution.py``."""
        return self._epoch is not None and self._epoch.caution is not None

    def failures(self) -> asyncio.Future[None]:
        """Ends with the error that ends the process."""
        return self._lost

    # ---- polling

    async def run(self) -> None:
        """Poll until :meth:`drain`; raises what ends the process."""
        while not self._stopping:
            try:
                await self._poll()
                await asyncio.sleep(0)  # getmany does not suspend while records are at hand
            except OffsetOutOfRangeError as error:
                await self._out_of_range(error)
            except CorruptRecordException as error:
                if time.monotonic() - self._complained_at > COMPLAIN_S:
                    self._complained_at = time.monotonic()
                    log.error(
                        "a record batch cannot be read, and its partition stands still; if it stays so, move the "
                        "group's offset past it",
                        extra={"error": repr(error)},
                    )
                await asyncio.sleep(ERROR_BACKOFF_S)
            except NoOffsetForPartitionError:
                continue  # raised for a partition that the epoch's opener is about to seek
            except IllegalStateError:
                await asyncio.sleep(0)  # the assignment changed under the call
            except KafkaError as error:
                if not error.retriable and "Unexpected error during coordination" in str(error):
                    raise  # aiokafka's coordination task is dead
                if (refusal := refusal_of(error)) is not None:
                    self._refusals.note(refusal, joined=self._epochs > 0)
                else:
                    log.warning("polling failed; trying again", extra={"error": repr(error)})
                await asyncio.sleep(ERROR_BACKOFF_S)

    async def _poll(self) -> None:
        epoch = self._epoch
        limit = 0
        eligible: Sequence[Lane] = ()
        if epoch is not None and epoch.gate.is_set() and not epoch.closing:
            if any(epoch.lanes[tp].watermark > self._committed[epoch.lanes[tp]] for tp in epoch.noted):
                self._intake.commit_soon()
            if epoch.caution is not None:
                await self._poll_one(epoch, epoch.caution)
                return
            eligible, limit = self._intake.poll_limit(list(epoch.lanes.values()))
        if epoch is None or not eligible or limit <= 0:
            await self._stay()
            return
        partitions = [TopicPartition(lane.topic, lane.partition) for lane in eligible]
        timeout_ms = POLL_TIMEOUT_MS if len(eligible) == len(epoch.lanes) else PARTIAL_POLL_TIMEOUT_MS
        fetched = await poll(
            self.consumer,
            partitions,
            timeout_ms,
            min(limit, MAX_RECORDS),
            self._settings.kafka.max_partition_fetch_bytes,
        )
        # No await from here on: the positions have moved.
        if epoch is not self._epoch or epoch.closing:
            self._put_back(fetched)
            return
        for tp, records in fetched.items():
            lane = epoch.lanes.get(tp)
            if lane is not None:
                self._intake.admit(lane, records)
                self.last_admitted = time.monotonic()
        for lane in eligible:
            self._advance(lane)

    async def _stay(self) -> None:
        """Remain a member, and wait for credit."""
        await self.consumer.getmany(NOTHING, timeout_ms=0)
        await self._intake.wait_for_credit(KEEP_ALIVE_S)

    async def _poll_one(self, epoch: Epoch, caution: Caution) -> None:
        """Once nothing is in flight, admit one document, named in a commit: see ``caution.py``."""
        if any(len(lane) for lane in epoch.lanes.values()):
            await self._stay()
            return
        if not await self._settle(epoch, self._commit_timeout_s):  # takes the last one's name away
            await asyncio.sleep(ERROR_BACKOFF_S)
            return
        lane = caution.turn()
        if lane is None:
            epoch.caution = None
            log.info("going on with many documents at a time")
            return
        tp = TopicPartition(lane.topic, lane.partition)
        fetched = await self.consumer.getmany(tp, timeout_ms=POLL_TIMEOUT_MS, max_records=1)
        if epoch is not self._epoch or epoch.closing:
            self._put_back(fetched)
            return
        caution.took(lane)
        if not fetched:
            self._advance(lane)
            return
        record = fetched[tp][0]
        name = str(replace(self._notes[tp], suspect=record.offset))
        epoch.noted.setdefault(tp, Note(self._notes[tp].partitions))  # an orderly end takes the name away
        try:
            await self._committer.commit(epoch, {tp: (record.offset, name)}, self._commit_timeout_s)
        except (EpochEnded, CommitFailed) as error:
            log.warning("a document is not named yet", extra={"error": str(error)})
            self._put_back(fetched)
            await asyncio.sleep(ERROR_BACKOFF_S)
            return
        self._committed[lane] = record.offset
        if epoch is not self._epoch or epoch.closing:
            self._put_back(fetched)
        elif epoch.condemned.get(tp) == record.offset:
            self._intake.condemn(lane, record)
        else:
            self._intake.admit(lane, [record])
        self.last_admitted = time.monotonic()

    def _put_back(self, fetched: dict[TopicPartition, list[Any]]) -> None:
        """Undo a poll that a rebalance has overtaken.

        A ``getmany`` that waits over a rebalance goes on with the next assignment: what it gives may be of the
        epoch after its own, whose positions the opener may already have set.
        """
        for tp, records in fetched.items():
            if tp in self.consumer.assignment():
                self.consumer.seek(tp, records[0].offset)

    def _advance(self, lane: Lane) -> None:
        """Let a lane follow the position over transaction markers and compacted records."""
        tp = TopicPartition(lane.topic, lane.partition)
        assignment = self.consumer._subscription.subscription.assignment
        state = assignment.state_value(tp) if assignment is not None else None
        if state is not None and state.has_valid_position and state.position > lane.position:
            lane.advance(state.position)

    async def _out_of_range(self, error: OffsetOutOfRangeError) -> None:
        offsets: dict[TopicPartition, int] = dict(error.args[0]) if error.args else {}
        named = ", ".join(f"{tp.topic}:{tp.partition}:{offset}" for tp, offset in offsets.items())
        if self._settings.input.on_lost_range == "stop":
            raise OffsetLost(
                f"{named or 'an offset'} is no longer in the log: records were deleted before they were "
                "processed (retention too short, or the topic was recreated); set input.on_lost_range=skip to go on at "
                "the oldest record, or reset the group's offsets"
            )
        epoch = self._epoch
        if epoch is None or not epoch.gate.is_set():
            return  # the answer is of the epoch before; if it is still so, the next poll says it again
        try:
            found = await self.consumer.beginning_offsets(list(offsets))
        except KafkaError as unknown:  # the poll comes upon it again
            log.warning("the oldest offset is not to be had yet", extra={"error": repr(unknown)})
            await asyncio.sleep(ERROR_BACKOFF_S)
            return
        for tp, beginning in found.items():
            if epoch is not self._epoch or epoch.closing:
                return
            if (lane := epoch.lanes.get(tp)) is None:
                continue
            log.error(
                "records were lost before they were processed",
                extra={"topic": tp.topic, "partition": tp.partition, "from": offsets[tp], "to": beginning},
            )
            self._listener.lost(tp.topic, max(0, beginning - offsets[tp]))
            self.consumer.seek(tp, beginning)
            if beginning < lane.position:  # the topic was made anew, or its log cut: a lane cannot go back
                self._intake.drop_lanes([lane])
                del self._committed[lane]
                epoch.caution = None  # the documents that it was about are not there any more
                lane = epoch.lanes[tp] = self._make_lane(tp, epoch.number, beginning)
                self._committed[lane] = NEVER_COMMITTED
                self._intake.open_lanes([lane], epoch.number)
            lane.advance(beginning)

    # ---- epochs

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Build lanes only: aiokafka sends no heartbeat while this runs."""
        self.rebalancing = False
        identity = current_identity(self.consumer)
        resuming: dict[TopicPartition, Lane] = {}
        if self._suspended is not None:
            resuming = self._suspended.coming_back(identity, assigned)
            self._drop_suspended(resuming)
        if not identity.valid:
            log.warning("an assignment without an identity is ignored")
            return
        self._epochs += 1
        self._assigned_at = time.monotonic()
        lanes = {
            tp: resuming[tp] if tp in resuming else self._make_lane(tp, self._epochs)
            for tp in sorted(assigned)
        }
        epoch = Epoch(self._epochs, identity, lanes, resuming=set(resuming))
        self._epoch = epoch
        epoch.opener = asyncio.create_task(self._open(epoch), name="open-epoch")
        epoch.opener.add_done_callback(self._opened)
        log.info(
            "assigned",
            extra={
                "generation": identity.generation,
                "partitions": [f"{t}:{p}" for t, p in lanes],
                "resuming": len(resuming),
            },
        )

    def _make_lane(self, tp: TopicPartition, epoch: int, start: int = 0) -> Lane:
        ordered = self._settings.delivery.order == "partition"
        return Lane(tp.topic, tp.partition, epoch, start, ordered=ordered)

    def _drop_suspended(self, keep: Collection[TopicPartition] = ()) -> None:
        """Forget the suspended lanes but for those to keep."""
        suspended, self._suspended = self._suspended, None
        if suspended is not None:
            self._forget([lane for tp, lane in suspended.lanes.items() if tp not in keep])

    def _forget(self, lanes: Sequence[Lane]) -> None:
        self._intake.drop_lanes(lanes)
        for lane in lanes:
            self._committed.pop(lane, None)

    def _opened(self, opener: asyncio.Task[None]) -> None:
        if not opener.cancelled() and (error := opener.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._lost.done():
            self._lost.set_exception(error)

    async def _open(self, epoch: Epoch) -> None:
        """Find the start of every lane, seek, commit the start, open the gate."""
        assigned = set(epoch.lanes)
        if assigned:
            opening = await self._find_positions(epoch, assigned)
            if opening is None:
                return
            self._require_untouched(epoch, opening)
            for tp, position in opening.positions.items():
                lane = epoch.lanes[tp]
                if tp in epoch.resuming:
                    self.consumer.seek(tp, lane.position)  # not the offset: what lies between is in the lane
                    continue
                self.consumer.seek(tp, position)
                lane.advance(position)
                self._committed[lane] = position
            starts = self._judge(epoch, opening)
            while starts:
                try:
                    await self._committer.commit(epoch, starts, self._commit_timeout_s)
                    break
                except EpochEnded:
                    return
                except CommitFailed as error:
                    log.warning("the start offsets are not committed yet", extra={"error": str(error)})
                    if isinstance(error, CommitRefused):
                        self._refusals.note(str(error), joined=self._epochs > 0)
                    await asyncio.sleep(ERROR_BACKOFF_S)
        if epoch is not self._epoch or epoch.closing:
            return
        if epoch.resuming:
            documents = sum(len(epoch.lanes[tp]) for tp in epoch.resuming)
            log.info("resumed", extra={"partitions": len(epoch.resuming), "documents": documents})
        lanes = list(epoch.lanes.values())
        self._intake.open_lanes(lanes, epoch.number)
        epoch.resuming.clear()
        self._listener.assigned(lanes)
        epoch.gate.set()

    def _require_untouched(self, epoch: Epoch, opening: Opening) -> None:
        """Begin a lane anew where the group's offset is not what the lane has committed.

        It may be past what we know of it, if the answer to the last commit was lost, but not past the watermark.
        Nobody in the group can have moved it, but an administrator can.
        """
        for tp in sorted(epoch.resuming):
            lane, found = epoch.lanes[tp], opening.positions[tp]
            if tp in opening.committed and self._committed[lane] <= found <= lane.watermark:
                continue
            log.warning(
                "the offset was moved from outside: what was in work is dropped",
                extra={"topic": tp.topic, "partition": tp.partition, "offset": found},
            )
            self._forget([lane])
            epoch.lanes[tp] = self._make_lane(tp, epoch.number)
            epoch.resuming.discard(tp)

    def _judge(self, epoch: Epoch, opening: Opening) -> dict[TopicPartition, tuple[int, str]]:
        """What the notes say of documents that kill the process; gives the starts to commit."""
        lagging = {tp for tp, position in opening.positions.items() if position < opening.ends[tp]}
        lagging -= epoch.resuming  # nothing has died of them
        verdict = judge(opening.notes, lagging, self._settings.delivery.max_crash_attempts)
        self._notes = verdict.notes
        self._metadata |= {tp.topic: str(Note(note.partitions)) for tp, note in verdict.notes.items()}
        epoch.noted = {
            tp: opening.notes[tp]
            for tp, note in verdict.notes.items()
            if note.attempts or note.suspect is not None
        }
        epoch.condemned = verdict.condemned
        alone = {tp: killer + 1 for tp, killer in verdict.condemned.items()}
        alone |= {tp: opening.ends[tp] for tp in verdict.suspected}
        if alone:
            log.warning(
                "the process died again and again: one document at a time",
                extra={"partitions": sorted(f"{tp.topic}:{tp.partition}" for tp in alone)},
            )
            ends = {epoch.lanes[tp]: end for tp, end in alone.items()}
            epoch.caution = Caution(ends, self._settings.buffer.max_documents or 1)
        return {
            tp: (opening.positions[tp], str(note))
            for tp, note in verdict.notes.items()
            if tp not in opening.committed or note != opening.notes[tp]
        }

    async def _find_positions(self, epoch: Epoch, assigned: set[TopicPartition]) -> Opening | None:
        while epoch is self._epoch and not epoch.closing:
            try:
                return await open_positions(
                    self.consumer,
                    self.settler.offsets,
                    self._settings.kafka.group_id,
                    assigned,
                    self._settings.input.start,
                    self._settings.kafka.request_timeout_ms,
                )
            except InferstreamError:
                raise
            except KafkaError as error:
                log.warning("start offsets are not to be had yet", extra={"error": repr(error)})
                if (refusal := refusal_of(error)) is not None:
                    self._refusals.note(refusal, joined=self._epochs > 0)
                await asyncio.sleep(ERROR_BACKOFF_S)
        return None

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Finish what fits, settle it, suspend the rest; never raises and ends within the revoke's time."""
        self.rebalancing = True
        epoch, self._epoch = self._epoch, None
        if epoch is None:
            await self._hurry_drain()
            return
        log.info("revoked", extra={"generation": epoch.identity.generation, "partitions": len(revoked)})
        self._count_evictions()
        try:
            # Documents that go one at a time are not kept: whom to suspect is judged anew in each epoch.
            await self._close(
                epoch, self._settings.delivery.revoke_timeout_s, for_good=epoch.caution is not None
            )
        except Exception:
            log.exception("closing an epoch failed; what was not committed will be read again")

    def _count_evictions(self) -> None:
        """End the worker if another one has its static identity.

        The two throw each other out at every heartbeat, and neither is told why.  A session that ended cannot
        be taken for it: that takes longer.
        """
        kafka = self._settings.kafka
        soon = time.monotonic() - self._assigned_at < kafka.session_timeout_ms / 1000
        if not soon or current_identity(self.consumer).valid:
            self._evictions = 0
            return
        self._evictions += 1
        if kafka.group_instance_id is not None and self._evictions >= MAX_EVICTIONS:
            self.consumer._coordinator._max_poll_interval = -1  # it does not join again: the other one stays
            self._fail(
                KafkaRefused(refusal_line(kafka, self._settings.input.topics, "FencedInstanceIdError"))
            )

    async def drain(self, timeout_s: float) -> bool:
        """Stop polling, finish and settle what fits ``timeout_s``; True when all that was kept is settled."""
        self._stopping = True
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()  # a revoke that is under way is our drain
                if self._epoch is not None and self._epoch.resuming and self._epoch.opener is not None:
                    await asyncio.wait({self._epoch.opener}, timeout=self._commit_timeout_s)
                    await self._closed.wait()
        except TimeoutError:
            return False
        self._drop_suspended()
        epoch, self._epoch = self._epoch, None
        if epoch is None:
            return True
        left_s = deadline - time.monotonic()
        return await self._close(epoch, left_s, for_good=True) and not self._hurried

    async def acquit(self, timeout_s: float) -> None:
        """The process ends, and not of a document: nothing is admitted any more, and no attempt is noted."""
        epoch = self._epoch
        if epoch is None or epoch.closing or not epoch.gate.is_set():
            return
        epoch.closing = True
        deadline = time.monotonic() + timeout_s
        if await self._settle(epoch, timeout_s / 2):
            await self._restore_notes(epoch, max(0.1, deadline - time.monotonic()))

    async def _hurry_drain(self) -> None:
        """Give a drain that a rebalance meets the time of a revoke.

        Until this returns the group does not go on, and the drain can still commit.
        """
        timeout_s = self._settings.delivery.revoke_timeout_s
        deadline = time.monotonic() + timeout_s
        if (epoch := self._closing_epoch) is not None:
            log.info("a rebalance hurries the drain", extra={"timeout_s": timeout_s})
            lanes = list(epoch.lanes.values())
            if epoch.identity != current_identity(self.consumer) or not await self._intake.close_lanes(
                lanes, timeout_s * (1 - COMMIT_RESERVE_S)
            ):
                self._hurried = True
            self._intake.drop_lanes(lanes)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._closed.wait()
        except TimeoutError:
            log.warning("the group goes on before the drain has ended")

    async def _close(self, epoch: Epoch, timeout_s: float, *, for_good: bool) -> bool:
        """Finish and settle what fits; the rest is dropped, or suspended unless ``for_good``."""
        deadline = time.monotonic() + timeout_s
        epoch.closing = True
        if epoch.opener is not None and not epoch.opener.done():
            epoch.opener.cancel()
        lanes = list(epoch.lanes.values())
        kept: dict[TopicPartition, Lane] = {}
        self._closed.clear()
        try:
            if not epoch.gate.is_set():
                await self._restore_notes(epoch, timeout_s)
                if not for_good:
                    kept = {tp: epoch.lanes[tp] for tp in epoch.resuming}  # they were ours in this epoch, too
                return True
            self._listener.revoked(lanes)
            if epoch.identity != current_identity(self.consumer):
                log.warning("the group went on without this member; its work in flight is dropped")
                return False
            self._closing_epoch = epoch  # ticks go on: release may be waiting for a commit
            self._closing_until = deadline
            clean = await self._intake.close_lanes(
                lanes, timeout_s * (1 - COMMIT_RESERVE_S), for_good=for_good
            )
            self._closing_epoch = None
            if for_good:
                self._intake.drop_lanes(lanes)
            else:
                self._intake.suspend_lanes(lanes)
            settled = await self._settle(epoch, max(0.1, deadline - time.monotonic()))
            if settled:  # else the offsets may have moved further than we know
                await self._restore_notes(epoch, max(0.1, deadline - time.monotonic()))
            if not for_good:
                kept = dict(epoch.lanes)
                log.info("suspended", extra={"documents": sum(map(len, lanes))})
            return settled and clean
        finally:
            self._closing_epoch = None
            self._forget([lane for tp, lane in epoch.lanes.items() if tp not in kept])
            self._suspended = Suspended(epoch.identity, kept) if kept else None
            self.settler.abandon()
            self._closed.set()

    # ---- settling

    @property
    def _commit_timeout_s(self) -> float:
        return self._settings.delivery.revoke_timeout_s * COMMIT_RESERVE_S

    async def settle(self) -> bool:
        """Commit the watermarks that moved since the last commit.  Called on every tick."""
        epoch = self._closing_epoch or self._epoch
        if epoch is None or not epoch.gate.is_set():
            return True
        timeout_s = self._commit_timeout_s
        if epoch is self._closing_epoch:  # a drain has more time, and what is cut off is sent again in vain
            timeout_s = max(timeout_s, self._closing_until - time.monotonic())
        return await self._settle(epoch, timeout_s)

    async def _settle(self, epoch: Epoch, timeout_s: float) -> bool:
        try:
            covered = await self.settler.settle(epoch, self._committed, self._metadata, timeout_s)
        except EpochEnded as error:
            self._listener.commit_ended("epoch_ended")
            log.warning("not committed: the epoch has ended", extra={"error": str(error)})
            return False
        except CommitRefused as error:
            self._listener.commit_ended("refused")
            self._refusals.note(str(error), joined=self._epochs > 0)
            return False
        except CommitFailed as error:
            self._listener.commit_ended("failed")
            log.warning("not committed; trying again", extra={"error": str(error)})
            return False
        if covered:
            self._listener.commit_ended("ok")
        for lane, (offset, settled) in covered.items():
            if lane in self._committed:
                self._committed[lane] = offset
            self._intake.committed(lane, settled)
            epoch.noted.pop(TopicPartition(lane.topic, lane.partition), None)
        return True

    async def _restore_notes(self, epoch: Epoch, timeout_s: float) -> None:
        """Let partitions that did not move say what they said before: an orderly end is nobody's attempt."""
        offsets = {
            tp: (self._committed[epoch.lanes[tp]], str(note))
            for tp, note in epoch.noted.items()
            if tp not in epoch.resuming
        }
        try:
            await self._committer.commit(epoch, offsets, timeout_s)
        except (EpochEnded, CommitFailed) as error:
            log.warning("attempts are still noted", extra={"error": str(error)})

    def lags(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Records after the position, and after the committed offset, per owned partition.

        The end is the one that our isolation level may read up to, as of the last fetch.
        """
        epoch = self._epoch
        assignment = self.consumer._subscription.subscription.assignment if epoch is not None else None
        if epoch is None or assignment is None:
            return {}
        read_committed = self._settings.input.isolation == "read_committed"
        lags: dict[tuple[str, int], tuple[int, int]] = {}
        for tp, lane in epoch.lanes.items():
            state = assignment.state_value(tp)
            end = None if state is None else (state.lso if read_committed else state.highwater)
            if end is not None and lane in self._committed:
                lags[tp.topic, tp.partition] = (
                    max(0, end - lane.position),
                    max(0, end - self._committed[lane]),
                )
        return lags
