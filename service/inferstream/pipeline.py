"""The stages wired together: read this first.

    source --admit--> lanes --> prepare --> window --> batches --> device --> finish --> release --> sink
      ^                                                                                                |
      |________ credit ______________________ acknowledged ____________________________________________|

Every record that is polled takes credit and a slot in its lane.  Worker threads decode and tokenise it in
chunks; prepared documents wait in the window until a staging slot of the device is free; the device's rows
are finished in the worker threads; the completed head run of each lane goes to the sink, in order; the broker's
acknowledgement frees the slot, gives the credit back and moves the lane's watermark, which the source
commits.

All methods here run on the event loop and none of them parses, tokenises, serialises or computes: they move
references.  Queues are bounded by credit: what holds no credit is in no queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from aiokafka.errors import KafkaError

from inferstream.batching import Item, Window
from inferstream.codec import Codec
from inferstream.credit import RECORD_OVERHEAD, Credit
from inferstream.device import Device
from inferstream.device.memory import Ceilings
from inferstream.device.stage import DeviceStage
from inferstream.documents import Kind, Outgoing, Reason, Rejected, Stage
from inferstream.errors import DeadLetterRefused, OutOfMemory
from inferstream.kafka.polling import weight_of
from inferstream.kafka.sink import Sink
from inferstream.lanes import ADMITTED, DROPPED, Lane, Slot
from inferstream.processing import Processing
from inferstream.settings import Settings
from inferstream.tasks import Task
from inferstream.telemetry.metrics import Metrics
from inferstream.telemetry.timeline import Timeline
from inferstream.workers import FINISH, PREPARE, Workers

log = logging.getLogger(__name__)

CHUNK_RECORDS = 256  # what one worker prepares at a time: large enough to pay for the hand-over,
CHUNK_BYTES = 64 * 1024  # small enough that tokenising it (some ms) does not hold its mates back
CLOSING_SHARE = 0.7  # of the time a closing has, how much is planned with: estimates err
RATE_MEMORY = 0.9  # exponential memory of the measured seconds per document, per batch


class Pipeline:
    """One worker's flow from admitted records to acknowledged results.

    ``failed`` is called with the error that has to end the process; ``flops_of`` is the device stage's.
    """

    def __init__(
        self,
        settings: Settings,
        codec: Codec,
        task: Task,
        device: Device,
        metrics: Metrics,
        timeline: Timeline,
        failed: Callable[[BaseException], None],
        flops_of: Callable[[int], float] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        budget = settings.batch.max_tokens
        assert budget and settings.buffer.max_documents  # resolved at start
        if device.max_tokens is not None:
            budget = min(budget, device.max_tokens)
        assert settings.buffer.max_bytes and settings.buffer.max_tokens and settings.prepare.threads
        self._loop = loop
        self._codec = codec
        self.processing = Processing(codec, task)
        self._metrics = metrics
        self._failed = failed
        self._linger_s = settings.batch.linger_ms / 1000
        self._max_uncommitted = settings.delivery.max_uncommitted_documents
        self._strip_oversize = settings.dead_letter.oversize == "strip"
        self.credit: Credit[Lane] = Credit(
            settings.buffer.max_documents,
            settings.buffer.max_bytes,
            settings.buffer.max_tokens,
            settings.buffer.max_lane_share,
            settings.kafka.max_partition_fetch_bytes,
        )
        self.window = Window(budget, padded=device.padded, lanes=device.lanes)
        self.ceilings = Ceilings(budget)
        self.workers = Workers(settings.prepare.threads, loop, failed, timeline)
        self.stage = DeviceStage(device, self, loop, timeline, flops_of)
        self.sink: Sink | None = None
        self._lanes: set[Lane] = set()
        self._closing: set[Lane] = set()
        self._committed: dict[Lane, int] = {}  # how many of a lane's slots are settled and committed
        self._uncommitted_share = self._max_uncommitted  # of each lane
        self._shares_differ = False  # a lane has released more than its share: it was one of fewer lanes
        self._aside: list[Item] = []  # what no closing lane has the time for
        self._linger: asyncio.TimerHandle | None = None
        self._credit_freed = asyncio.Event()
        self._moved = asyncio.Event()  # a slot was acknowledged
        self.commit_due = asyncio.Event()  # half of what may be uncommitted is
        self._seconds_per_document = 0.0
        self.unprepared = 0  # admitted records that the worker threads have not prepared yet
        self.finishing = 0  # pieces whose rows the worker threads have not finished yet
        self.prepared_tokens = 0

    # ---- credit and admission (called by the source)

    def open_lanes(self, lanes: Sequence[Lane], epoch: int) -> None:
        """Begin with those that are new, and let those that were suspended go on, in ``epoch``."""
        back = [lane for lane in lanes if lane in self._committed]
        for lane in lanes:
            if lane not in self._committed:
                self._lanes.add(lane)
                self._committed[lane] = 0
                self.credit.open_lane(lane)
        self._share_out()
        for lane in back:
            lane.resume(epoch)
            self._metrics.documents_resumed(len(lane))
        self._release(back)
        self._credit_freed.set()

    def poll_limit(self, lanes: Sequence[Lane]) -> tuple[Sequence[Lane], int]:
        return self.credit.poll_limit(lanes)

    async def wait_for_credit(self, timeout_s: float) -> None:
        self._credit_freed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._credit_freed.wait()
        except TimeoutError:
            pass

    def admit(self, lane: Lane, records: Sequence[Any]) -> None:
        """Give each record a slot and send chunks of them to be prepared."""
        now = time.monotonic()
        chunk: list[Slot] = []
        size = total = 0
        for record in records:
            weight = weight_of(record)
            total += weight
            slot = lane.admit(record, weight)
            if chunk and (len(chunk) == CHUNK_RECORDS or size + weight > CHUNK_BYTES):
                self.workers.submit(PREPARE, self.processing.prepare, (now, chunk), self._prepared)
                chunk, size = [], 0
            chunk.append(slot)
            size += weight
        if chunk:
            self.workers.submit(PREPARE, self.processing.prepare, (now, chunk), self._prepared)
        self.credit.take(lane, total, len(records))
        self.unprepared += len(records)
        self._metrics.records_consumed(lane.topic, len(records))
        now_ms = time.time() * 1000
        self._metrics.record_ages(
            [(now_ms - record.timestamp) / 1000 for record in records if record.timestamp >= 0]
        )

    def condemn(self, lane: Lane, record: Any) -> None:
        """Give a record its dead letter unseen: it killed the process."""
        weight = weight_of(record)
        slot = lane.admit(record, weight)
        self.credit.take(lane, weight)
        self._metrics.records_consumed(lane.topic, 1)
        rejected = Rejected(
            Reason.PROCESS_KILLED,
            "the process died again and again, the last time while it ran this document alone",
            Stage.DEVICE,
        )
        self._finished([(slot, self._codec.dead_letter(record, rejected))])

    def commit_soon(self) -> None:
        self.commit_due.set()

    # ---- prepare

    def _prepared(self, answer: tuple[list[Slot], list[Item], list[tuple[Slot, Outgoing]]]) -> None:
        chunk, items, rejected = answer
        self.unprepared -= len(chunk)
        gained = tokens = count = 0  # a chunk is of one lane, so its credit is changed once
        for slot in chunk:
            prepared = slot.prepared
            if prepared is None or slot.state == DROPPED:
                continue
            weight = RECORD_OVERHEAD + prepared.weight
            if weight > slot.weight:
                gained += weight - slot.weight
                slot.weight = weight
            slot.tokens = sum(prepared.lengths)
            tokens += slot.tokens
            count += 1
        if count:
            self.prepared_tokens += tokens
            if count + len(rejected) < len(chunk):  # some were dropped meanwhile
                items = [item for item in items if item.owner.state != DROPPED]
            if self._closing:
                self._aside += [item for item in items if _past_the_fence(item)]
                items = [item for item in items if not _past_the_fence(item)]
            self.window.add(*items)
            self.credit.reweigh(chunk[0].lane, 0, gained, tokens, count)
        if rejected:
            self._finished(rejected)
        self._dispatch()

    # ---- batches

    def slot_freed(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        """Fill the free staging slots: halves of failed batches first, then from the window."""
        while self.stage.free_slots:
            items = self.stage.next_retry() or self._form()
            if not items:
                return
            self.stage.launch(items)

    def _form(self) -> list[Item] | None:
        if not len(self.window):
            return None
        if self._closing:
            items = self.window.form(arrival=True)
            self._metrics.batch("closing", items, self.window.cost(items))
            return items
        wait_s = self.window.wait_s(time.monotonic(), self._linger_s)
        if wait_s > 0:
            if self._linger is None:
                self._linger = self._loop.call_later(wait_s, self._linger_over)
            return None
        full = self.window.full
        items = self.window.form()
        self._metrics.batch("tokens" if full else "linger", items, self.window.cost(items))
        return items

    def _linger_over(self) -> None:
        self._linger = None
        try:
            self._dispatch()
        except Exception as error:  # asyncio would only log it, and the batch would wait for ever
            self._failed(error)

    def batch_done(self, items: Sequence[Item], rows: np.ndarray) -> None:
        self.finishing += len(items)
        self.workers.submit(FINISH, self.processing.finish, (items, rows), self._batch_finished)
        if self.stage.items:
            spent = self.stage.occupied_s / self.stage.lanes / self.stage.items
            self._seconds_per_document = (
                RATE_MEMORY * self._seconds_per_document + (1 - RATE_MEMORY) * spent
                if self._seconds_per_document
                else spent
            )
        if self.ceilings.lowered:
            self.ceilings.fitted(self._longest(items))
            if not self.ceilings.lowered:
                self.window.limit = None

    def item_failed(self, item: Item, error: BaseException) -> None:
        slot: Slot = item.owner
        if slot.state != ADMITTED:  # dropped, or another chunk of the document failed before
            return
        if isinstance(error, OutOfMemory):
            rejected = Rejected(
                Reason.OUT_OF_MEMORY,
                f"the document alone ({item.length} tokens) does not fit the device's memory; "
                "lower model.max_length",
                Stage.DEVICE,
            )
        else:
            log.error("the model raised on one document", extra={"error": repr(error)[:200]})
            rejected = Rejected(
                Reason.MODEL_ERROR,
                f"the model raised {type(error).__name__} on this document alone",
                Stage.DEVICE,
            )
        if slot.rows is not None:
            self.window.discard(lambda other: other.owner is slot)
        self._finished([(slot, self._codec.dead_letter(slot.record, rejected))])

    def out_of_memory(self, items: Sequence[Item]) -> None:
        longest = self._longest(items)
        lowered = self.ceilings.out_of_memory(longest, self.window.cost(items))
        self.window.limit = self.ceilings.of if self.window.padded else lambda _: self.ceilings.of(1)
        facts = {"max_tokens": lowered} | ({"longest": longest} if self.window.padded else {})
        log.warning("out of device memory: lowering the token budget", extra=facts)

    def _longest(self, items: Sequence[Item]) -> int:
        """What a batch's ceiling goes by: without padding its memory does not depend on its longest document."""
        return max(item.length for item in items) if self.window.padded else 1

    def device_failed(self, error: BaseException) -> None:
        self._failed(error)

    # ---- finish

    def _batch_finished(
        self, answer: tuple[int, list[tuple[Slot, Outgoing]], list[tuple[Item, np.ndarray]]]
    ) -> None:
        pieces, answers, parts = answer
        self.finishing -= pieces
        for item, row in parts:
            slot: Slot = item.owner
            if slot.state != ADMITTED:
                continue  # dropped, or another of its chunks failed
            assert slot.rows is not None
            slot.rows[item.index] = row
            if all(row is not None for row in slot.rows):
                self.workers.submit(FINISH, self.processing.finish_chunked, slot, self._finished)
        self._finished(answers)

    def _finished(self, answers: list[tuple[Slot, Outgoing]]) -> None:
        changed: dict[Lane, list[int]] = {}
        for slot, outgoing in answers:
            lane = slot.lane
            if not lane.complete(slot, outgoing):
                continue  # dropped
            change = changed.get(lane)
            if change is None:
                change = changed[lane] = [0, 0]
            # A slot weighs the most it has held: the record, its prepared form or its result.
            weight = RECORD_OVERHEAD + outgoing.size
            if weight > slot.weight:
                change[0] += weight - slot.weight
                slot.weight = weight
            change[1] += slot.tokens
            slot.tokens = 0
        for lane, (gained, tokens) in changed.items():
            self.credit.reweigh(lane, 0, gained, -tokens)
        self._release(changed)

    # ---- release and settle

    def _release(self, lanes: Iterable[Lane]) -> None:
        """Send what is complete, up to each lane's share of ``delivery.max_uncommitted_documents``."""
        sink = self.sink
        assert sink is not None
        for lane in lanes:
            if lane not in self._committed:
                continue  # dropped
            room = self._uncommitted_share - (lane.settled - self._committed[lane])
            if room > 0:
                sink.send(lane, lane.release(room))

    def _share_out(self) -> None:
        """Set what each lane may have released and not committed.

        A lane that came back may have more than an even share, if there are more lanes now: the others have the
        less until a commit covers that.
        """
        even = max(1, self._max_uncommitted // max(1, len(self._committed)))
        held = [lane.released - committed for lane, committed in self._committed.items()]
        over = [count for count in held if count > even]
        within = max(1, len(held) - len(over))
        self._shares_differ = bool(over)
        self._uncommitted_share = max(1, (self._max_uncommitted - sum(over)) // within)

    def acknowledged(self, slots: list[Slot], *, committed: bool = False) -> None:
        """The broker has the slots' outcomes; ``committed``: and the group's offsets cover them."""
        now_ms = time.time() * 1000
        ages: list[float] = []
        given: dict[Lane, list[int]] = {}
        self._metrics.published(slot.outcome for slot in slots if slot.outcome is not None)
        for slot in slots:
            if slot.state == DROPPED:
                continue
            if slot.record.timestamp >= 0:
                ages.append((now_ms - slot.record.timestamp) / 1000)
            lane = slot.lane
            lane.acknowledge(slot)
            back = given.get(lane)
            if back is None:
                back = given[lane] = [0, 0]
            back[0] += slot.weight
            back[1] += 1
        share = self._uncommitted_share
        for lane, (weight, count) in given.items():
            self.credit.give(lane, weight, 0, count)
            if committed:
                self._committed[lane] = lane.settled
            elif 2 * (lane.settled - self._committed[lane]) >= share:
                self.commit_due.set()
        self._metrics.end_to_end(ages)
        self._credit_freed.set()
        self._moved.set()

    def handed_over(self, lane: Lane) -> None:
        """Under exactly-once: what the lane has released is in the open transaction, which may have to end soon."""
        assert self.sink is not None
        finished = lane in self._closing and lane.unsettled > 0 and lane.handed_on
        if (
            finished
            or 2 * lane.unsettled >= self._uncommitted_share
            or 2 * self.sink.queued >= self.credit.max_documents  # nothing can be read until it is committed
        ):
            self.commit_due.set()

    def refused(self, slot: Slot, error: KafkaError) -> Outgoing:
        """The broker will never take this outcome: a result is dead-lettered; a dead letter stripped, or the end."""
        record, outgoing = slot.record, slot.outcome
        assert outgoing is not None
        where = f"{record.topic}:{record.partition}:{record.offset}"
        if outgoing.kind is not Kind.DEAD_LETTER:
            rejected = Rejected(
                Reason.RECORD_REFUSED,
                f"the output topic refused the record: {type(error).__name__}",
                Stage.SINK,
            )
            log.warning("the output topic refused a record", extra={"record": where, "error": repr(error)})
            return self._codec.dead_letter(record, rejected)
        if self._strip_oversize and outgoing.value is not None:
            return self._codec.stripped(outgoing)
        raise DeadLetterRefused(
            f"the dead letter of {where} was refused by its topic ({type(error).__name__}); raise max.message.bytes "
            "of the dead-letter topic, or set dead_letter.oversize=strip to leave the value out"
        )

    def committed(self, lane: Lane, settled: int) -> None:
        """The group's offset now covers the first ``settled`` slots of ``lane``."""
        if lane in self._committed:
            self._committed[lane] = settled
            if self._shares_differ:
                self._share_out()
                self._release(self._lanes)
            else:
                self._release((lane,))

    # ---- closing

    async def close_lanes(self, lanes: Sequence[Lane], timeout_s: float, *, for_good: bool = True) -> bool:
        """Finish, per lane, the longest prefix that fits ``timeout_s``; True when it is all acknowledged.

        The rest is dropped at once: it stays uncommitted and its next owner reads it again.  Unless
        ``for_good``, it stays in its lane, for :meth:`suspend_lanes`.
        """
        deadline = self._loop.time() + timeout_s
        keep = self._fitting(lanes, timeout_s * CLOSING_SHARE)
        for lane in lanes:
            if for_good:
                self._drop(lane, keep.get(lane))
            else:
                lane.close(keep.get(lane))
        if for_good:
            self._forget_dropped()
        else:
            self._aside += self.window.discard(_past_the_fence)
        closing = set(lanes)
        self._closing |= closing
        try:
            self._dispatch()
            while not all(lane.finished for lane in lanes):
                self._release(closing)
                self._moved.clear()
                async with asyncio.timeout_at(deadline):
                    await self._moved.wait()
        except TimeoutError:
            return False
        finally:
            self._closing -= closing
        return True

    def suspend_lanes(self, lanes: Sequence[Lane]) -> None:
        """Send nothing more of these lanes until they resume or are dropped.

        What they hold keeps its credit, and what of it is not computed yet is computed meanwhile.
        """
        for lane in lanes:
            lane.suspend()
        if self.sink is not None:
            self.sink.withdraw()
        aside, self._aside = self._aside, []
        self.window.add(*aside)
        self._dispatch()

    def drop_lanes(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            if lane not in self._lanes:
                continue
            self._drop(lane, 0)
            self._lanes.discard(lane)
            del self._committed[lane]
            self.credit.close_lane(lane)
        self._share_out()
        self._forget_dropped()

    def _fitting(self, lanes: Sequence[Lane], time_s: float) -> dict[Lane, int]:
        """How much of each lane the device can finish in ``time_s``, shared evenly; empty if all of it."""
        if not self._seconds_per_document:
            return {}
        affordable = max(len(lanes), int(time_s / self._seconds_per_document))
        backlog = sum(len(lane) for lane in lanes)
        if backlog <= affordable:
            return {}
        share = affordable // len(lanes)
        keep: dict[Lane, int] = {}
        for lane in lanes:
            done = next((n for n, slot in enumerate(lane) if slot.state == ADMITTED), len(lane))
            keep[lane] = max(done, share)
        return keep

    def _drop(self, lane: Lane, keep: int | None) -> None:
        dropped = lane.drop(keep)
        for slot in dropped:
            self.credit.give(lane, slot.weight, slot.tokens)
        self._metrics.documents_dropped(len(dropped))

    def _forget_dropped(self) -> None:
        self.window.discard(lambda item: item.owner.state == DROPPED)
        self.stage.discard(lambda item: item.owner.state == DROPPED)
        self._aside = [item for item in self._aside if item.owner.state != DROPPED]
        if self.sink is not None:
            self.sink.withdraw()
        self._credit_freed.set()
        self._moved.set()

    # ---- what a dashboard reads

    @property
    def blocked_documents(self) -> int:
        """Documents that are completed but wait behind their lane's head."""
        return sum(lane.blocked for lane in self._lanes)

    @property
    def waiting(self) -> dict[str, int]:
        """How many documents (or pieces of them) wait for each stage or are in it, in the order of the flow.

        Those that are done and wait for an older one are with none: it is the older one that waits.
        """
        share = self._uncommitted_share
        publish = commit = 0
        for lane, committed in self._committed.items():
            publish += lane.unsettled
            if lane.settled - committed >= share:
                commit += len(lane) - lane.in_flight - lane.unsettled - lane.blocked
        return {
            "prepare": self.unprepared,
            "device": len(self.window) + self.stage.pieces,
            "finish": self.finishing,
            "publish": publish,
            "commit": commit,
        }

    @property
    def uncommitted(self) -> int:
        """Documents that are acknowledged and not yet covered by a commit."""
        return sum(lane.settled - committed for lane, committed in self._committed.items())

    @property
    def max_uncommitted(self) -> int:
        return self._max_uncommitted

    @property
    def in_flight(self) -> int:
        return sum(len(lane) for lane in self._lanes)

    def close(self, timeout_s: float) -> None:
        """End the threads; the lanes are closed before."""
        if self._linger is not None:
            self._linger.cancel()
        self.workers.close(timeout_s)
        self.stage.close(timeout_s)


def _past_the_fence(item: Item) -> bool:
    slot: Slot = item.owner
    return slot.offset >= slot.lane.fence
