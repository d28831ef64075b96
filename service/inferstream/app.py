"""The life of a worker: build, start, run, drain, and the exit code it ends with.

The model is loaded and warm before the group is joined, so that a rebalance never waits for it.  One task per
duty; the first that fails ends the process with its error.  SIGTERM and the first Ctrl-C drain; the second
Ctrl-C ends at once with 130.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer

from inferstream.codec import Codec
from inferstream.errors import DeadLetterRefused, DrainTimeout, InferstreamError, KafkaRefused
from inferstream.kafka.connection import client_options, start_with_retry
from inferstream.kafka.last_result import warn_of_another_model
from inferstream.kafka.preflight import Cluster, inspect
from inferstream.kafka.sink import BATCH_BYTES, OutputTopic, Sink
from inferstream.kafka.source import Source
from inferstream.kafka.transactions import Transactions, end_predecessor
from inferstream.kafka.txn_protocol import TransactionalProducer
from inferstream.models.loading import Loaded, load
from inferstream.pipeline import Pipeline
from inferstream.settings import Settings
from inferstream.telemetry.health import Health, HealthServer
from inferstream.telemetry.metrics import Metrics
from inferstream.telemetry.timeline import Timeline, TraceFile
from inferstream.telemetry.watch import Watch
from inferstream.watchdog import Watchdog

log = logging.getLogger(__name__)
T = TypeVar("T")

GC_THRESHOLDS = (100_000, 20, 100)
SWITCH_INTERVAL_S = 0.0005
"""How long a thread that wants the interpreter's lock waits before it is given it.

