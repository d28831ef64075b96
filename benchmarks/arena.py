"""Where contestants meet: a broker, topics, a backlog that appears all at once, and one clock for everybody.

The backlog is published in a transaction while the contestants, warm and assigned, wait at the end of an empty
topic; all read with ``read_committed``, so it appears to them at the commit.  A round is timed from that commit
to the append of the last result, in the broker's time (LogAppendTime topics).  So neither loading a model nor
publishing is part of any measurement, and nobody is asked for their own numbers.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.documents import Corpus, records
from benchmarks.machine import cpu_seconds
from benchmarks.report import number, table
from tests.support.broker import Broker, BrokerUnavailable, NativeKafka, create_broker
from tests.support.client import unique
from tests.support.processes import kill_group, spawn
from tests.support.worker import Worker, merged, write_config

PARTITIONS = 8
ROUND_S = 600.0  # a contestant that has not answered everything by then has failed
READY_S = 180.0
SETTLE_S = 1.0  # after the last one is ready, before the first round
LOOK_S = 0.05  # how often the end of a round is looked for; its time is the broker's, not ours
APPEND_TIME = {"message.timestamp.type": "LogAppendTime"}
DEAD_LETTERS = {**APPEND_TIME, "max.message.bytes": str(2 * 2**20)}  # room for headers: the worker insists
BATCH_BYTES = 256 * 1024

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Round:
    """One backlog answered; times in seconds, CPU times of the whole process."""

    documents: int
    seconds: float
    worker_cpu_s: float
    broker_cpu_s: float

    @property
    def rate(self) -> float:
        return self.documents / self.seconds


def rounds_table(title: str, rounds: Mapping[str, Sequence[Round]]) -> str:
    """The Markdown table of contestants: medians of their rounds, CPU times in microseconds per document."""
    rows = [
        [
            name,
            number(statistics.median(r.rate for r in done)),
            f"{number(min(r.rate for r in done))} – {number(max(r.rate for r in done))}",
            number(statistics.median(r.worker_cpu_s / r.documents for r in done) * 1e6),
            number(statistics.median(r.broker_cpu_s / r.documents for r in done) * 1e6),
        ]
        for name, done in rounds.items()
    ]
    head = [title, "documents/s", "lowest – highest", "its CPU µs/document", "broker's CPU µs/document"]
    return table(head, rows)


@dataclass(frozen=True, slots=True)
class Topics:
    """What one contestant reads and writes; nobody else does."""

    source: str
    target: str
    group: str


class Arena:
    """One broker for all benchmarks.  ``publisher_cpu_s`` is the CPU time that publishing took so far."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder = folder
        self.corpus = corpus
        self.publisher_cpu_s = 0.0
        self.published = 0
        self.broker: Broker = NativeKafka(folder / "kafka")

    def start(self) -> None:
        try:
            self.broker.start()
        except BrokerUnavailable:
            self.broker = create_broker(self.folder / "kafka-2")

    def stop(self) -> None:
        self.broker.remove()

    @property
    def bootstrap(self) -> str:
        return self.broker.bootstrap

    def broker_cpu_s(self) -> float:
        """The broker's CPU time so far; nan where it runs in a container."""
        process: subprocess.Popen[bytes] | None = getattr(self.broker, "_process", None)
        return cpu_seconds(process.pid) if process is not None else float("nan")

    def config(self, topics: Topics, changes: Mapping[str, Any]) -> Path:
        """The settings file of a worker between these topics: the defaults, with ``changes`` laid over them."""
        tree = {
            "kafka": {"bootstrap_servers": [self.bootstrap], "group_id": topics.group},
            "input": {"topics": [topics.source]},
            "output": {"topic": topics.target},
            "telemetry": {"port": 0},
        }
        return write_config(self.folder / topics.group, merged(tree, changes))

    def texts_file(self) -> Path:
        """The documents, for the processes that take them from memory."""
        path = self.folder / "texts.json"
        path.write_text(json.dumps(self.corpus.texts))
        return path

    async def topics(self, name: str) -> Topics:
        source, target = unique(f"{name}-in"), unique(f"{name}-out")
        for topic in (source, target):
            await self.broker.create_topic(topic, PARTITIONS, APPEND_TIME)
        await self.broker.create_topic(f"{target}.dead-letters", PARTITIONS, DEAD_LETTERS)
        return Topics(source, target, unique(name))

    async def backlog(self, topic: str, texts: Sequence[str]) -> float:
        """Publish the texts so that all appear at once; returns the time of that, in seconds since the epoch."""
        started = time.process_time()
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap,
            transactional_id=unique("backlog"),
            linger_ms=0,
            max_batch_size=2 * BATCH_BYTES,
        )
        await producer.start()
        try:
            async with producer.transaction():
                sent = [
                    await producer.send_batch(batch, topic, partition=partition)
                    for partition, batch in _batches(producer, texts)
                ]
                await asyncio.gather(*sent)
                self.publisher_cpu_s += time.process_time() - started
                self.published += len(texts)
                await asyncio.sleep(0.2)
                appeared = time.time()
        finally:
            await producer.stop()
        return appeared

    async def round(self, contestant: Contestant, texts: Sequence[str]) -> Round:
        """Give the contestant a backlog and wait until every document of it is answered."""
        topics = contestant.topics
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap, enable_auto_commit=False)
        await consumer.start()
        try:
            targets = [topics.target, f"{topics.target}.dead-letters"]
            partitions = [TopicPartition(topic, n) for topic in targets for n in range(PARTITIONS)]
            consumer.assign(partitions)
            before = sum((await consumer.end_offsets(partitions)).values())
            appeared = await self.backlog(topics.source, texts)
            worker, broker = cpu_seconds(contestant.pid), self.broker_cpu_s()
            deadline = time.monotonic() + ROUND_S
            while True:
                ends = await consumer.end_offsets(partitions)
                if sum(ends.values()) - before >= len(texts):
                    break
                contestant.check()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{contestant.name} did not answer {len(texts)} documents in {ROUND_S:.0f} s"
                    )
                await asyncio.sleep(LOOK_S)
            worker, broker = cpu_seconds(contestant.pid) - worker, self.broker_cpu_s() - broker
            last = await _last_append(consumer, ends)
        finally:
            await consumer.stop()
        return Round(len(texts), last - appeared, worker, broker)


