"""The watch: once a second, on the event loop, it brings health and gauges up to date.

Gauges are set here and not at the scrape, because lanes and queues belong to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from inferstream.telemetry.health import Health
from inferstream.telemetry.metrics import Metrics
from inferstream.version import version

log = logging.getLogger(__name__)

BEAT_S = 1.0


class Watch:
    """Listens to the source, and reads the parts it was told to follow."""

    def __init__(self, health: Health, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics
        self._parts: tuple[Any, Any, Any] | None = None
        others = {name: _version(name) for name in ("aiokafka", "torch", "transformers")}
        metrics.build(inferstream=version(), **others)

    def follow(self, pipeline: Any, source: Any, sink: Any) -> None:
        """From now on report on these: a Pipeline, a Source and a Sink."""
        self._parts = (pipeline, source, sink)
        self._metrics.buffer_limit_bytes.set(pipeline.credit.max_bytes)
        self._metrics.observe(
            lambda: self._metrics.device_busy(pipeline.stage.busy_s, max(1, pipeline.stage.lanes))
        )

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
            "publish": sink.queued / credit.max_documents,
        }
        for stage, ratio in fills.items():
            metrics.stage_fill_ratio.labels(stage).set(ratio)
        metrics.lags(source.lags())
        metrics.assigned_partitions.set(len(source.lanes))

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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a missing package is told by whoever needs it
        return "unknown"
