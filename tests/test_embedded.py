"""The embedded broker does what its docstring says: a real client produces, reads in a group and commits."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.consumer.group_coordinator import GroupCoordinator

from inferstream.errors import SettingsError
from inferstream.kafka.connection import topic_facts
from inferstream.settings.tree import Kafka
from inferstream.tools.embedded import EmbeddedBroker

pytestmark = pytest.mark.embedded

PARTITIONS = 8


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        yield running


def group_member(broker: EmbeddedBroker, topic: str) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker.bootstrap,
        group_id="readers",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=3000,
        heartbeat_interval_ms=300,
    )


class Changes(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """Tells when a member has got its partitions."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        pass

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self.seen.set()


async def produce(broker: EmbeddedBroker, topic: str, count: int) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=broker.bootstrap, enable_idempotence=True, compression_type="zstd"
    )
    await producer.start()
    try:
        sent = [await producer.send(topic, b"%d" % n, partition=n % PARTITIONS) for n in range(count)]
        await asyncio.gather(*sent)
    finally:
        await producer.stop()


async def read(consumer: AIOKafkaConsumer, count: int) -> list[bytes]:
    values: list[bytes] = []
    async with asyncio.timeout(30):
        while len(values) < count:
            found = await consumer.getmany(timeout_ms=200, max_records=200)
            values += [record.value for records in found.values() for record in records]
    return values


async def test_embedded_broker_when_a_group_reads_then_all_records_come_and_the_commit_stands(
    broker: EmbeddedBroker,
) -> None:
    broker.create_topic("documents", PARTITIONS)
    await produce(broker, "documents", 400)
    first = group_member(broker, "documents")
    await first.start()
    try:
        values = await read(first, 400)
        await first.commit({TopicPartition("documents", n): 50 for n in range(PARTITIONS)})
        committed = {n: await first.committed(TopicPartition("documents", n)) for n in range(PARTITIONS)}
    finally:
        await first.stop()
    assert sorted(values, key=int) == [b"%d" % n for n in range(400)]
    assert committed == dict.fromkeys(range(PARTITIONS), 50)


async def test_embedded_broker_when_a_second_member_joins_then_the_partitions_are_shared(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mock refuses a follower's SyncGroup that comes after the leader's.
    assign = GroupCoordinator._perform_assignment

    async def slowly(self: GroupCoordinator, *arguments: Any) -> Any:
        await asyncio.sleep(0.2)
        return await assign(self, *arguments)

    monkeypatch.setattr(GroupCoordinator, "_perform_assignment", slowly)
    broker.create_topic("documents", PARTITIONS)
    members = [group_member(broker, "documents"), group_member(broker, "documents")]
    changes = Changes()
    for member in members:
        member.subscribe(["documents"], listener=changes)
    try:
        await members[0].start()
        joining = asyncio.create_task(members[1].start())
        async with asyncio.timeout(30):
            await joining
            while {len(member.assignment()) for member in members} != {4}:
                changes.seen.clear()
                await changes.seen.wait()
    finally:
        for member in members:
            await member.stop()


async def test_embedded_broker_when_a_topic_is_asked_for_then_it_is_described_and_not_created(
    broker: EmbeddedBroker,
) -> None:
    broker.create_topic("documents", 3)
    kafka = Kafka(bootstrap_servers=[broker.bootstrap])
    for _ in range(2):
        facts = await topic_facts(kafka, ["documents", "nowhere"])
        assert {name: found.partitions for name, found in facts.items()} == {"documents": 3}
        assert facts["documents"].max_message_bytes is None  # the mock has no DescribeConfigs


def test_embedded_broker_when_a_topic_is_created_twice_then_nothing_happens(broker: EmbeddedBroker) -> None:
    broker.create_topic("documents", 3)
    broker.create_topic("documents", 3)


def test_embedded_broker_when_stopped_then_it_can_be_started_again(broker: EmbeddedBroker) -> None:
    broker.stop()
    broker.stop()
    broker.start()
    assert broker.bootstrap.startswith("127.0.0.1:")


def test_embedded_broker_when_the_library_is_missing_then_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"inferstream\[demo\]"):
        EmbeddedBroker().start()
