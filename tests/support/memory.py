"""What a worker's process grows by while something around it stands still or pours: promise 4, in bytes of /proc.

Each case starts a worker in a process of its own in front of a real broker, lets it answer some documents, takes that
resident size for the baseline, and then reports how much more the process held at its peak.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from aiokafka.errors import KafkaError

from inferstream.kafka.sink import BATCH_BYTES
from tests.support.broker import Broker, ContainerKafka, NativeKafka
from tests.support.processes import kill_group, spawn
from tests.support.worker import ROOT, merged, settings, write_config

MIB = 2**20
DEADLINE_S = 90.0
WARM = 200  # small documents that come before the baseline
STILL_S = 1.5  # how long what is stopped stays so, once the worker has taken all it takes
STEADY_S = 1.0  # unchanged for so long: it has
CONSTANT = 16 * MIB
"""What a process may grow by beside its bound: docs/delivery.md says what is in it."""

# Small, so that what is not bounded by them shows.
BOUNDS = {
    "kafka": {
        "fetch_max_bytes": 4 * MIB,
        "max_partition_fetch_bytes": MIB,
        "session_timeout_ms": 10_000,
        "request_timeout_ms": 70_000,
    },
    "buffer": {"max_bytes": 16 * MIB, "max_tokens": 1 << 26},  # bytes are what runs out first
    "model": {"id": "builtin:hash"},
}


@dataclass(frozen=True, slots=True)
class Growth:
    """A case as it came out, in bytes: ``bound`` by the settings, ``growth`` of the process over ``baseline``."""

    case: str
    bound: int
    baseline: int
    growth: int

    @property
    def within(self) -> bool:
        return self.growth <= self.bound + CONSTANT


def bound(tree: dict[str, Any], partitions: int, output_partitions: int, nodes: int = 1) -> int:
    """The bytes that the settings allow for documents, whatever happens."""
    kafka, buffer = tree["kafka"], tree["buffer"]
    return int(
        buffer["max_bytes"]
        + partitions * kafka["max_partition_fetch_bytes"]
        + 3 * nodes * kafka["fetch_max_bytes"]
        + output_partitions * 2 * BATCH_BYTES
    )


class Subject:
    """The worker that is measured, with a device that can be held, and its topics."""

    def __init__(self, broker: Broker, folder: Path, partitions: int, document_s: float) -> None:
        self.broker = broker
        self.partitions = partitions
        self.folder = folder
        self.hold = folder / "hold"
        self._document_s = document_s
        self._log = folder / "stderr.log"
        self.baseline = 0

    async def make_topics(self, changes: dict[str, Any]) -> None:
        """Make the topics, and the settings that go with them."""
        broker = self.broker
        name = broker.unique("bounded")
        self.source = await broker.create_topic(f"{name}-in", self.partitions)
        self.target = await broker.create_topic(f"{name}-out", self.partitions)
        await broker.create_topic(f"{name}-out.dead-letters", 1, {"max.message.bytes": str(2 * MIB)})
        self._group = name
        self.tree = settings(broker.bootstrap, self.source, self.target, name, merged(BOUNDS, changes))

    async def start(self) -> None:
        """Start, answer some documents, and take the baseline."""
        config = write_config(self.folder, self.tree)
        options = {"config": str(config), "hold": str(self.hold), "document_s": self._document_s}
        path = os.pathsep.join([str(ROOT), str(ROOT / "service")])
        self._process = spawn(
            [sys.executable, "-m", "tests.support.held_worker", json.dumps(options)],
            self._log,
            {**os.environ, "PYTHONPATH": path},
        )
        await self.publish(document(300), WARM)
        await self.until_answered(WARM)
        self.reset_peak()
        self.baseline = status(self._process.pid, "VmRSS")

    @property
    def bound(self) -> int:
        return bound(self.tree, self.partitions, self.partitions)

    def growth(self, case: str) -> Growth:
        """Since the baseline, at the peak since the last of these."""
        peak = status(self._process.pid, "VmHWM")
        self.reset_peak()
        return Growth(case, self.bound, self.baseline, peak - self.baseline)

    def reset_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    async def publish(self, value: bytes, count: int) -> None:
        await self.broker.produce(
            self.source, [(b"%d" % n, value, (), n % self.partitions) for n in range(count)]
        )

    async def answers(self) -> int:
        """How many there are; waits for a broker that was away until the cluster knows it again."""
        found: list[int] = []

        async def counted() -> bool:
            with suppress(KafkaError):
                found.append(sum((await self._answered()).values()))
            return bool(found)

        await self.until(counted, "the broker to answer")
        return found[0]

    async def _answered(self) -> dict[int, int]:
        if self.tree.get("delivery", {}).get("guarantee") == "exactly-once":
            # committed with the results, which have the transactions' markers between them
            return await self.broker.committed(self._group, self.source)
        return await self.broker.end_offsets(self.target)

    async def until_answered(self, count: int) -> None:
        async def answered() -> bool:
            return await self.answers() >= count

        await self.until(answered, f"{count} answers")

    async def until_steady(self) -> None:
        """Wait until the process has stopped growing."""
        highest, since = 0, time.monotonic()

        async def steady() -> bool:
            nonlocal highest, since
            now = status(self._process.pid, "VmRSS")
            if now > highest + MIB // 4:
                highest, since = now, time.monotonic()
            return time.monotonic() - since > STEADY_S

        await self.until(steady, "the process to stop growing")

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not await condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                code, log = self._process.poll(), self._log.read_text(errors="replace")[-3000:]
                raise AssertionError(f"waited for {what}; the worker's exit code: {code}\n{log}")
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        """Drain; the worker has to end in order."""
        self._process.terminate()
        try:
            code = await asyncio.to_thread(self._process.wait, 60)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"ended with {code}\n{self._log.read_text(errors='replace')[-3000:]}"

    def kill(self) -> None:
        kill_group(self._process)


def status(pid: int, name: str) -> int:
    """A size of a process, in bytes: VmRSS, VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} of process {pid}")


