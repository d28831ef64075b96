"""Random lives of the whole pipeline: lanes, credit, window, device stage and sink, between simulated neighbours.

One machine plays the source (polls, commits, revokes, assignments), the worker threads, the device and the broker of
``tests/support/simulation.py``, so every order of their events can come up: batches that raise, run out of memory
or come back after their lane was dropped; acknowledgements that fail, are lost or refused; a drain or a second
owner at any moment.  What has to hold is promises 1, 2, 4 and 5, and that in the end nothing is left behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    UnknownError,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from inferstream.codec import Codec
from inferstream.documents import Document, Prepared, Reason, Rejected
from inferstream.errors import OutOfMemory
from inferstream.kafka.polling import weight_of
from inferstream.kafka.sink import OutputTopic, Sink
from inferstream.lanes import RELEASED, Lane
from inferstream.pipeline import Pipeline
from inferstream.settings import load_settings, resolve
from inferstream.tasks.hash import HashTask, hash_vectors
from inferstream.telemetry.metrics import Metrics
from inferstream.telemetry.timeline import Timeline
from tests.support.simulation import (
    HandBroker,
    HandDevice,
    HandStage,
    HandWorkers,
    SimulatedLoop,
    SimulatedTime,
    first_occurrences,
)

FETCH_BYTES = 4096
HEAVY = 9_000  # characters: more than buffer.max_bytes may be, and more than a poll hands over
MAX_LENGTH, MAX_CHUNKS = 16, 4  # in tokens of four characters
METRICS, TIMELINE = Metrics(), Timeline()
CLOCK = SimulatedTime()
BATCH_ERRORS = ("fine", "fine", "fine", "raises", "out of memory", "too few rows")


@dataclass(frozen=True, slots=True)
class Fake:
    """A record; ``kind`` says what has to become of it."""

    kind: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None
    topic: str = "in"
    timestamp: int = 1_764_000_000_000
    headers: tuple[tuple[str, bytes | None], ...] = ()


TEXTS = {
    "plain": "plain {}",
    "poison": "poison {}",  # the device raises on every batch with it
    "huge": "huge {}",  # and runs out of memory on this one
    "not finite": "not finite {}",
    "chunked": "chunked {} " + "long " * 30,
    "bad chunk": "bad chunk {} " + "long " * 30,
    "too long": "too long {} " + "long " * 90,
    "heavy": "heavy {}",  # its weight is in a field that nobody reads
    "unprepared": "unprepared {}",  # the task raises on it
    "unfinished": "unfinished {}",
    "refused": "refused {}",  # by the output topic
}
REASONS = {
    "poison": Reason.MODEL_ERROR,
    "huge": Reason.OUT_OF_MEMORY,
    "not finite": Reason.MODEL_ERROR,
    "bad chunk": Reason.MODEL_ERROR,
    "too long": Reason.TOO_LONG,
    "unprepared": Reason.MODEL_ERROR,
    "unfinished": Reason.MODEL_ERROR,
    "refused": Reason.RECORD_REFUSED,
    "broken": Reason.INVALID_JSON,
    "oversize": Reason.INVALID_JSON,  # and its dead letter is refused until its value is left out
    "tombstone without key": Reason.TOMBSTONE_WITHOUT_KEY,
}
KINDS = ["plain"] * 8 + [*TEXTS, "broken", "oversize", "tombstone", "tombstone without key"]


class MoodyTask(HashTask):
    """Hashes, but for two kinds of documents."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unfinished: set[str] = set()

    def prepare(self, documents: Any) -> list[Prepared | Rejected]:
        self._unfinished |= {document.id for document in documents if document.text.startswith("unfinished")}
        if any(document.text.startswith("unprepared") for document in documents):
            raise ValueError("unprepared")
        return super().prepare(documents)

    def output(self, prepared: Prepared, vectors: np.ndarray) -> dict[str, Any]:
        if prepared.document.id in self._unfinished:
            raise ValueError("unfinished")
        return super().output(prepared, vectors)


