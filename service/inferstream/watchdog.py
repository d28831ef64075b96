"""The watchdog: ends the process when it looks alive and is not.

aiokafka's background tasks can die without anybody being told: ``getmany`` then returns nothing for ever, or
the metadata are never refreshed.  A batch can hang on the device.  The event loop can be blocked, which only
a thread can see.  Each of these ends the process with exit code 8, uncommitted, so that the orchestrator
restarts it; a broker outage, a rebalance, an empty topic and a full buffer do not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from inferstream.errors import KafkaRefused, NoProgress
from inferstream.kafka.handshake import refused_login
from inferstream.kafka.security import credentials_of
from inferstream.kafka.sink import Sink
from inferstream.kafka.source import Source
from inferstream.pipeline import Pipeline
from inferstream.settings import Settings

log = logging.getLogger(__name__)

CHECK_S = 5.0
NO_PROGRESS_S = 60.0
REFUSED_FOR_S = 60.0  # a password that is being changed may be refused for a while
LOOP_BLOCKED_S = 90.0  # beyond the session timeout the group has gone on without us anyway


class Watchdog:
    """Raises NoProgress out of :meth:`run`; a blocked loop is ended by a thread."""

    def __init__(self, settings: Settings, source: Source, sink: Sink, pipeline: Pipeline) -> None:
        self._kafka = settings.kafka
        self._hang_timeout_s = settings.device.hang_timeout_s
        self._source = source
        self._sink = sink
        self._pipeline = pipeline
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._waiting_since: float | None = None
        self._hanging_since: float | None = None

    async def run(self) -> None:
        """Check until cancelled."""
        threading.Thread(target=self._watch_loop, name="watchdog", daemon=True).start()
        try:
            while True:
                self._beat = time.monotonic()
                for name, task in self._background_tasks():
                    if task.done():
                        error = None if task.cancelled() else task.exception()
                        raise NoProgress(
                            f"the Kafka client's {name} task has died ({error!r}); restarting is the cure"
                        )
                self._brokers_take_us()
                self._device_moves()
                await self._records_move()
                await asyncio.sleep(CHECK_S)
        finally:
            self._ended.set()

    def _background_tasks(self) -> Iterator[tuple[str, asyncio.Task[None]]]:
        consumer, producer = self._source.consumer, self._sink.producer
        owners = [
            ("consumer fetch", consumer._fetcher, "_fetch_task"),
            ("consumer coordination", consumer._coordinator, "_coordination_task"),
            ("consumer metadata", consumer._client, "_sync_task"),
        ]
        if self._sink.producing.is_set():
            owners += [
                ("producer sender", producer._sender, "_sender_task"),
                ("producer metadata", producer.client, "_sync_task"),
            ]
        for name, owner, attribute in owners:
            task = getattr(owner, attribute, None)
            if task is not None:
                yield name, task

    def _brokers_take_us(self) -> None:
        """Connections that are refused are tried again, for ever, by a client that tells nobody."""
        found = credentials_of(self._kafka.security).refused_for(REFUSED_FOR_S)
        if found is not None:
            host, error = found
            raise KafkaRefused(f"for {REFUSED_FOR_S:.0f} s: {refused_login(self._kafka, host, error)}")

    def _device_moves(self) -> None:
        since = self._pipeline.stage.busy_since()
        if since is None or time.monotonic() - since <= self._hang_timeout_s:
            self._hanging_since = None
        elif self._hanging_since != since:
            self._hanging_since = since  # seen twice: a process that was stopped hears of its batches late
        else:
            raise NoProgress(
                f"a batch has been on the device for more than device.hang_timeout_s={self._hang_timeout_s:g}"
            )

    async def _records_move(self) -> None:
        """Judged only when records wait to be read: there is credit, the broker answers, and nothing holds them back.

        A rebalance does, and so does one document that has to end before the next is read.
        """
        now = time.monotonic()
        lanes = self._source.lanes
        eligible, limit = self._pipeline.credit.poll_limit(lanes) if lanes else ((), 0)
        if self._source.rebalancing or self._source.cautious or not eligible or limit <= 0:
            self._waiting_since = None
            return
        if now - self._source.last_admitted < NO_PROGRESS_S:
            self._waiting_since = None
            return
        partitions = [TopicPartition(lane.topic, lane.partition) for lane in eligible]
        try:
            async with asyncio.timeout(CHECK_S):
                ends = await self._source.consumer.end_offsets(partitions)
        except (TimeoutError, KafkaError):
            self._waiting_since = None
            return
        waiting = [
            lane for lane in eligible if ends[TopicPartition(lane.topic, lane.partition)] > lane.position
        ]
        if not waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > NO_PROGRESS_S:
            lane = waiting[0]
            raise NoProgress(
                f"{lane.topic}:{lane.partition} has records after offset {lane.position}, there is credit and the "
                f"broker answers, but nothing has been read for {now - self._source.last_admitted:.0f} s"
            )

    def _watch_loop(self) -> None:
        # Counted in checks and not by the clock: a process that was stopped as a whole was not blocked.
        beat, blocked_s = self._beat, 0.0
        while not self._ended.wait(CHECK_S):
            blocked_s = blocked_s + CHECK_S if beat == self._beat else 0.0
            beat = self._beat
            if blocked_s > LOOP_BLOCKED_S:
                # Nothing on the loop can run, so nothing can be drained: say why and go.
                print(
                    f"inferstream: error: the event loop has been blocked for {blocked_s:.0f} s",
                    file=sys.stderr,
                )
                sys.stderr.flush()
                os._exit(NoProgress.exit_code)