def _batches(producer: AIOKafkaProducer, texts: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(partition, closed batch) of all texts; document n goes to partition n mod PARTITIONS."""
    everything = records(list(texts))
    for partition in range(PARTITIONS):
        batch, size = producer.create_batch(), 0
        for key, value in everything[partition::PARTITIONS]:
            if size + len(value) > BATCH_BYTES:
                batch.close()
                yield partition, batch
                batch, size = producer.create_batch(), 0
            batch.append(timestamp=None, key=key, value=value)
            size += len(key) + len(value) + 32
        batch.close()
        yield partition, batch


async def _last_append(consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]) -> float:
    """The append time of the newest record, in seconds since the epoch."""
    waiting = {partition for partition, end in ends.items() if end}
    consumer.assign(list(waiting))
    for partition in waiting:
        consumer.seek(partition, ends[partition] - 1)
    newest = 0
    while waiting:
        for partition, found in (await consumer.getmany(*waiting, timeout_ms=200)).items():
            newest = max(newest, *(record.timestamp for record in found))
            waiting.discard(partition)
    return newest / 1000


class Contestant:
    """Something that answers what is in its input topic, in a process of its own."""

    def __init__(self, name: str, topics: Topics) -> None:
        self.name = name
        self.topics = topics

    @property
    def pid(self) -> int:
        raise NotImplementedError

    def check(self) -> None:
        """Raise if the process has ended."""

    async def ready(self, arena: Arena) -> None:
        """Wait until it is warm and assigned."""
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class Ours(Contestant):
    """``python -m inferstream run``, as in production."""

    def __init__(
        self,
        arena: Arena,
        name: str,
        topics: Topics,
        changes: Mapping[str, Any],
        flags: Sequence[str] = (),
    ) -> None:
        super().__init__(name, topics)
        self.worker = Worker(arena.folder / topics.group, arena.config(topics, changes), flags=flags)
        self.worker.start()

    @property
    def pid(self) -> int:
        return self.worker.pid

    def check(self) -> None:
        if (code := self.worker.returncode) is not None:
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.worker.stderr_text()[-3000:]}")

    async def ready(self, arena: Arena) -> None:
        await _polling(arena, self)

    def stop(self) -> None:
        if self.worker.returncode is None:
            self.worker.terminate()
            self.worker.wait()


class Script(Contestant):
    """``python -m benchmarks.MODULE OPTIONS``; it prints a line of JSON when it is ready.

    ``python`` is the interpreter, where it is not this one's.
    """

    def __init__(
        self,
        arena: Arena,
        name: str,
        topics: Topics,
        module: str,
        options: Mapping[str, Any],
        python: Path | None = None,
    ) -> None:
        super().__init__(name, topics)
        options = {"bootstrap": arena.bootstrap, **asdict(topics), **options}
        self.child = Child(arena.folder / topics.group, module, options, python)

    @property
    def pid(self) -> int:
        return self.child.pid

    def check(self) -> None:
        self.child.check()

    async def ready(self, arena: Arena) -> None:
        await self.child.answer(READY_S)

    async def asked(self) -> dict[str, Any]:
        """What it says for a SIGUSR1."""
        self.child.send(signal.SIGUSR1)
        return await self.child.answer(READY_S)

    def stop(self) -> None:
        self.child.kill()


class Watched(Script):
    """A worker with a look inside: :mod:`benchmarks.worker`.  ``options`` are that module's."""

    def __init__(
        self,
        arena: Arena,
        name: str,
        topics: Topics,
        changes: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._dials = arena.folder / topics.group / "dials.json"
        files = {"config": str(arena.config(topics, changes)), "dials": str(self._dials)}
        super().__init__(arena, name, topics, "worker", {**files, **(options or {})})

    async def ready(self, arena: Arena) -> None:
        await _polling(arena, self)

    async def mark(self, **dials: float) -> dict[str, Any]:
        """What it saw since the last mark, which no longer counts.

        From now on the paced device does ``tokens_per_s``, and threads wait ``switch_interval_s`` for the interpreter's
        lock, where these are given.
        """
        self._dials.write_text(json.dumps(dials))
        return await self.asked()

    async def seen(self) -> dict[str, Any]:
        """What it saw since the mark; it drains and ends."""
        self.child.send(signal.SIGUSR2)
        return await self.child.answer(READY_S)


async def _polling(arena: Arena, worker: Contestant) -> None:
    """Wait until a worker of ours polls: it commits its start offsets, and then opens the gate."""
    deadline = time.monotonic() + READY_S
    while len(await arena.broker.committed(worker.topics.group, worker.topics.source)) < PARTITIONS:
        worker.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{worker.name} is not ready after {READY_S:.0f} s")
        await asyncio.sleep(0.2)


class Child:
    """A module of this package in a process of its own, which answers in lines of JSON on its stdout."""

    def __init__(
        self,
        folder: Path,
        module: str,
        arguments: Mapping[str, Any],
        python: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._module = module
        self._stdout = folder / "stdout.log"
        self._stderr = folder / "stderr.log"
        self._answers = 0
        path = os.pathsep.join([str(ROOT), str(ROOT / "service")])
        self._process = spawn(
            [str(python or sys.executable), "-m", f"benchmarks.{module}", json.dumps(dict(arguments))],
            self._stderr,
            {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            self._stdout,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"{self._module} ended with {code}:\n{self._stderr.read_text()[-3000:]}")

    async def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line it prints."""
        deadline = time.monotonic() + timeout_s
        while True:
            lines = self._stdout.read_text().splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]
            if len(complete) > self._answers:
                self._answers += 1
                return dict(json.loads(complete[self._answers - 1]))
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._module} said nothing for {timeout_s:.0f} s")
            await asyncio.sleep(LOOK_S)

    def send(self, signal_number: int) -> None:
        self._process.send_signal(signal_number)

    def kill(self) -> None:
        kill_group(self._process)