def document(characters: int, odd: str = "") -> bytes:
    return orjson.dumps({"text": odd + "word " * (characters // 5)})


@asynccontextmanager
async def subject(
    broker: Broker,
    folder: Path,
    partitions: int = 4,
    document_s: float = 0.0,
    changes: dict[str, Any] | None = None,
) -> AsyncIterator[Subject]:
    folder.mkdir(parents=True)
    worker = Subject(broker, folder, partitions, document_s)
    await worker.make_topics(changes or {})
    try:
        await worker.start()
        yield worker
        await worker.end()
    finally:
        worker.kill()


async def stopped_broker(broker: Broker, folder: Path) -> Sequence[Growth]:
    """A backlog, and the broker stops in the middle: first frozen, then killed and started again."""
    count = 2000
    async with subject(broker, folder, document_s=0.003) as worker:
        worker.hold.touch()  # until the backlog is there, and until the broker has stopped: something is left then
        await worker.publish(document(20_000), count)
        worker.hold.unlink()
        await worker.until_answered(WARM + 50)
        worker.hold.touch()
        freeze(broker)
        worker.hold.unlink()
        await worker.until_steady()
        await asyncio.sleep(STILL_S)
        frozen = worker.growth("broker frozen (SIGSTOP)")
        thaw(broker)
        before = await worker.answers()
        assert before < WARM + count
        await worker.until_answered(before + 20)
        worker.hold.touch()
        broker.kill()
        worker.hold.unlink()
        await worker.until_steady()
        await asyncio.sleep(STILL_S)
        killed = worker.growth("broker killed")
        broker.start()  # in the main thread: a broker ends with the thread that started it
        await worker.until_answered(WARM + count)
        return frozen, killed, worker.growth("broker back, the backlog answered")


async def stopped_device(
    broker: Broker, folder: Path, changes: dict[str, Any] | None = None
) -> Sequence[Growth]:
    """A backlog in front of a device that does not answer, for less than ``device.hang_timeout_s``."""
    async with subject(broker, folder, changes=changes) as worker:
        worker.hold.touch()
        await worker.publish(document(20_000), 4000)
        await worker.until_steady()
        held = worker.growth("device held")
        worker.hold.unlink()
        await worker.until_answered(WARM + 4000)
        return held, worker.growth("device back, the backlog answered")


async def large_documents(broker: Broker, folder: Path) -> Sequence[Growth]:
    """Documents of 1 MB as fast as they can be read; then such whose text takes four bytes a character."""
    async with subject(broker, folder) as worker:
        await worker.publish(document(1_000_000), 120)
        await worker.until_answered(WARM + 120)
        plain = worker.growth("1 MB documents")
        await worker.publish(document(1_000_000, "\U0001f600"), 120)
        await worker.until_answered(WARM + 240)
        return plain, worker.growth("1 MB documents of wide characters")


async def many_partitions(broker: Broker, folder: Path) -> Sequence[Growth]:
    """200 partitions with a backlog each, the device held and then not."""
    partitions = 200
    changes = {"kafka": {"max_partition_fetch_bytes": 256 * 1024}}
    async with subject(broker, folder, partitions, changes=changes) as worker:
        worker.hold.touch()
        await worker.publish(document(40_000), 10 * partitions)
        await worker.until_steady()
        held = worker.growth("200 partitions, device held")
        worker.hold.unlink()
        await worker.until_answered(WARM + 10 * partitions)
        return held, worker.growth("200 partitions, the backlog answered")


CASES: dict[str, Callable[[Broker, Path], Awaitable[Sequence[Growth]]]] = {
    "stopped device": stopped_device,
    "1 MB documents": large_documents,
    "200 partitions": many_partitions,
    "stopped broker": stopped_broker,
}


def freeze(broker: Broker) -> None:
    """Stop the broker's process where it stands: its connections stay open, and nobody answers."""
    _signal(broker, signal.SIGSTOP)


def thaw(broker: Broker) -> None:
    _signal(broker, signal.SIGCONT)


def _signal(broker: Broker, number: signal.Signals) -> None:
    if isinstance(broker, NativeKafka):
        assert broker._process is not None
        os.killpg(broker._process.pid, number)
    else:
        assert isinstance(broker, ContainerKafka)
        container = broker._container.get_wrapped_container()
        container.pause() if number is signal.SIGSTOP else container.unpause()
