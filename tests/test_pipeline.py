"""The pipeline without Kafka: a sink that the test acknowledges by hand, and devices that misbehave."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pytest

from inferstream.codec import Codec
from inferstream.device.cpu import CpuDevice
from inferstream.documents import Document, Kind, Outgoing
from inferstream.errors import DeviceFailed, OutOfMemory
from inferstream.lanes import Lane, Slot
from inferstream.pipeline import Pipeline
from inferstream.settings import load_settings, resolve
from inferstream.tasks.hash import HashRunner, HashTask, digest
from inferstream.telemetry.metrics import Metrics
from inferstream.telemetry.timeline import Timeline

DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Fake:
    """A record as the pipeline reads it."""

    offset: int
    value: bytes | None
    topic: str = "in"
    partition: int = 0
    timestamp: int = 1_700_000_000_000
    key: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()


@dataclass
class HandSink:
    """Collects what is released; acknowledges at once, or when the test says so."""

    pipeline: Pipeline
    automatic: bool = True
    sent: list[tuple[Slot, Outgoing]] = field(default_factory=list)
    waiting: list[Slot] = field(default_factory=list)
    queued: int = 0

    def send(self, lane: Lane, slots: Sequence[Slot]) -> None:
        for slot in slots:
            assert slot.lane is lane and slot.outcome is not None
            self.sent.append((slot, slot.outcome))
            self.waiting.append(slot)
        if self.automatic and slots:
            asyncio.get_running_loop().call_soon(self.acknowledge)

    def acknowledge(self) -> None:
        slots, self.waiting = self.waiting, []
        self.pipeline.acknowledged(slots)

    def withdraw(self) -> None:
        return


class Runner(HashRunner):
    """Hashes, and misbehaves as told."""

    def __init__(self, misbehave: Callable[[Sequence[bytes]], None]) -> None:
        self._misbehave = misbehave
        self.batches: list[int] = []

    def run(self, items: Sequence[Any]) -> np.ndarray:
        self.batches.append(len(items))
        self._misbehave(items)
        return super().run(items)


Build = Callable[..., tuple[Pipeline, HandSink, Runner]]


@pytest.fixture
async def build() -> AsyncIterator[Build]:
    pipelines: list[Pipeline] = []
    failures: list[BaseException] = []

    def make(
        misbehave: Callable[[Sequence[bytes]], None] = lambda items: None, threads: int = 2, **tree: Any
    ) -> tuple[Pipeline, HandSink, Runner]:
        flags = {
            "kafka.bootstrap_servers": ["h:1"],
            "input.topics": ["in"],
            "output.topic": "out",
            "model.id": "builtin:hash",
            "batch.linger_ms": 1,
            **tree,
        }
        settings = resolve(load_settings((), {}, flags).settings, "hash", 2)
        codec = Codec.from_settings(settings)
        runner = Runner(misbehave)
        task = HashTask(8192, "truncate", 16, codec.embedding)
        pipeline = Pipeline(
            settings, codec, task, CpuDevice(runner, threads), Metrics(), Timeline(), failures.append
        )
        sink = HandSink(pipeline)
        pipeline.sink = sink  # type: ignore[assignment]  # only what the pipeline calls
        pipelines.append(pipeline)
        return pipeline, sink, runner

    make.failures = failures  # type: ignore[attr-defined]
    yield make
    for pipeline in pipelines:
        await asyncio.to_thread(pipeline.close, 5.0)


def record(offset: int, text: str | None = None) -> Fake:
    return Fake(offset, orjson.dumps({"id": offset, "text": text or f"document {offset}"}))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def open_lane(pipeline: Pipeline, partition: int = 0) -> Lane:
    lane = Lane("in", partition, 1, 0)
    pipeline.open_lanes([lane], 1)
    return lane


async def test_results_then_they_are_serialised_in_a_worker_thread_from_the_rows_themselves(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, sink, _ = build()
    seen: list[tuple[str, bool]] = []
    rows: list[np.ndarray] = []
    batch_done, result = pipeline.batch_done, Codec.result

    def watch_rows(items: Sequence[Any], each: np.ndarray) -> None:
        rows.append(each)
        batch_done(items, each)

    def watch_result(self: Codec, *arguments: Any) -> Any:
        shared = any(np.shares_memory(arguments[-1]["embedding"], each) for each in rows)
        seen.append((threading.current_thread().name, shared))
        return result(self, *arguments)

    monkeypatch.setattr(pipeline, "batch_done", watch_rows)
    monkeypatch.setattr(Codec, "result", watch_result)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(20)])
    await until(lambda: len(sink.sent) == 20)

    assert len(seen) == 20
    assert all(name.startswith("worker-") and shared for name, shared in seen)


async def test_batches_when_less_than_a_budget_waits_then_the_lanes_share_it(build: Build) -> None:
    pipeline, sink, runner = build(threads=2, **{"batch.max_tokens": 1500})
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n, "x" * 399) for n in range(10)])  # 100 tokens each
    await until(lambda: len(sink.sent) == 10)

    assert sorted(runner.batches) == [2, 3, 5]


async def test_usage_when_documents_went_through_then_tokens_time_and_operations_are_counted(
    build: Build,
) -> None:
    pipeline, sink, _ = build()
    pipeline.stage._flops_of = lambda length: 10.0 * length
    sink.automatic = False
    lane = open_lane(pipeline)
    for n in range(3):
        pipeline.admit(lane, [record(n, "x" * 399)])
        await until(lambda n=n: len(sink.sent) == n + 1)  # type: ignore[misc]  # mypy has no type for it

    assert pipeline.prepared_tokens == pipeline.stage.tokens == 300
    assert pipeline.stage.flops == 3000.0
    assert pipeline.waiting == {"prepare": 0, "device": 0, "finish": 0, "publish": 3, "commit": 0}
    idle = pipeline.stage.usage.idle_s
    assert pipeline.stage.usage.busy_s > 0
    assert idle["prepare"] > 0 and idle["batch"] >= 0.001 and idle["launch"] > 0  # linger_ms is 1
    assert sum(pipeline.workers.cpu_s) > 0


async def test_waiting_when_too_much_is_uncommitted_then_the_rest_waits_for_the_commit(build: Build) -> None:
    pipeline, _, _ = build(**{"delivery.max_uncommitted_documents": 4})
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(10)])
    await until(lambda: lane.settled == 4 and not lane.in_flight)

    assert pipeline.waiting == {"prepare": 0, "device": 0, "finish": 0, "publish": 0, "commit": 6}
    assert (pipeline.uncommitted, pipeline.max_uncommitted) == (4, 4)

    pipeline.committed(lane, 4)
    await until(lambda: lane.settled == 8)
    assert pipeline.waiting["commit"] == 2


async def test_batch_when_one_document_raises_then_only_that_one_is_a_dead_letter(build: Build) -> None:
    poison = digest("poison")

    def raise_on_poison(items: Sequence[bytes]) -> None:
        if poison in items:
            raise RuntimeError("CUDNN_STATUS_BAD_PARAM on secret text")

    pipeline, sink, _ = build(raise_on_poison)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n, "poison" if n == 37 else None) for n in range(100)])
    await until(lambda: not len(lane))
    assert [slot.offset for slot, _ in sink.sent] == list(range(100))
    dead = [(slot.offset, out) for slot, out in sink.sent if out.kind is Kind.DEAD_LETTER]
    assert [offset for offset, _ in dead] == [37]
    headers = dict(dead[0][1].headers)
    assert headers["inferstream.error.reason"] == b"model_error"
    assert b"secret" not in (headers["inferstream.error.message"] or b"")
    assert lane.watermark == 100


async def test_batch_when_memory_is_short_then_it_is_halved_and_the_budget_lowered(build: Build) -> None:
    def short_of_memory(items: Sequence[bytes]) -> None:
        if len(items) > 8:
            raise OutOfMemory("8 fit")

    pipeline, sink, runner = build(short_of_memory)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(200)])
    await until(lambda: not len(lane))
    assert all(out.kind is Kind.RESULT for _, out in sink.sent)
    assert pipeline.ceilings.lowered and pipeline.window.limit is not None
    assert max(runner.batches) > 8


async def test_document_when_it_alone_is_out_of_memory_then_it_is_a_dead_letter(build: Build) -> None:
    heavy = digest("heavy")

    def no_room(items: Sequence[bytes]) -> None:
        if heavy in items:
            raise OutOfMemory("never")

    pipeline, sink, _ = build(no_room)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n, "heavy" if n == 3 else None) for n in range(10)])
    await until(lambda: not len(lane))
    reasons = [dict(out.headers)["inferstream.error.reason"] for _, out in sink.sent if out.rejected]
    assert reasons == [b"out_of_memory"]


async def test_device_when_it_fails_for_good_then_the_process_is_told_and_nothing_is_acknowledged(
    build: Build,
) -> None:
    def poisoned(items: Sequence[bytes]) -> None:
        raise DeviceFailed("device-side assert")

    pipeline, sink, _ = build(poisoned)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(10)])
    await until(lambda: bool(build.failures))  # type: ignore[attr-defined]
    assert isinstance(build.failures[0], DeviceFailed)  # type: ignore[attr-defined]
    assert sink.sent == [] and lane.watermark == 0


async def test_results_when_batches_end_in_any_order_then_lanes_are_released_in_order(build: Build) -> None:
    chance = random.Random(3)

    def dawdle(items: Sequence[bytes]) -> None:
        import time

        time.sleep(chance.random() * 0.004)

    pipeline, sink, _ = build(dawdle, threads=3, **{"batch.max_tokens": 64})
    lanes = [open_lane(pipeline, partition) for partition in range(3)]
    for lane in lanes:
        pipeline.admit(lane, [record(n, "word " * chance.randrange(1, 60)) for n in range(200)])
    await until(lambda: not any(len(lane) for lane in lanes))
    for lane in lanes:
        assert [slot.offset for slot, _ in sink.sent if slot.lane is lane] == list(range(200))
    assert pipeline.credit.documents == pipeline.credit.bytes == pipeline.credit.tokens == 0


async def test_release_when_nothing_is_committed_then_it_stops_at_the_bound(build: Build) -> None:
    pipeline, sink, _ = build(**{"delivery.max_uncommitted_documents": 50})
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(300)])
    await until(lambda: len(sink.sent) == 50 and lane.settled == 50 and pipeline.blocked_documents == 0)
    await until(lambda: pipeline.stage.idle and not len(pipeline.window))
    assert len(sink.sent) == 50 and pipeline.commit_due.is_set()
    while len(sink.sent) < 300:
        pipeline.committed(lane, lane.settled)
        await asyncio.sleep(0.001)
    await until(lambda: not len(lane))


async def test_release_when_a_lane_comes_back_among_more_lanes_then_what_it_holds_is_taken_from_theirs(
    build: Build,
) -> None:
    pipeline, sink, _ = build(**{"delivery.max_uncommitted_documents": 50})
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(60)])
    await until(lambda: lane.settled == 50)
    assert not await pipeline.close_lanes([lane], 0.05, for_good=False)
    pipeline.suspend_lanes([lane])

    others = [Lane("in", partition, 2, 0) for partition in (1, 2)]
    pipeline.open_lanes([lane, *others], 2)
    for other in others:
        pipeline.admit(other, [record(n) for n in range(40)])
    await until(lambda: not any(other.in_flight for other in others))
    assert [other.released for other in others] == [1, 1]  # which a lane always may

    pipeline.committed(lane, 30)
    await until(lambda: pipeline.uncommitted == 20 + 15 + 15)  # without a commit of their own
    pipeline.committed(lane, 50)
    await until(lambda: pipeline.uncommitted == 10 + 16 + 16)
    assert len(sink.sent) == 60 + 16 + 16
    while len(sink.sent) < 140:
        for each in (lane, *others):
            pipeline.committed(each, each.settled)
        await asyncio.sleep(0.001)


async def test_release_when_a_lane_is_lost_and_comes_anew_then_those_that_stayed_keep_to_their_share(
    build: Build,
) -> None:
    pipeline, sink, _ = build(**{"delivery.max_uncommitted_documents": 6})
    lanes = [open_lane(pipeline, partition) for partition in range(3)]
    for lane in lanes:
        pipeline.admit(lane, [record(n) for n in range(10)])
    assert not await pipeline.close_lanes(lanes, 0, for_good=False)
    pipeline.suspend_lanes(lanes)
    await until(lambda: not any(lane.in_flight for lane in lanes))
    sent = len(sink.sent)

    pipeline.drop_lanes(lanes[:1])
    pipeline.open_lanes([*lanes[1:], Lane("in", 0, 2, 0)], 2)
    assert [lane.released for lane in lanes[1:]] == [2, 2] and sent <= 6


async def test_closing_when_everything_fits_then_all_is_acknowledged(build: Build) -> None:
    pipeline, sink, _ = build()
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(500)])
    assert await pipeline.close_lanes([lane], 10.0)
    pipeline.drop_lanes([lane])
    assert len(sink.sent) == 500 and lane.watermark == 500


async def test_closing_when_time_is_short_then_a_prefix_is_finished_and_the_rest_dropped(
    build: Build,
) -> None:
    def slow(items: Sequence[bytes]) -> None:
        import time

        time.sleep(0.01 * len(items))

    pipeline, sink, _ = build(slow, threads=1, **{"batch.max_tokens": 16})
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(400)])
    await until(lambda: len(sink.sent) >= 10)
    assert await pipeline.close_lanes([lane], 1.0)
    pipeline.drop_lanes([lane])
    done = len(sink.sent)
    assert 10 <= done < 400
    assert [slot.offset for slot, _ in sink.sent] == list(range(done))
    assert lane.watermark == done
    assert pipeline.credit.documents == 0 and not len(pipeline.window)


async def test_closing_when_the_broker_is_silent_then_it_ends_at_the_deadline_and_keeps_the_watermark(
    build: Build,
) -> None:
    pipeline, sink, _ = build()
    sink.automatic = False
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(20)])
    await until(lambda: len(sink.sent) == 20)
    assert not await pipeline.close_lanes([lane], 0.3)
    pipeline.drop_lanes([lane])
    assert lane.watermark == 0
    sink.acknowledge()  # too late: it changes nothing any more
    assert lane.watermark == 0 and pipeline.credit.documents == 0


async def test_lane_when_suspended_then_the_device_goes_on_and_nothing_is_sent_or_computed_twice(
    build: Build,
) -> None:
    running, computed = threading.Event(), list[bytes]()
    running.set()

    def hold(items: Sequence[bytes]) -> None:
        computed.extend(items)
        running.wait(DEADLINE_S)

    pipeline, sink, _ = build(hold, threads=1, **{"batch.max_tokens": 16})
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(200)])
    await until(lambda: len(sink.sent) >= 10)
    running.clear()
    assert not await pipeline.close_lanes([lane], 0.2, for_good=False)
    pipeline.suspend_lanes([lane])
    sent, held = len(sink.sent), len(lane)
    assert 0 < held < 200 and pipeline.credit.documents == held

    running.set()
    await until(lambda: not lane.in_flight)
    assert len(sink.sent) == sent and pipeline.credit.documents == held

    pipeline.open_lanes([lane], 2)
    pipeline.admit(lane, [record(n) for n in range(200, 210)])
    await until(lambda: not len(lane))
    assert [slot.offset for slot, _ in sink.sent] == list(range(210))
    assert len(computed) == len(set(computed)) == 210
    assert pipeline.credit.documents == 0 and lane.watermark == 210


async def test_lane_when_suspended_and_dropped_then_nothing_of_it_is_left(build: Build) -> None:
    running = threading.Event()
    pipeline, sink, _ = build(lambda items: running.wait(DEADLINE_S), threads=1, **{"batch.max_tokens": 16})
    lane, other = open_lane(pipeline), open_lane(pipeline, 1)
    pipeline.admit(lane, [record(n) for n in range(100)])
    await until(lambda: not pipeline.unprepared)
    assert not await pipeline.close_lanes([lane, other], 0.05, for_good=False)
    pipeline.suspend_lanes([lane, other])
    pipeline.drop_lanes([lane])
    pipeline.open_lanes([other], 2)
    assert pipeline.credit.documents == 0 and not len(pipeline.window) and pipeline.stage.next_retry() is None

    running.set()
    pipeline.admit(other, [record(0)])
    await until(lambda: not len(other))
    assert [slot.lane for slot, _ in sink.sent] == [other]


async def test_closing_when_lanes_may_come_back_then_the_time_goes_to_the_prefix_of_each(
    build: Build,
) -> None:
    computed: list[bytes] = []

    def slow(items: Sequence[bytes]) -> None:
        import time

        computed.extend(items)
        time.sleep(0.005 * len(items))

    pipeline, sink, _ = build(slow, threads=1, **{"batch.max_tokens": 16})
    long, short = open_lane(pipeline), open_lane(pipeline, 1)
    pipeline.admit(long, [record(n, f"long {n}") for n in range(600)])
    pipeline.admit(short, [record(n, f"short {n}") for n in range(20)])  # behind all of the other's
    await until(lambda: len(sink.sent) >= 10)
    assert await pipeline.close_lanes([long, short], 1.0, for_good=False)
    assert short.watermark == 20 and long.finished and 10 <= long.watermark < 600
    done = len(sink.sent)
    pipeline.suspend_lanes([long, short])
    await until(lambda: not long.in_flight)
    assert len(sink.sent) == done and len(computed) == len(set(computed)) == 620


async def test_chunked_document_when_its_chunks_go_in_several_batches_then_it_has_one_result(
    build: Build,
) -> None:
    pipeline, sink, runner = build(**{"batch.max_tokens": 8192})
    pipeline.processing.task = HashTask(64, "chunk", 1000, pipeline._codec.embedding)
    pipeline.window.max_tokens = 64
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(0, "long " * 400), record(1)])
    await until(lambda: not len(lane))
    assert len(sink.sent) == 2 and len(runner.batches) > 2
    usage = orjson.loads(sink.sent[0][1].value or b"")["usage"]
    assert usage["chunks"] > 4 and usage["truncated"] is False


async def test_commit_when_the_last_acknowledgement_that_release_waits_for_comes_then_it_is_due(
    build: Build,
) -> None:
    pipeline, sink, _ = build(**{"delivery.max_uncommitted_documents": 10})
    sink.automatic = False
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(30)])
    await until(lambda: len(sink.sent) == 10 and pipeline.stage.idle and not len(pipeline.window))
    pipeline.commit_due.clear()  # a commit that found nothing to commit yet
    sink.acknowledge()
    assert pipeline.commit_due.is_set()


async def test_transaction_when_half_of_what_may_be_uncommitted_is_in_it_then_its_end_is_due(
    build: Build,
) -> None:
    pipeline, sink, _ = build(**{"delivery.max_uncommitted_documents": 10})
    sink.automatic = False
    lane = open_lane(pipeline)
    for count, due in ((4, False), (5, True)):
        pipeline.admit(lane, [record(n) for n in range(lane.position, count)])
        await until(lambda count=count: len(sink.sent) == count)
        pipeline.handed_over(lane)
        assert pipeline.commit_due.is_set() is due
    pipeline.commit_due.clear()

    pipeline.acknowledged(sink.waiting, committed=True)
    assert not pipeline.commit_due.is_set() and pipeline.credit.documents == 0
    sink.waiting = []
    pipeline.admit(lane, [record(n) for n in range(5, 15)])
    await until(lambda: len(sink.sent) == 15)


async def test_transaction_when_half_of_the_buffer_waits_for_it_then_its_end_is_due(build: Build) -> None:
    pipeline, sink, _ = build(**{"buffer.max_documents": 100})
    lane = open_lane(pipeline)
    sink.queued = 49
    pipeline.handed_over(lane)
    assert not pipeline.commit_due.is_set()
    sink.queued = 50
    pipeline.handed_over(lane)
    assert pipeline.commit_due.is_set()


async def test_transaction_when_a_closing_lane_is_all_in_it_then_its_end_is_due(build: Build) -> None:
    pipeline, sink, _ = build()
    sink.automatic = False
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(3)])
    await until(lambda: len(sink.sent) == 3)
    pipeline.handed_over(lane)
    assert not pipeline.commit_due.is_set()
    closing = asyncio.create_task(pipeline.close_lanes([lane], 10.0))
    await asyncio.sleep(0)
    pipeline.handed_over(lane)
    assert pipeline.commit_due.is_set()
    pipeline.acknowledged(sink.waiting, committed=True)
    assert await closing


async def test_chunked_document_when_each_of_its_chunks_fails_then_it_is_one_dead_letter(
    build: Build,
) -> None:
    def fail(items: Sequence[bytes]) -> None:
        raise RuntimeError("no")

    pipeline, sink, _ = build(fail)
    pipeline.processing.task = HashTask(64, "chunk", 1000, pipeline._codec.embedding)
    pipeline.window.max_tokens = 64
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(0, "long " * 400), record(1)])
    await until(lambda: not len(lane) and pipeline.stage.idle)
    assert [out.kind for _, out in sink.sent] == [Kind.DEAD_LETTER] * 2
    assert build.failures == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad_chunk", [0, 3, -1])
async def test_chunked_document_when_one_of_its_chunks_fails_then_its_mates_are_delivered(
    build: Build, bad_chunk: int
) -> None:
    bad: list[bytes] = []

    def fail_on_one(items: Sequence[bytes]) -> None:
        if bad[0] in items:
            raise RuntimeError("no")

    pipeline, sink, _ = build(fail_on_one)
    pipeline.processing.task = HashTask(64, "chunk", 1000, pipeline._codec.embedding)
    text = " ".join(map(str, range(1000)))
    bad.append(pipeline.processing.task.prepare([Document("0", text)])[0].chunks[bad_chunk])  # type: ignore[union-attr]
    pipeline.window.max_tokens = 256
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(0, text), record(1), record(2, text + " and more")])
    await until(lambda: not len(lane) and pipeline.stage.idle)
    assert [slot.offset for slot, out in sink.sent if out.kind is Kind.DEAD_LETTER][:1] == [0]
    assert sink.sent[1][1].kind is Kind.RESULT
    assert build.failures == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", ["poison", "long " * 400], ids=["whole", "chunked"])
async def test_model_when_it_gives_numbers_that_are_not_finite_then_only_that_document_is_a_dead_letter(
    build: Build, text: str, number: float
) -> None:
    pipeline, sink, runner = build()
    pipeline.processing.task = task = HashTask(64, "chunk", 1000, pipeline._codec.embedding)
    bad = task.prepare([Document("0", text)])[0].chunks[-1]  # type: ignore[union-attr]
    healthy = runner.run

    def spoil(items: Sequence[Any]) -> np.ndarray:
        rows = healthy(items)
        rows[[item == bad for item in items], 2] = number
        return rows

    runner.run = spoil  # type: ignore[method-assign]
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n, text if n == 4 else None) for n in range(8)])
    await until(lambda: not len(lane))
    dead = [(slot.offset, dict(out.headers)) for slot, out in sink.sent if out.kind is Kind.DEAD_LETTER]
    assert [offset for offset, _ in dead] == [4] and len(sink.sent) == 8
    assert dead[0][1]["inferstream.error.reason"] == b"model_error"


async def test_device_when_it_gives_too_few_rows_then_each_document_is_a_dead_letter(build: Build) -> None:
    pipeline, sink, runner = build()
    runner.run = lambda items: np.zeros((0, 8), np.float32)  # type: ignore[method-assign]
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(5)])
    await until(lambda: not len(lane))
    assert [out.kind for _, out in sink.sent] == [Kind.DEAD_LETTER] * 5


async def test_device_when_it_asks_to_exit_then_it_is_an_error_like_any_other(build: Build) -> None:
    def leave(items: Sequence[bytes]) -> None:
        raise SystemExit(0)

    pipeline, sink, _ = build(leave)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(0)])
    await until(lambda: not len(lane))
    assert [out.kind for _, out in sink.sent] == [Kind.DEAD_LETTER]


@pytest.mark.parametrize("method", ["_prepared", "batch_done", "_finished", "slot_freed"])
async def test_callback_when_it_raises_then_the_process_is_told(
    build: Build, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(self: Pipeline, *arguments: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Pipeline, method, broken)
    pipeline, _, _ = build()
    pipeline.admit(open_lane(pipeline), [record(0)])
    await until(lambda: bool(build.failures))  # type: ignore[attr-defined]
    assert isinstance(build.failures[0], KeyError)  # type: ignore[attr-defined]


async def test_worker_thread_when_it_is_told_to_exit_then_the_process_does_not_exit_0(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(self: Codec, document: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(Codec, "decode", leave)
    pipeline, _, _ = build()
    pipeline.admit(open_lane(pipeline), [record(0)])
    await until(lambda: bool(build.failures))  # type: ignore[attr-defined]
    assert isinstance(build.failures[0], RuntimeError)  # type: ignore[attr-defined]


async def test_closing_when_the_lanes_are_dropped_meanwhile_then_it_ends_at_once(build: Build) -> None:
    pipeline, sink, _ = build()
    sink.automatic = False
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(0)])
    closing = asyncio.create_task(pipeline.close_lanes([lane], 60.0))
    await asyncio.sleep(0.05)
    pipeline.drop_lanes([lane])
    async with asyncio.timeout(5):
        await closing


async def test_record_when_decoding_it_raises_then_only_that_one_is_a_dead_letter(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, sink, _ = build()
    decode = pipeline._codec.decode

    def raise_on_seven(record: Any) -> Any:
        if record.offset == 7:
            raise RecursionError("nobody foresaw this")
        return decode(record)

    monkeypatch.setattr(pipeline._codec, "decode", raise_on_seven)
    lane = open_lane(pipeline)
    pipeline.admit(lane, [record(n) for n in range(20)])
    await until(lambda: not len(lane))
    assert [slot.offset for slot, out in sink.sent if out.kind is Kind.DEAD_LETTER] == [7]