The event loop and the threads that launch work on the device let go of it at every system call and operator.  Beside
a thread that runs Python, with the 5 ms of Python's default, each of these would cost up to 5 ms.
"""
STOP_TIMEOUT_S = 5.0  # for leaving the group, stopping the producer and ending threads, each


@dataclass(frozen=True, slots=True)
class Worker:
    """The parts of a running worker, as benchmarks and tests may want to look at them."""

    settings: Settings
    pipeline: Pipeline
    source: Source
    metrics: Metrics


async def run(
    settings: Settings,
    *,
    embedded: bool = False,
    load_model: Callable[[Settings, Callable[..., dict[str, Any]]], Loaded] = load,
    started: Callable[[Worker], Awaitable[None] | None] | None = None,
    stop: asyncio.Event | None = None,
    trace: Path | None = None,
) -> None:
    """Run one worker until it is told to stop; raises InferstreamError with the exit code.

    ``settings`` are resolved.  ``load_model`` and ``started`` are there for benchmarks, which bring their own
    device; ``stop`` ends the worker as SIGTERM does.  ``trace`` is the file for a trace of the stages.
    """
    recording = TraceFile(trace) if trace is not None else None
    stopping = stop or asyncio.Event()
    _handle_signals(stopping)
    metrics = Metrics()
    health = Health(device_hang_timeout_s=settings.device.hang_timeout_s)
    server = HealthServer(settings.telemetry.host, settings.telemetry.port, metrics, health)
    server.start()
    watch = Watch(health, metrics)
    beat = asyncio.create_task(watch.run(), name="heartbeat")
    try:
        timeline = Timeline(metrics.stage_seconds, recording)
        await _run(settings, embedded, load_model, started, stopping, metrics, timeline, health, watch)
    finally:
        if recording is not None:
            recording.close()
        beat.cancel()
        server.stop()


async def _run(
    settings: Settings,
    embedded: bool,
    load_model: Callable[[Settings, Callable[..., dict[str, Any]]], Loaded],
    started: Callable[[Worker], Awaitable[None] | None] | None,
    stopping: asyncio.Event,
    metrics: Metrics,
    timeline: Timeline,
    health: Health,
    watch: Watch,
) -> None:
    looking = start_with_retry(
        settings.kafka, lambda: inspect(settings, embedded=embedded), settings.kafka.connect_timeout_s
    )
    cluster = await _unless(stopping, looking)
    if cluster is None:
        return
    exactly_once = settings.delivery.guarantee == "exactly-once"
    if exactly_once:
        # Before the model loads: until then, what a predecessor left open holds its readers back.
        ending = start_with_retry(
            settings.kafka,
            lambda: end_predecessor(lambda: transactional_producer(settings)),
            settings.kafka.connect_timeout_s,
        )
        await _unless(stopping, ending)
        if stopping.is_set():
            return
    codec = Codec.from_settings(settings, result_limit=cluster.output_limit)
    loaded = await _unless(stopping, _in_thread(lambda: load_model(settings, codec.embedding)))
    if loaded is None:
        return
    metrics.model(loaded.info, execution=loaded.execution)
    _calm_the_garbage_collector()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    health.warm = True
    log.info("the model is warm", extra={"model": loaded.info.id, "revision": loaded.info.revision})

    await _unless(stopping, warn_of_another_model(settings, cluster.output_partitions, loaded.info))
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def failed(error: BaseException) -> None:
        if not failure.done():
            failure.set_exception(error)

    flops_of = loaded.flops.of if loaded.flops is not None else None
    pipeline = Pipeline(settings, codec, loaded.task, loaded.device, metrics, timeline, failed, flops_of)
    source = Source(settings, pipeline, watch, timeline)
    sink: Sink
    if exactly_once:
        sink = source.settler = make_transactions(settings, cluster, pipeline, failed, timeline, source)
    else:
        sink = make_sink(settings, cluster, pipeline, failed, timeline)
    pipeline.sink = sink
    watch.follow(pipeline, source, sink, loaded.peak)
    duties: list[asyncio.Future[Any]] = [failure, source.failures()]
    clean = True
    try:
        for part in (source, sink):
            await _unless(
                stopping, start_with_retry(settings.kafka, part.start, settings.kafka.connect_timeout_s)
            )
        if stopping.is_set():
            return
        source.subscribe()
        watchdog = Watchdog(settings, source, sink, pipeline)
        duties += [
            asyncio.create_task(source.run(), name="poll"),
            asyncio.create_task(_settle(source, pipeline, settings), name="settle"),
            asyncio.create_task(watchdog.run(), name="watchdog"),
        ]
        if started is not None and (starting := started(Worker(settings, pipeline, source, metrics))):
            await starting
        told = asyncio.create_task(stopping.wait(), name="stop")
        done, _ = await asyncio.wait([*duties, told], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        for duty in done - {told}:
            health.dead_task = duty.get_name() if isinstance(duty, asyncio.Task) else "a worker thread"
            duty.result()  # raises what ends the process
        health.draining = True
        clean = await _drain(source, settings.delivery.drain_timeout_s, duties)
    except BaseException as error:
        if not isinstance(error, asyncio.CancelledError | InferstreamError):
            log.error("the worker ends on an unexpected error", extra={"error": repr(error)})
        if isinstance(error, KafkaRefused | DeadLetterRefused):
            await source.acquit(STOP_TIMEOUT_S)
        raise
    finally:
        health.draining = True
        for duty in duties:
            duty.cancel()
        await asyncio.gather(*duties, return_exceptions=True)
        await source.stop(STOP_TIMEOUT_S)
        await sink.stop(STOP_TIMEOUT_S)
        pipeline.close(STOP_TIMEOUT_S)
    if not clean:
        raise DrainTimeout(
            f"the drain passed delivery.drain_timeout_s={settings.delivery.drain_timeout_s:g}; "
            "what was not acknowledged is not committed and will be read again"
        )
    log.info("drained")


def _calm_the_garbage_collector() -> None:
    """Thousands of documents in flight are live objects that every full collection would walk through.

    What is loaded by now stays for good and is left out; what a document needs is freed by reference counts,
    so collections are only for rare cycles (errors with their tracebacks) and may be rare themselves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def make_sink(
    settings: Settings,
    cluster: Cluster,
    pipeline: Pipeline,
    failed: Callable[[BaseException], None],
    timeline: Timeline,
) -> Sink:
    output, dead_letters = _targets(settings, cluster)
    return Sink(
        lambda: AIOKafkaProducer(**_producer_options(settings)),
        output,
        dead_letters,
        cluster.input_partitions,
        pipeline,
        failed,
        timeline,
    )


