"""What a run happens in: topics, a publisher that stays ahead, an observer of the results, and the workers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions

from tests.faults.checker import Input, Rules
from tests.faults.documents import MAX_CHUNKS, MAX_LENGTH, Reading
from tests.faults.fleet import Fleet, Member
from tests.faults.publisher import Feeder
from tests.support.client import PARTITIONS, Kafka
from tests.support.reader import AT_ONCE, consumer
from tests.support.worker import merged, settings

MAX_UNCOMMITTED = 500
OBSERVE_S = 0.05
STUCK_S = 150.0  # without a result the run is given up: nothing that a fault leaves behind lasts so long
ADMIN_S = 60.0  # for one answer of an administrator's
ASK_S = 5.0  # for one that is asked for again and again


class Stuck(Exception):
    """What was awaited did not come."""


class Observer:
    """Counts the records of the output and dead-letter topics that a reader with read_committed is given.

    Offsets would not do: the markers of transactions, and what they aborted, take some as well.  ``arrivals`` are
    when each partition gave records, Unix seconds.
    """

    def __init__(self, bootstrap: str, topics: tuple[str, ...], partitions: int) -> None:
        self._bootstrap = bootstrap
        self._next = {(topic, n): 0 for topic in topics for n in range(partitions)}
        self._consumer: Consumer | None = None
        self._renewed: set[str] = set()
        self._moved = asyncio.Event()
        self.arrivals: dict[Input, list[float]] = {place: [] for place in self._next}
        self.count = 0

    async def run(self) -> None:
        thread = ThreadPoolExecutor(1, "observer")
        loop = asyncio.get_running_loop()
        try:
            while True:
                if seen := await loop.run_in_executor(thread, self._look):
                    self.count += seen
                    self._moved.set()
        finally:
            thread.submit(self._close)
            thread.shutdown(wait=False)

    def renewed(self, topic: str) -> None:
        """The topic was deleted and made anew: it is read from its beginning."""
        self._renewed.add(topic)

    def _look(self) -> int:
        if self._renewed:
            self._close()  # a consumer remembers a topic that is gone
            topic = self._renewed.pop()
            self._next |= {place: 0 for place in self._next if place[0] == topic}
        if self._consumer is None:
            self._consumer = consumer(self._bootstrap)
            self._consumer.assign([TopicPartition(*place, offset) for place, offset in self._next.items()])
        seen = 0
        gave = set()
        for message in self._consumer.consume(AT_ONCE, OBSERVE_S):
            if message.error() is None:  # librdkafka goes on by itself after any
                place = message.topic(), message.partition()
                self._next[place] = message.offset() + 1
                gave.add(place)
                seen += 1
        for place in gave:
            self.arrivals[place].append(time.time())
        return seen

    def _close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None

    async def reach(self, count: int) -> None:
        """Wait for that many results; Stuck if there is none for STUCK_S."""
        while self.count < count:
            before = self.count
            async with _no_longer_than(STUCK_S, f"no result for {STUCK_S:.0f} s"):
                while self.count == before:
                    self._moved.clear()
                    await self._moved.wait()


class Scene:
    """One run's stage.  Faults use what is public here."""

    def __init__(
        self,
        kafka: Kafka,
        folder: Path,
        guarantee: str,
        seed: int,
        *,
        under_orders: bool,
        identified: bool,
        static: bool,
        proxied: str | None,
    ) -> None:
        """``identified`` workers have a transactional id that outlives them, ``static`` ones are static members.

        ``proxied`` is the bootstrap address by the proxies, for the workers; None sends them straight.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.kafka = kafka
        self.guarantee = guarantee
        self.seed = seed
        self.chance = random.Random(seed)
        self._identified = identified
        self._static = static
        # one topic, or two with half as many partitions each
        topics = self.chance.choice([1, 1, 2])
        self._each = PARTITIONS // topics
        self.sources = [kafka.unique("faults-in") for _ in range(topics)]
        self.inputs: list[Input] = [(topic, n) for topic in self.sources for n in range(self._each)]
        self.target = kafka.unique("faults-out")
        self.dead_letters = f"{self.target}.dead-letters"
        self.group = kafka.unique("faults-group")
        # as many as the input, so that partitions match, or more, so that keys decide
        self.outputs = self.chance.choice([self._each, self._each, self._each + 2])
        reading = Reading(
            self.chance.choice(["truncate", "chunk"]), self.chance.choice(["forward", "dead-letter"])
        )
        self.rules = Rules(self._each, self.outputs, self.outputs, reading)
        self.allowed = 0  # repeated answers, by the faults so far
        self.deleted: list[ConsumerRecord] = []  # results whose topic was deleted under them
        self.events: list[str] = []
        self._began = time.monotonic()
        self._journal = folder / "journal.txt"
        self._bootstrap = (proxied or kafka.bootstrap).split(",")
        self._changes = self._draw_settings()
        self.fleet = Fleet(folder, self._tree, under_orders, self.note)
        self.observer = Observer(kafka.bootstrap, (self.target, self.dead_letters), self.outputs)
        transactional = self.chance.random() < 0.5
        self.feeder = Feeder(kafka, self.inputs, self.group, seed, transactional, self.note)
        self._observing: asyncio.Task[None] | None = None
        self._feeding: asyncio.Task[None] | None = None
        self.note(
            f"{topics} input topics, {self.outputs} output partitions, {reading}"
            + (", a transactional publisher" if transactional else "")
        )

    def note(self, line: str) -> None:
        stamped = f"{time.monotonic() - self._began:8.2f}  {line}"
        self.events.append(stamped)
        with self._journal.open("a") as journal:
            journal.write(stamped + "\n")

    async def open(self, workers: int) -> None:
        """Make the topics, start publishing, then the workers; returns when all are at work."""
        for source in self.sources:
            await self._create(source, self._each)
        await self.make_output()
        await self._create(self.dead_letters, self.outputs, {"max.message.bytes": str(2 << 20)})
        self._observing = asyncio.create_task(self.observer.run(), name="observer")
        self._feeding = asyncio.create_task(self.feeder.run(), name="feeder")
        self.fleet.start(workers)
        await self.until(self._complete, "every worker to have partitions")
        await self.observer.reach(1)

    async def make_output(self) -> None:
        await self._create(self.target, self.outputs)

    async def _create(self, topic: str, partitions: int, configs: Mapping[str, str] | None = None) -> None:
        await self.until(lambda: self.kafka.create_topic(topic, partitions, configs), f"topic {topic}")

    async def finish(self) -> None:
        """Publish no more, wait until all is answered and committed, then drain the workers.

        No transaction may stay open behind them: what a dead one has left is aborted in time.
        """
        self.feeder.stop()
        async with _no_longer_than(STUCK_S, f"waited {STUCK_S:.0f} s for the publisher to end"):
            await self._ended(self._feeding)
        await self.until(self._caught_up, "all of the input to be committed")
        await self.fleet.drain()
        await self.until(self._closed, "the last transaction to be over")
        await self._cancel(self._observing)

    async def close(self) -> None:
        """Leave nothing behind, whatever has happened."""
        await self.fleet.stop()
        self.fleet.kill_all()
        await self._cancel(self._feeding)
        await self._cancel(self._observing)

    async def remove_topics(self) -> None:
        """Give the broker its space back; a topic that stays is in nobody's way."""
        futures = self.admin.delete_topics([*self.sources, self.target, self.dead_letters])
        for future in futures.values():
            with contextlib.suppress(KafkaException, TimeoutError):
                await asyncio.to_thread(future.result, ADMIN_S)

    # ---- for faults

    @functools.cached_property
    def admin(self) -> AdminClient:
        """One for the whole run: a handle that is dropped takes the answers it waits for along."""
        return self._new_admin()

    def _new_admin(self) -> AdminClient:
        return AdminClient(
            {"bootstrap.servers": self.kafka.bootstrap, "reconnect.backoff.max.ms": 500, "log_level": 0}
        )

    async def pick(self, at_work: bool = False) -> Member:
        """A running worker, by the seed; one that has partitions if it is to be ``at_work``."""
        found: list[Member] = []

        async def somebody() -> bool:
            found[:] = [member for member in self.fleet.running if member.at_work or not at_work]
            return bool(found)

        await self.until(somebody, "a worker to run")
        return self.chance.choice(found)

    def excuse(self, *, repeats: int) -> None:
        """So many workers may have to have what they have not committed answered again."""
        if self.guarantee != "exactly-once":
            self.allowed += repeats * MAX_UNCOMMITTED

    async def results(self, fewest: int, most: int) -> None:
        """Wait for a seeded number of further results."""
        await self.observer.reach(self.observer.count + self.chance.randrange(fewest, most))

    async def recovered(self) -> None:
        """Wait until each worker has partitions and each partition is worked on: its commits go on from now on.

        What the fault excused is excused no more.
        """
        await self.until(self._complete, "every worker to have partitions")
        await self.until(self._looked, "the committed offsets")
        goals = {
            source: self.feeder.committed.get(source, 0) + self.chance.randrange(20, 100)
            for source in self.inputs
        }

        async def reached() -> bool:
            return all(self.feeder.committed.get(source, 0) >= goal for source, goal in goals.items())

        await self.until(reached, "every partition to be worked on again")
        self.fleet.settle()

    async def add_partition(self, topic: str) -> Input:
        """One more partition for the input topic, and documents on it; the new input comes back."""
        [*_, (_, last)] = [source for source in self.inputs if source[0] == topic]
        [future] = self.admin.create_partitions([NewPartitions(topic, last + 2)]).values()
        await asyncio.to_thread(future.result, ADMIN_S)
        self.rules.widened = True
        self.inputs.append((topic, last + 1))
        return self.inputs[-1]

    async def _complete(self) -> bool:
        return all(member.at_work for member in self.fleet.members if member.wanted)

    async def until(
        self, condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = STUCK_S
    ) -> None:
        async with _no_longer_than(timeout_s, f"waited {timeout_s:.0f} s for {what}"):
            while True:
                with contextlib.suppress(KafkaError, KafkaException, OSError):
                    if await condition():
                        return
                await asyncio.sleep(OBSERVE_S)

    async def members(self) -> set[str]:
        """The names of those that the group's coordinator takes for members.

        A new client asks: librdkafka's remembers the coordinator of a group for minutes, although it has moved.
        """

        def ask() -> set[str]:
            admin = self._new_admin()
            # asked again soon: one that waits for a coordinator that went away may wait in vain for a minute
            [future] = admin.describe_consumer_groups([self.group], request_timeout=ASK_S).values()
            return {member.client_id for member in future.result(ADMIN_S).members}

        return await asyncio.to_thread(ask)

    async def set_limit(self, limit: int | None) -> None:
        """``max.message.bytes`` of the output topic, in bytes; None for Kafka's default."""
        operation = AlterConfigOpType.DELETE if limit is None else AlterConfigOpType.SET
        entry = ConfigEntry("max.message.bytes", str(limit), incremental_operation=operation)
        resource = ConfigResource(ConfigResource.Type.TOPIC, self.target, incremental_configs=[entry])

        async def is_set() -> bool:
            [future] = self.admin.incremental_alter_configs([resource]).values()
            await asyncio.to_thread(future.result, ADMIN_S)
            return True

        await self.until(is_set, f"max.message.bytes={limit}")

    async def _looked(self) -> bool:
        await self.feeder.look()
        return True

    async def _caught_up(self) -> bool:
        for topic in self.sources:
            ends = await self.kafka.end_offsets(topic)
            committed = await self.kafka.committed(self.group, topic)
            if any(committed.get(partition, 0) != end for partition, end in ends.items()):
                return False
        return True

    async def _closed(self) -> bool:
        for topic in (self.target, self.dead_letters):
            if await self.kafka.end_offsets(topic) != await self.kafka.end_offsets(topic, "read_uncommitted"):
                return False
        return True

    async def _ended(self, task: asyncio.Task[None] | None) -> None:
        """Wait for a task of ours; that it failed is a finding about the harness."""
        if task is not None:
            [outcome] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, Exception):
                self.fleet.problems.append(f"the harness itself failed: {outcome!r}")

    async def _cancel(self, task: asyncio.Task[None] | None) -> None:
        if task is not None and not task.done():
            task.cancel()
            await self._ended(task)

    def _draw_settings(self) -> dict[str, Any]:
        """Drawn by the seed, and slow enough that there is always input left.

        The budget is never reached, so a batch waits for its linger, two milliseconds for each document that the
        buffer holds: a worker does at most 500 in a second, at next to no cost.
        """
        chance = self.chance
        at_once = chance.choice([16, 32, 64, 128])
        ticks = [50, 100, 300] if self.guarantee == "exactly-once" else [50, 200, 1000]
        return {
            "kafka": {
                "bootstrap_servers": self._bootstrap,
                "rebalance_timeout_ms": 10_000,
                "request_timeout_ms": 12_000,
                "max_partition_fetch_bytes": chance.choice([64, 256, 1024]) * 1024,
            },
            "input": {"tombstones": self.rules.reading.tombstones},
            "output": {"compression": chance.choice(["none", "zstd"])},
            "model": {
                "long_documents": self.rules.reading.long_documents,
                "max_length": MAX_LENGTH,
                "max_chunks": MAX_CHUNKS,
            },
            "batch": {"max_tokens": 8192, "linger_ms": 2 * at_once},
            "buffer": {"max_documents": at_once, "max_tokens": 8192},
            "device": {"hang_timeout_s": 5},
            "delivery": {
                "guarantee": self.guarantee,
                "max_uncommitted_documents": MAX_UNCOMMITTED,
                "commit_interval_ms": chance.choice(ticks),
                "revoke_timeout_s": 4,
            },
        }

    def _tree(self, worker: str) -> dict[str, Any]:
        named: dict[str, Any] = {"client_id": worker}
        if self._static:
            named["group_instance_id"] = worker
        if self.guarantee == "exactly-once" and self._identified:
            named["transactional_id"] = self.transactional_id(worker)
        changes = merged(self._changes, {"kafka": named, "input": {"topics": self.sources}})
        return settings("", self.sources[0], self.target, self.group, changes)

    def transactional_id(self, worker: str) -> str:
        return f"{self.group}-{worker}"


@contextlib.asynccontextmanager
async def _no_longer_than(seconds: float, what: str) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Stuck(what) from None