def refuses(topic: str, record: dict[str, Any]) -> KafkaError | None:
    """What the broker never takes."""
    key = record["key"] or b""
    if topic == "out" and b"refused" in key:
        return MessageSizeTooLargeError() if key.endswith(b"0") else UnknownError()
    if topic == "dead" and b"oversize" in key and record["value"] is not None:
        return MessageSizeTooLargeError()
    return None


class Life(RuleBasedStateMachine):
    """One worker's life; ``committed`` is what the group's coordinator has, ``told`` what the pipeline knows of it."""

    @initialize(
        partitions=st.integers(1, 3),
        owned=st.integers(1, 3),
        documents=st.sampled_from([1, 3, 12, 40]),
        size=st.sampled_from([1024, 6000, 60_000]),
        tokens=st.sampled_from([16, 64, 1000]),
        share=st.sampled_from([0.3, 1.0]),
        uncommitted=st.sampled_from([2, 5, 12, 1000]),
        padded=st.booleans(),
        ordered=st.booleans() | st.just(True),
        aligned=st.booleans(),
        batch_limit=st.sampled_from([1, 3, 100]),
    )
    def start(
        self,
        partitions: int,
        owned: int,
        documents: int,
        size: int,
        tokens: int,
        share: float,
        uncommitted: int,
        padded: bool,
        ordered: bool,
        aligned: bool,
        batch_limit: int,
    ) -> None:
        flags = {
            "kafka.bootstrap_servers": ["h:1"],
            "kafka.max_partition_fetch_bytes": FETCH_BYTES,
            "input.topics": ["in"],
            "output.topic": "out",
            "model.id": "builtin:hash",
            "batch.linger_ms": 5,
            "batch.max_tokens": min(tokens, 64),
            "buffer.max_documents": documents,
            "buffer.max_bytes": size,
            "buffer.max_tokens": tokens,
            "buffer.max_lane_share": share,
            "delivery.max_uncommitted_documents": uncommitted,
            "dead_letter.oversize": "strip",
        }
        tree = resolve(load_settings((), {}, flags).settings, "hash", 2)
        self.loop = CLOCK.loop = SimulatedLoop()
        self.failures: list[BaseException] = []
        self.max_uncommitted = uncommitted
        self.ordered = ordered
        self.broker = HandBroker(batch_limit, refuses)
        codec = Codec.from_settings(tree)
        self.task = MoodyTask(MAX_LENGTH, "chunk", MAX_CHUNKS, codec.embedding)

        def build() -> None:
            device: Any = HandDevice(slots=3, padded=padded)
            self.pipeline = Pipeline(tree, codec, self.task, device, METRICS, TIMELINE, self.failures.append)
            outputs = partitions if aligned else 2
            self.sink = self.pipeline.sink = Sink(
                self.broker.producer,
                OutputTopic("out", outputs, 1 << 20),
                OutputTopic("dead", outputs, 1 << 20),
                {"in": partitions},
                self.pipeline,
                self.failures.append,
                TIMELINE,
            )

        self.loop.go(build)
        self.loop.go(self.sink.start())
        self.workers: HandWorkers = self.pipeline.workers  # type: ignore[assignment]
        self.stage: HandStage = self.pipeline.stage  # type: ignore[assignment]
        self.logs: list[list[Fake]] = [[] for _ in range(partitions)]
        self.ends = [0] * partitions
        self.committed = [0] * partitions
        self.lanes: dict[int, Lane] = {}
        self.suspended: dict[int, Lane] = {}
        self.for_good = True
        self.told: dict[Lane, int] = {}
        self.closing: asyncio.Task[bool] | None = None
        self.commit: tuple[dict[int, Lane], dict[Lane, int]] | None = None
        self.epoch = 0
        self.heaviest = 0
        self.kinds: dict[tuple[int, int], str] = {}
        self.embeddings: dict[tuple[int, int], Any] = {}
        self.loop.go(self.assign, owned)

    def assign(self, partitions: int | None = None) -> None:
        """Open lanes for the first ``partitions``, all by default, and those that are back."""
        self.epoch += 1
        opened = list(self.lanes.values())
        for number, offset in list(enumerate(self.committed))[:partitions]:
            if number not in self.lanes:
                lane = Lane("in", number, self.epoch, offset, ordered=self.ordered)
                self.lanes[number] = lane
                self.told[lane] = 0
                opened.append(lane)
        self.pipeline.open_lanes(opened, self.epoch)

    # ---- the input topic

    @rule(data=st.data(), kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12), gap=st.booleans())
    def arrive(self, data: st.DataObject, kinds: list[str], gap: bool) -> None:
        partition = data.draw(st.integers(0, len(self.logs) - 1))
        for kind in kinds:
            self.logs[partition].append(self.make(kind, partition, self.ends[partition]))
            self.ends[partition] += 1
        self.ends[partition] += gap  # a transaction's marker

    def make(self, kind: str, partition: int, offset: int) -> Fake:
        self.kinds[partition, offset] = kind
        name = f"{partition}:{offset}:{kind}:{offset % 2}"
        key: bytes | None = name.encode()
        value: bytes | None = None
        if kind == "tombstone without key":
            key = None
        elif kind in ("broken", "oversize"):
            value = b'{"text": '
        elif kind != "tombstone":
            text = TEXTS[kind].format(name)
            value = orjson.dumps({"text": text, "other": "x" * (HEAVY if kind == "heavy" else 0)})
            self.foresee(partition, offset, text)
        return Fake(kind, partition, offset, value, key)

    def foresee(self, partition: int, offset: int, text: str) -> None:
        [prepared] = HashTask.prepare(self.task, [Document("", text)])
        if isinstance(prepared, Rejected):
            return
        output = HashTask.output(self.task, prepared, hash_vectors(prepared.chunks))
        self.embeddings[partition, offset] = orjson.loads(
            orjson.dumps(output, option=orjson.OPT_SERIALIZE_NUMPY)
        )

    # ---- the source

    @precondition(lambda self: self.lanes and self.closing is None)
    @rule(times=st.integers(1, 4))
    def poll(self, times: int) -> None:
        for _ in range(times):
            self.loop.go(self.poll_once)

    def poll_once(self) -> None:
        lanes = list(self.lanes.values())
        eligible, limit = self.pipeline.poll_limit(lanes)
        assert eligible or all(len(lane) for lane in lanes)
        room = FETCH_BYTES
        for lane in eligible:
            records = []
            for record in self.logs[lane.partition]:
                if record.offset >= lane.position and limit > 0 and room > 0:
                    records.append(record)
                    limit -= 1
                    room -= weight_of(record)
                    self.heaviest = max(self.heaviest, weight_of(record))
            if records:
                self.pipeline.admit(lane, records)
            if not any(record.offset >= lane.position for record in self.logs[lane.partition]):
                lane.advance(self.ends[lane.partition])

    @precondition(lambda self: self.lanes and self.commit is None)
    @rule(applied=st.booleans() | st.just(True))
    def commit_begins(self, applied: bool) -> None:
        """The coordinator may take it or not; the answer comes later."""
        lanes = dict(self.lanes)
        self.commit = lanes, {lane: lane.settled for lane in lanes.values()} if applied else {}
        if applied:
            for partition, lane in lanes.items():
                self.committed[partition] = lane.watermark

    @precondition(lambda self: self.commit is not None)
    @rule(answered=st.booleans() | st.just(True))
    def commit_ends(self, answered: bool) -> None:
        assert self.commit is not None
        _, settled = self.commit
        self.commit = None
        for lane, count in settled.items():
            if answered:
                self.told[lane] = count
                self.loop.go(self.pipeline.committed, lane, count)

    @precondition(lambda self: self.lanes and self.closing is None)
    @rule(timeout_s=st.sampled_from([0.0, 0.5, 10.0]), chance=st.integers(0, 2), for_good=st.booleans())
    def revoke_begins(self, timeout_s: float, chance: int, for_good: bool) -> None:
        if chance != 1:
            return  # epochs live long enough to be interesting
        self.for_good = for_good
        closing = self.pipeline.close_lanes(list(self.lanes.values()), timeout_s, for_good=for_good)
        self.closing = self.loop.go(self.loop.create_task, closing)

    @precondition(lambda self: self.closing is not None)
    @rule(other=st.integers(0, 4), commits=st.booleans())
    def revoke_ends(self, other: int, commits: bool) -> None:
        """If it has ended: what is left is dropped or suspended.

        If it is dropped, another member may own the partitions before we do again.
        """
        assert self.closing is not None
        if not self.closing.done():
            return
        clean = self.closing.result()
        self.closing = None
        if self.for_good:
            assert not clean or all(len(lane) == 0 for lane in self.lanes.values())
            self.leave(commits)
            self.another_member(other, range(len(self.logs)))
            self.loop.go(self.assign)
            return
        assert not clean or all(lane.finished for lane in self.lanes.values())
        self.suspended, self.lanes = self.lanes, {}
        self.commit = None  # its answer is lost
        self.loop.go(self.pipeline.suspend_lanes, list(self.suspended.values()))
        if commits:
            for partition, lane in self.suspended.items():
                self.committed[partition] = lane.watermark

    @precondition(lambda self: self.suspended)
    @rule(lost=st.sets(st.integers(0, 2)), other=st.integers(0, 4))
    def group_goes_on(self, lost: set[int], other: int) -> None:
        """Some lanes come back; the partitions of the others may be another member's before they are ours again."""
        lanes, self.suspended = self.suspended, {}
        gone = {partition: lane for partition, lane in lanes.items() if partition in lost}
        self.loop.go(self.pipeline.drop_lanes, list(gone.values()))
        self.another_member(other, gone)
        self.lanes = {partition: lane for partition, lane in lanes.items() if partition not in gone}
        self.loop.go(self.assign)

    @precondition(lambda self: self.lanes)
    @rule(other=st.integers(0, 4), chance=st.integers(0, 9))
    def session_is_lost(self, other: int, chance: int) -> None:
        """The group has gone on without us: nothing is finished or committed any more."""
        if chance != 5:
            return
        self.leave(commits=False)
        if self.closing is not None:
            closing, self.closing = self.closing, None
            self.loop.go(closing)
        self.another_member(other, range(len(self.logs)))
        self.loop.go(self.assign)

    def leave(self, commits: bool) -> None:
        lanes, self.lanes = self.lanes, {}
        self.commit = None
        self.loop.go(self.pipeline.drop_lanes, list(lanes.values()))
        if commits:
            for partition, lane in lanes.items():
                self.committed[partition] = lane.watermark
        credit = self.pipeline.credit
        assert (credit.documents, credit.bytes, credit.tokens) == (0, 0, 0)
        assert not len(self.pipeline.window) and self.stage.next_retry() is None

    def another_member(self, count: int, partitions: Iterable[int]) -> None:
        """It answers some records from the committed offset on, and commits."""
        for partition in partitions:
            waiting = [
                record for record in self.logs[partition] if record.offset >= self.committed[partition]
            ]
            for record in waiting[:count]:
                self.broker.logs["other", partition].append({"origin": (partition, record.offset)})
                self.committed[partition] = record.offset + 1

    # ---- worker threads, device, broker, clock

    @rule(count=st.integers(1, 12), data=st.data())
    def work(self, count: int, data: st.DataObject) -> None:
        for _ in range(count):
            self.workers.work()
        for _ in range(data.draw(st.integers(0, count))):
            pick = data.draw(st.integers(0, 3))
            self.loop.go(self.workers.tell, pick)

    @rule(picks=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(BATCH_ERRORS)), min_size=1, max_size=8))
    def device_ends(self, picks: list[tuple[int, str]]) -> None:
        for pick, how in picks:
            if flying := self.stage.flying():
                self.loop.go(self.end_batch, flying[pick % len(flying)], how)

    def end_batch(self, slot: int, how: str) -> None:
        items = self.stage.batch_of(slot)
        kinds = [self.kinds[item.owner.lane.partition, item.owner.offset] for item in items]
        bad = [kind == "bad chunk" and item.index == 1 for kind, item in zip(kinds, items, strict=True)]
        rows = hash_vectors([item.payload for item in items])
        alone = (
            len(items) == 1
        )  # what fails at random does so on batches: alone, a healthy document is computed
        if "huge" in kinds or (how == "out of memory" and not alone):
            self.stage.end(slot, None, OutOfMemory("no room"))
        elif "poison" in kinds or any(bad) or (how == "raises" and not alone):
            self.stage.end(slot, None, RuntimeError("the model"))
        elif how == "too few rows" and not alone:
            self.stage.end(slot, rows[:-1])
        else:
            rows[[kind == "not finite" for kind in kinds], 0] = np.nan
            self.stage.end(slot, rows)

    @rule(answers=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8))
    def broker_answers(self, answers: list[tuple[int, int]]) -> None:
        for pick, how in answers:
            error = {0: KafkaTimeoutError(), 1: UnknownError(), 2: MessageSizeTooLargeError()}.get(how)
            if how in (1, 2):  # refusals at random: of batches only, or the document would be refused
                sendings = self.broker.sendings
                if not sendings or len(sendings[pick % len(sendings)].batch.records) == 1:
                    error = None
            appended = how == 3
            if appended:
                error = KafkaConnectionError("lost the answer")
            self.loop.go(self.broker.answer, pick, appended, error)

    @rule(away=st.booleans())
    def broker_goes_or_comes(self, away: bool) -> None:
        self.broker.away = away

    @rule(seconds=st.sampled_from([0.002, 0.006, 0.6, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.go(asyncio.sleep(seconds))

    # ---- what has to hold

    @invariant()
    def nothing_ends_the_process(self) -> None:
        assert self.failures == []

    @invariant()
    def nothing_is_lost(self) -> None:
        answered = set().union(*self.answered().values()) if self.answered() else set()
        for partition, log in enumerate(self.logs):
            lost = [
                r
                for r in log
                if r.offset < self.committed[partition] and (partition, r.offset) not in answered
            ]
            assert lost == []

    @invariant()
    def first_answers_are_in_order(self) -> None:
        """But for a result that the broker refused: its dead letter comes when that is known."""
        if not self.ordered:
            return
        refused = {place for place, kind in self.kinds.items() if kind == "refused"}
        for (topic, _), origins in self.answered().items():
            for partition in range(len(self.logs)):
                first = [place for place in first_occurrences(origins) if place[0] == partition]
                if topic == "dead":
                    first = [place for place in first if place not in refused]
                assert topic == "other" or first == sorted(first)

    @invariant()
    def credit_is_what_the_slots_hold_and_within_its_bound(self) -> None:
        credit, lanes = self.pipeline.credit, [*self.lanes.values(), *self.suspended.values()]
        held = [slot for lane in lanes for slot in lane if slot.state <= RELEASED]
        assert credit.documents == len(held)
        assert credit.bytes == sum(slot.weight for slot in held)
        assert credit.tokens == sum(slot.tokens for slot in held)
        grown = sum(slot.weight - weight_of(slot.record) for slot in held)
        others = max(0, len(lanes) - 1)
        assert credit.documents <= credit.max_documents + others
        assert credit.bytes <= credit.max_bytes + FETCH_BYTES + len(lanes) * self.heaviest + grown

    @invariant()
    def repeats_after_a_crash_are_bounded(self) -> None:
        """Each lane may have one released, or it would never be committed."""
        lanes = [*self.lanes.values(), *self.suspended.values()]
        released = sum(lane.released - self.told[lane] for lane in lanes)
        assert released <= max(self.max_uncommitted, len(lanes))

    @invariant()
    def nothing_of_a_suspended_lane_waits_to_be_sent(self) -> None:
        """What the producer was given before may still come back; nothing is added to it."""
        handed = {
            id(slot)
            for sender in self.sink._senders.values()
            for slot in list(sender.queue)[: sender.sending]
        }
        for lane in self.suspended.values():
            assert all(id(slot) in handed for slot in lane if slot.state == RELEASED)

    @invariant()
    def a_piece_is_in_one_place(self) -> None:
        """In the window, on the device, to be run again, or in a thread; never in two of them."""
        places = [*self.pipeline.window]
        for slot in self.stage.flying():
            places += self.stage.batch_of(slot)
        for items in self.stage._again:
            places += items
        pieces = [(id(item.owner), item.index) for item in places]
        assert len(set(pieces)) == len(pieces)

    def answered(self) -> dict[tuple[str, int], list[tuple[int, int]]]:
        return {place: [origin(record) for record in log] for place, log in self.broker.logs.items()}

    # ---- the end

    def teardown(self) -> None:
        """With healthy neighbours everything is answered, rightly, and nothing is left behind."""
        if not hasattr(self, "loop"):
            return
        try:
            self.come_to_the_end()
            self.check_answers()
        finally:
            self.loop.stopping = True
            self.loop.run_until_complete(self.sink.stop(1.0))
            left = asyncio.all_tasks(self.loop)
            self.loop.close()
        assert not left

    def come_to_the_end(self) -> None:
        self.broker.away = False
        if self.closing is not None:
            self.loop.go(asyncio.sleep(30))
            assert self.closing.done()
            self.revoke_ends(0, True)
        if self.suspended:
            self.group_goes_on(set(), 0)
        if len(self.lanes) < len(self.logs):
            self.leave(commits=False)
            self.loop.go(self.assign)
        for _ in range(10 * sum(map(len, self.logs)) + 60):
            self.loop.go(self.poll_once)
            while self.workers.waiting or self.workers.ended:
                self.workers.work()
                self.loop.go(self.workers.tell, 0)
            for slot in self.stage.flying():
                self.loop.go(self.end_batch, slot, "fine")
            while self.broker.sendings:
                self.loop.go(self.broker.answer, 0, True, None)
            if self.commit is not None:
                self.commit_ends(True)
            self.commit_begins(True)
            self.commit_ends(True)
            self.loop.go(asyncio.sleep(0.6))
            self.nothing_ends_the_process()
            # A document is settled when one of its chunks has failed; another may still be on the device.
            if self.committed == self.ends and self.stage.idle:
                break
        assert self.committed == self.ends, "it does not come to its end"
        credit = self.pipeline.credit
        assert (credit.documents, credit.bytes, credit.tokens) == (0, 0, 0)
        assert not len(self.pipeline.window) and self.stage.idle and self.stage.free_slots == 3
        assert self.sink.queued == 0 and self.pipeline.unprepared == 0 and self.pipeline.in_flight == 0
        self.nothing_is_lost()
        self.first_answers_are_in_order()

    def check_answers(self) -> None:
        for (topic, _), log in self.broker.logs.items():
            for record in log if topic != "other" else ():
                place = origin(record)
                kind, headers = self.kinds[place], dict(record["headers"])
                if topic == "dead":
                    assert headers["inferstream.error.reason"] == REASONS[kind].value.encode()
                    assert ("inferstream.stripped.value_bytes" in headers) == (kind == "oversize")
                elif kind == "tombstone":
                    assert record["value"] is None
                else:
                    assert kind not in REASONS
                    assert orjson.loads(record["value"])["output"] == self.embeddings[place]


def origin(record: dict[str, Any]) -> tuple[int, int]:
    """The partition and offset that a published record answers."""
    if "origin" in record:
        return tuple(record["origin"])
    if record["key"] is None:
        headers = dict(record["headers"])
        return int(headers["inferstream.source.partition"]), int(headers["inferstream.source.offset"])
    partition, offset, *_ = record["key"].split(b":")
    return int(partition), int(offset)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("inferstream.pipeline.Workers", HandWorkers)
    monkeypatch.setattr("inferstream.pipeline.DeviceStage", HandStage)
    for module in ("pipeline", "processing", "kafka.sink", "device.stage"):
        monkeypatch.setattr(f"inferstream.{module}.time", CLOCK)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_pipeline_when_its_life_is_random_then_nothing_is_lost_and_nothing_is_left_behind(
    simulated: None,
) -> None:
    run_state_machine_as_test(
        Life, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
