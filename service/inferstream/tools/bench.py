"""The device stage alone: how fast this machine runs a model from text in memory, with no Kafka around it.

The same parts as in the worker (worker threads, window, device stage), fed by a list of texts and bounded by
the same settings, so what a worker loses against it is what Kafka costs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferstream.batching import Item, Window
from inferstream.device import Device
from inferstream.device.stage import DeviceStage
from inferstream.documents import Document, Prepared, Rejected
from inferstream.settings import Settings
from inferstream.tasks import Task
from inferstream.telemetry.timeline import Timeline
from inferstream.workers import FINISH, PREPARE, Workers

CHUNK_DOCUMENTS = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """What one pass over the documents took.

    Times are in seconds; ``*_cpu_s`` is CPU time, ``busy_s`` the device's, summed over its ``lanes``.
    ``padded_tokens`` is what the batches hold as formed, their padding included.
    """

    documents: int
    refused: int
    tokens: int
    padded_tokens: int
    batches: int
    seconds: float
    busy_s: float
    lanes: int
    prepare_cpu_s: float
    finish_cpu_s: float
    loop_cpu_s: float
    process_cpu_s: float

    @property
    def documents_per_s(self) -> float:
        return self.documents / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def padding_efficiency(self) -> float:
        """The share of the tokens in the batches that are not padding."""
        return self.tokens / self.padded_tokens if self.padded_tokens else 1.0

    @property
    def busy_ratio(self) -> float:
        """The share of the time in which the device computed."""
        return self.busy_s / self.lanes / self.seconds

    def cpu_us_per_document(self) -> dict[str, float]:
        """CPU microseconds per document of each stage; ``device`` is all the rest of the process."""
        stages = {"prepare": self.prepare_cpu_s, "finish": self.finish_cpu_s, "event loop": self.loop_cpu_s}
        stages["device"] = max(0.0, self.process_cpu_s - sum(stages.values()))
        return {name: seconds * 1e6 / max(1, self.documents) for name, seconds in stages.items()}


class _Job:
    """A prepared document whose rows arrive chunk by chunk."""

    __slots__ = ("missing", "prepared", "rows")

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.rows: list[Any] = [None] * len(prepared.chunks)
        self.missing = len(self.rows)


class Engine:
    """A warm model with its stages; :meth:`run` may be called again and again, :meth:`close` ends it.

    Belongs to the event loop it was made on.  ``settings`` are resolved.  A worker thread prepares
    ``chunk_documents`` at a time.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        device: Device,
        timeline: Timeline | None = None,
        chunk_documents: int = CHUNK_DOCUMENTS,
    ) -> None:
        assert settings.batch.max_tokens and settings.buffer.max_documents and settings.buffer.max_tokens
        assert settings.prepare.threads
        loop = asyncio.get_running_loop()
        timeline = timeline or Timeline()
        self._loop = loop
        self._task = task
        self._chunk_documents = chunk_documents
        self._budget = settings.batch.max_tokens
        self._max_documents = settings.buffer.max_documents
        self._max_tokens = settings.buffer.max_tokens
        self._ended: asyncio.Future[None] = loop.create_future()
        self._workers = Workers(settings.prepare.threads, loop, self._fail, timeline)
        self._stage = DeviceStage(device, self, loop, timeline)
        budget = min(self._budget, device.max_tokens or self._budget)
        self._window = Window(budget, padded=device.padded, lanes=device.lanes)
        self._texts: Sequence[str] = ()
        self._next = self._held = self._done = self._refused = 0
        self._padded = 0

    async def run(self, texts: Sequence[str]) -> Measured:
        """Take all texts through; raises what a document or the device raised."""
        stage = self._stage
        before = stage.busy_s, stage.tokens, stage.batches, list(self._workers.cpu_s)
        self._texts, self._next, self._held, self._done, self._refused = texts, 0, 0, 0, 0
        self._padded = 0
        self._ended = self._loop.create_future()
        started, process, loop = time.perf_counter(), time.process_time(), time.thread_time()
        self._feed()
        if texts:
            await self._ended
        seconds = time.perf_counter() - started
        process_cpu_s, loop_cpu_s = time.process_time() - process, time.thread_time() - loop
        busy_s, tokens, batches, cpu_s = before
        return Measured(
            documents=self._done - self._refused,
            refused=self._refused,
            tokens=stage.tokens - tokens,
            padded_tokens=self._padded,
            batches=stage.batches - batches,
            seconds=seconds,
            busy_s=stage.busy_s - busy_s,
            lanes=stage.lanes,
            prepare_cpu_s=self._workers.cpu_s[PREPARE] - cpu_s[PREPARE],
            finish_cpu_s=self._workers.cpu_s[FINISH] - cpu_s[FINISH],
            loop_cpu_s=loop_cpu_s,
            process_cpu_s=process_cpu_s,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        self._workers.close(timeout_s)
        self._stage.close(timeout_s)

    # ---- the stages, in the order of the flow

    def _feed(self) -> None:
        """Hand texts to the worker threads as far as the buffer goes."""
        while (
            self._next < len(self._texts)
            and self._held < self._max_documents
            and self._window.tokens < self._max_tokens
        ):
            chunk = self._texts[self._next : self._next + self._chunk_documents]
            documents = [Document(str(self._next + n), text) for n, text in enumerate(chunk)]
            self._next += len(chunk)
            self._held += len(chunk)
            self._workers.submit(PREPARE, self._task.prepare, documents, self._prepared)

    def _prepared(self, answers: list[Prepared | Rejected]) -> None:
        now = time.monotonic()
        for answer in answers:
            if isinstance(answer, Rejected):
                self._refused += 1
                self._leave(1)
                continue
            job = _Job(answer)
            for index, (chunk, length) in enumerate(zip(answer.chunks, answer.lengths, strict=True)):
                self._window.add(Item(job, index, length, now, chunk))
        self._feed()
        self.slot_freed()

    def slot_freed(self) -> None:
        """Form a batch for every free slot; below a budget only when nothing more is on its way."""
        while self._stage.free_slots:
            if (again := self._stage.next_retry()) is not None:
                self._stage.launch(again)
                continue
            if not len(self._window):
                return
            more = self._next < len(self._texts) or len(self._workers)
            if not self._window.full and more and not self._stage.idle:
                return
            items = self._window.form()
            self._padded += self._window.cost(items)
            self._stage.launch(items)

    def batch_done(self, items: Sequence[Item], rows: np.ndarray) -> None:
        finished: list[_Job] = []
        for item, row in zip(items, rows, strict=True):
            job: _Job = item.owner
            job.rows[item.index] = row
            job.missing -= 1
            if not job.missing:
                finished.append(job)
        if finished:
            self._workers.submit(FINISH, self._finish, finished, self._leave)

    def _finish(self, jobs: list[_Job]) -> int:
        """In a worker thread: from rows to outputs."""
        for job in jobs:
            self._task.output(job.prepared, np.stack(job.rows))
        return len(jobs)

    def _leave(self, count: int) -> None:
        self._held -= count
        self._done += count
        if self._done == len(self._texts):
            if not self._ended.done():
                self._ended.set_result(None)
        else:
            self._feed()

    # ---- what ends a measurement

    def item_failed(self, item: Item, error: BaseException) -> None:
        self._fail(error)

    def out_of_memory(self, items: Sequence[Item]) -> None:
        self._window.max_tokens = max(1, self._window.max_tokens // 2)

    def device_failed(self, error: BaseException) -> None:
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