def make_transactions(
    settings: Settings,
    cluster: Cluster,
    pipeline: Pipeline,
    failed: Callable[[BaseException], None],
    timeline: Timeline,
    source: Source,
) -> Transactions:
    output, dead_letters = _targets(settings, cluster)
    return Transactions(
        settings,
        lambda: transactional_producer(settings),
        output,
        dead_letters,
        cluster.input_partitions,
        pipeline,
        failed,
        timeline,
        source.consumer,
    )


def transactional_producer(settings: Settings) -> TransactionalProducer:
    assert settings.kafka.transactional_id is not None  # derived where it is not set
    return TransactionalProducer(
        settings.kafka.transactional_id,
        transaction_timeout_ms=settings.delivery.transaction_timeout_ms,
        **_producer_options(settings),
    )


def _producer_options(settings: Settings) -> dict[str, Any]:
    return {
        **client_options(settings.kafka),
        "enable_idempotence": True,  # a retry cannot write twice or out of order
        "acks": "all",
        "linger_ms": 0,  # batches come closed; waiting would only add latency
        "max_batch_size": BATCH_BYTES,
        "compression_type": None if settings.output.compression == "none" else settings.output.compression,
    }


def _targets(settings: Settings, cluster: Cluster) -> tuple[OutputTopic, OutputTopic]:
    return (
        OutputTopic(settings.output.topic, cluster.output_partitions, cluster.output_limit),
        OutputTopic(settings.dead_letter.topic, cluster.dead_letter_partitions, cluster.dead_letter_limit),
    )


async def _settle(source: Source, pipeline: Pipeline, settings: Settings) -> None:
    """Commit on every tick, and earlier when half of what may be uncommitted is."""
    interval_s = settings.delivery.commit_interval_ms / 1000
    while True:
        try:
            async with asyncio.timeout(interval_s):
                await pipeline.commit_due.wait()
        except TimeoutError:
            pass
        pipeline.commit_due.clear()
        if not await source.settle():
            await asyncio.sleep(min(interval_s, 0.5))  # a commit that fails at once must not spin
            pipeline.commit_due.set()  # release may be waiting for it


async def _drain(source: Source, timeout_s: float, duties: list[asyncio.Future[Any]]) -> bool:
    """True when it ended in time; raises what a duty raises meanwhile."""
    log.info("draining", extra={"timeout_s": timeout_s})
    started = time.monotonic()
    drain = asyncio.create_task(source.drain(timeout_s), name="drain")
    waiting = {drain, *duties}
    while not drain.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if failed := [duty for duty in done - {drain} if duty.exception() is not None]:
            drain.cancel()
            failed[0].result()
    return drain.result() and time.monotonic() - started <= timeout_s


async def _unless(stopping: asyncio.Event, work: Awaitable[T]) -> T | None:
    """The work's result, or None when the process is told to stop before it is there."""
    task = asyncio.ensure_future(work)
    told = asyncio.create_task(stopping.wait())
    await asyncio.wait([task, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait([task], timeout=1.0)  # it closes its connections
    return None


async def _in_thread(work: Callable[[], T]) -> T:
    """Like ``asyncio.to_thread``, but in a daemon thread: a stop during a long load need not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # T may itself be None

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(deliver, None, error)
        else:
            loop.call_soon_threadsafe(deliver, result, None)

    threading.Thread(target=run, name="load-model", daemon=True).start()
    return await future


def _handle_signals(stopping: asyncio.Event) -> None:
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupted() -> None:
        if stopping.is_set():
            sys.stderr.flush()
            os._exit(130)
        stopping.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
