"""The watch: once a second, on the event loop, it brings health and gauges up to date.

Gauges are set here and not at the scrape, because lanes and queues belong to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from inferstream.device.peaks import Peak
from inferstream.settings.machine import memory_limit
from inferstream.telemetry.health import Health
from inferstream.telemetry.metrics import Metrics
from inferstream.telemetry.recent import Growth, Limits
from inferstream.version import version
from inferstream.workers import FINISH, PREPARE

log = logging.getLogger(__name__)

BEAT_S = 1.0


class Watch:
    """Listens to the source, and reads the parts it was told to follow."""

    def __init__(self, health: Health, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics
        self._parts: tuple[Any, Any, Any] | None = None
        self._peak: Peak | None = None
        self._growth = Growth()
        self._limits = Limits()
        others = {name: _version(name) for name in ("aiokafka", "torch", "transformers")}
        metrics.build(inferstream=version(), **others)
        if (limit := memory_limit()) is not None:
            metrics.memory_limit_bytes.set(limit)

    def follow(self, pipeline: Any, source: Any, sink: Any, peak: Peak | None = None) -> None:
        """From now on report on these: a Pipeline, a Source and a Sink; ``peak`` is the device's, if it is known."""
        self._parts = (pipeline, source, sink)
        self._peak = peak
        metrics, stage, workers = self._metrics, pipeline.stage, pipeline.workers
        metrics.buffer_limit_bytes.set(pipeline.credit.max_bytes)
        metrics.device_lanes.set(stage.lanes)

        def count() -> None:
            metrics.device(stage.usage.busy_s, stage.usage.idle_s, stage.flops)
            metrics.workers(pipeline.prepared_tokens, workers.cpu_s[PREPARE], workers.cpu_s[FINISH])

        metrics.observe(count)

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            due = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._metrics.event_loop_lag(max(0.0, time.monotonic() - due))
            try:
                self.beat()
            except Exception:  # a gauge is no reason to stop the heartbeat
                log.exception("reading the gauges failed")

    def beat(self) -> None:
        """Read everything once."""
        self._health.beat()
        self._metrics.draining.set(self._health.draining)
        if self._parts is None:
            return
        pipeline, source, sink = self._parts
        metrics = self._metrics
        self._health.device_busy_since = pipeline.stage.busy_since()
        credit = pipeline.credit
        metrics.buffer_bytes.set(credit.bytes)
        metrics.credit_records.set(credit.max_records())
        metrics.blocked_documents.set(pipeline.blocked_documents)
        fills = {
            "buffer": credit.documents / credit.max_documents,
            "prepare": pipeline.unprepared / credit.max_documents,
            "window": min(1.0, pipeline.window.tokens / credit.max_tokens),
            "device": pipeline.stage.fill_ratio,
            "finish": min(1.0, pipeline.finishing / credit.max_documents),
            "publish": sink.queued / credit.max_documents,
            "commit": min(1.0, pipeline.uncommitted / pipeline.max_uncommitted),
        }
        for stage, ratio in fills.items():
            metrics.stage_fill_ratio.labels(stage).set(ratio)
        lags, lanes = source.lags(), source.lanes
        metrics.lags(lags)
        metrics.assigned_partitions.set(len(lanes))
        now = time.monotonic()
        self._read_device(now, pipeline.stage)
        unread = [lane for lane in lanes if lags.get((lane.topic, lane.partition), (0, 0))[0]]
        self._limits.judge(now, map(credit.eligible, unread), pipeline.waiting)
        for stage, share in self._limits.shares().items():
            metrics.limiting_stage.labels(stage).set(share)

    def _read_device(self, now: float, stage: Any) -> None:
        """The gauges of the last seconds; a batch counts when it has ended."""
        idle_s = sum(stage.usage.idle_s.values())
        seconds, busy, idle, flops = self._growth.read(now, stage.usage.busy_s, idle_s, stage.flops)
        if busy + idle > 0.0:
            self._metrics.device_idle_ratio.set(idle / (busy + idle))
        elif stage.idle:  # else a batch has been at it for longer
            self._metrics.device_idle_ratio.set(math.nan)
        if self._peak is not None and seconds > 0.0:
            peak = self._peak
            self._metrics.flops_utilisation(peak.device, peak.dtype, flops / (seconds * peak.flops))

    # ---- what the source tells

    def assigned(self, lanes: Sequence[Any]) -> None:
        self._metrics.rebalanced()
        self._metrics.assigned_partitions.set(len(lanes))

    def revoked(self, lanes: Sequence[Any]) -> None:
        self._metrics.assigned_partitions.set(0)
        for lane in lanes:
            self._metrics.forget_partition(lane.topic, lane.partition)

    def commit_ended(self, outcome: str) -> None:
        self._metrics.committed(outcome)

    def lost(self, topic: str, count: int) -> None:
        self._metrics.records_lost(topic, count)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a missing package is told by whoever needs it
        return "unknown"
