"""What a run happens in: topics, a publisher that stays ahead, an observer of the results, and the workers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from tests.faults.checker import Rules
from tests.faults.documents import header, record
from tests.faults.fleet import Fleet, Member
from tests.support.client import PARTITIONS, Kafka, Sent
from tests.support.worker import merged, settings

MAX_UNCOMMITTED = 500
AHEAD = 1_600  # documents of each partition that are there and not committed: more than any worker holds
OBSERVE_S = 0.05
LOOK_S = 0.2
STUCK_S = 150.0  # without a result the run is given up: nothing that a fault leaves behind lasts so long
CLIENT_TIMEOUT_MS = 5_000
ADMIN_S = 60.0  # for one answer of an administrator's


class Stuck(Exception):
    """What was awaited did not come."""


class Observer:
    """Counts the records of the output and dead-letter topics, as a reader with read_committed sees them."""

    def __init__(self, bootstrap: str, topics: tuple[str, ...], partitions: int) -> None:
        self._bootstrap = bootstrap
        self._partitions = [TopicPartition(topic, n) for topic in topics for n in range(partitions)]
        self._ends: dict[TopicPartition, int] = {}
        self._before = 0  # what was counted on topics that were deleted since
        self.count = 0
        self._moved = asyncio.Event()

    async def run(self) -> None:
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._bootstrap,
                enable_auto_commit=False,
                isolation_level="read_committed",
                request_timeout_ms=CLIENT_TIMEOUT_MS,
                metadata_max_age_ms=1_000,
            )
            try:
                await consumer.start()
                while True:
                    self._look(await consumer.end_offsets(self._partitions))
                    await asyncio.sleep(OBSERVE_S)
            except (KafkaError, OSError):  # a broker that is away, a topic that is deleted
                await asyncio.sleep(OBSERVE_S)
            finally:
                with contextlib.suppress(KafkaError):
                    await consumer.stop()

    def _look(self, ends: dict[TopicPartition, int]) -> None:
        for partition, end in ends.items():
            if end < self._ends.get(partition, 0):  # deleted and made anew
                self._before += self._ends[partition]
            self._ends[partition] = end
        self.count = self._before + sum(self._ends.values())
        self._moved.set()

    async def reach(self, count: int) -> None:
        """Wait for that many results; Stuck if there is none for STUCK_S."""
        while self.count < count:
            before = self.count
            async with _no_longer_than(STUCK_S, f"no result for {STUCK_S:.0f} s"):
                while self.count == before:
                    self._moved.clear()
                    await self._moved.wait()


class Feeder:
    """Publishes documents so that each partition always has some that are not committed, AHEAD of them at most.

    ``committed`` and ``left`` (published and not committed) are per partition, as when it was last looked.
    """

    def __init__(self, kafka: Kafka, source: str, group: str, seed: int, note: Callable[[str], None]) -> None:
        self._kafka = kafka
        self._note = note
        self._source = source
        self._group = group
        self._seed = seed
        self._numbers = itertools.count()
        self._published = [0] * PARTITIONS
        self.committed = [0] * PARTITIONS
        self.left = [0] * PARTITIONS

    async def run(self) -> None:
        async with asyncio.TaskGroup() as feeding:
            for partition in range(PARTITIONS):  # one may have no leader while the others go on
                feeding.create_task(self._feed(partition))
            while True:
                with contextlib.suppress(KafkaError, OSError):  # the coordinator is away
                    await self.look()
                await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        committed = await self._kafka.committed(self._group, self._source)
        self.committed = [committed.get(partition, 0) for partition in range(PARTITIONS)]
        self.left = [there - done for there, done in zip(self._published, self.committed, strict=True)]

    async def enough(self) -> bool:
        """Whether each partition has more left than a worker may hold of it."""
        await self.look()
        return min(self.left) > MAX_UNCOMMITTED

    async def _feed(self, partition: int) -> None:
        while True:
            missing = AHEAD - self._published[partition] + self.committed[partition]
            if missing > AHEAD // 2:
                records = [self._record(n, partition) for n in itertools.islice(self._numbers, missing)]
                try:
                    # Not idempotent, so that it gives up; what is there twice is input like any other.
                    await self._kafka.produce(
                        self._source,
                        records,
                        enable_idempotence=False,
                        acks="all",
                        linger_ms=5,
                        request_timeout_ms=CLIENT_TIMEOUT_MS,
                    )
                    self._published[partition] += missing
                except (KafkaError, OSError) as error:
                    self._note(f"publishing to partition {partition} failed: {error!r}")
            await asyncio.sleep(LOOK_S)

    def _record(self, number: int, partition: int) -> Sent:
        key, value = record(self._seed, number)
        return Sent(key, value, header(self._seed), partition)


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
        proxied: str | None,
        excused: frozenset[int],
    ) -> None:
        """``proxied`` is the bootstrap address by the proxies, for the workers; None sends them straight."""
        folder.mkdir(parents=True, exist_ok=True)
        self.kafka = kafka
        self.guarantee = guarantee
        self.seed = seed
        self.chance = random.Random(seed)
        self.source = kafka.unique("faults-in")
        self.target = kafka.unique("faults-out")
        self.dead_letters = f"{self.target}.dead-letters"
        self.group = kafka.unique("faults-group")
        # as many as the input, so that partitions match, or more, so that keys decide
        self.outputs = self.chance.choice([PARTITIONS, PARTITIONS, PARTITIONS + 2])
        self.rules = Rules(PARTITIONS, self.outputs, self.outputs)
        self.deleted: list[ConsumerRecord] = []  # results whose topic was deleted under them
        self.events: list[str] = []
        self._began = time.monotonic()
        self._journal = folder / "journal.txt"
        self._bootstrap = (proxied or kafka.bootstrap).split(",")
        self._changes = self._draw_settings()
        self.fleet = Fleet(folder, self._tree, under_orders, excused, self.note)
        self.observer = Observer(kafka.bootstrap, (self.target, self.dead_letters), self.outputs)
        self.feeder = Feeder(kafka, self.source, self.group, seed, self.note)
        self._tasks: list[asyncio.Task[None]] = []

    def note(self, line: str) -> None:
        stamped = f"{time.monotonic() - self._began:8.2f}  {line}"
        self.events.append(stamped)
        with self._journal.open("a") as journal:
            journal.write(stamped + "\n")

    async def open(self, workers: int) -> None:
        """Make the topics, start publishing, then the workers; returns when all are at work."""
        await self._create(self.source, PARTITIONS)
        await self.make_output()
        await self._create(self.dead_letters, self.outputs, {"max.message.bytes": str(2 << 20)})
        self._tasks = [
            asyncio.create_task(self.observer.run(), name="observer"),
            asyncio.create_task(self.feeder.run(), name="feeder"),
        ]
        self.fleet.start(workers)
        await self.until(self._complete, "every worker to have partitions")
        await self.observer.reach(1)

    async def make_output(self) -> None:
        await self._create(self.target, self.outputs)

    async def _create(self, topic: str, partitions: int, configs: Mapping[str, str] | None = None) -> None:
        await self.until(lambda: self.kafka.create_topic(topic, partitions, configs), f"topic {topic}")

    async def finish(self) -> None:
        """Publish no more, wait until all is answered and committed, then drain the workers."""
        await self._cancel(self._tasks[1:])
        await self.until(self._caught_up, "all of the input to be committed")
        await self.fleet.drain()
        await self._cancel(self._tasks)

    async def close(self) -> None:
        """Leave nothing behind, whatever has happened."""
        await self.fleet.stop()
        self.fleet.kill_all()
        await self._cancel(self._tasks)

    async def remove_topics(self) -> None:
        """Give the broker its space back; a topic that stays is in nobody's way."""
        futures = self.admin.delete_topics([self.source, self.target, self.dead_letters])
        for future in futures.values():
            with contextlib.suppress(KafkaException, TimeoutError):
                await asyncio.to_thread(future.result, ADMIN_S)

    # ---- for faults

    @functools.cached_property
    def admin(self) -> AdminClient:
        """One for the whole run: a handle that is dropped takes the answers it waits for along."""
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

    async def results(self, fewest: int, most: int) -> None:
        """Wait for a seeded number of further results."""
        await self.observer.reach(self.observer.count + self.chance.randrange(fewest, most))

    async def recovered(self) -> None:
        """Wait until each worker has partitions and each partition is worked on: its commits go on from now on."""
        await self.until(self._complete, "every worker to have partitions")
        await self.until(self._looked, "the committed offsets")
        goals = [done + self.chance.randrange(20, 100) for done in self.feeder.committed]

        async def reached() -> bool:
            return all(done >= goal for done, goal in zip(self.feeder.committed, goals, strict=True))

        await self.until(reached, "every partition to be worked on again")

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
        """The names of those that the group's coordinator takes for members."""
        [future] = self.admin.describe_consumer_groups([self.group]).values()
        described = await asyncio.to_thread(future.result, ADMIN_S)
        return {member.client_id for member in described.members}

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
        ends = await self.kafka.end_offsets(self.source)
        committed = await self.kafka.committed(self.group, self.source)
        return all(committed.get(partition, 0) == end for partition, end in ends.items())

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                self.fleet.problems.append(f"the harness itself failed: {outcome!r}")

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
            "output": {"compression": chance.choice(["none", "zstd"])},
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
        changes = merged(self._changes, {"kafka": {"client_id": worker}})
        tree = settings("", self.source, self.target, self.group, changes)
        if self.guarantee == "exactly-once":
            tree = merged(tree, {"kafka": {"transactional_id": self.transactional_id(worker)}})
        return tree

    def transactional_id(self, worker: str) -> str:
        return f"{self.group}-{worker}"


@contextlib.asynccontextmanager
async def _no_longer_than(seconds: float, what: str) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Stuck(what) from None
