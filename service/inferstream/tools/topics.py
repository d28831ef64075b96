"""Create the topics of a service, or say how those that exist differ from what would be created.

Nothing that exists is ever altered: more partitions would move keys, and a smaller limit would refuse records.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from aiokafka import errors as kafka_errors
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    IncompatibleBrokerVersion,
    KafkaError,
    NodeNotReadyError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
)
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest

from inferstream.errors import KafkaRefused
from inferstream.kafka.connection import TopicFacts, connected, facts_from, start_with_retry
from inferstream.kafka.preflight import DEFAULT_MAX_MESSAGE_BYTES, HEADER_ROOM
from inferstream.kafka.rights import Right, refused_line

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka, Settings

DEFAULT_PARTITIONS = 8
MAX_DEFAULT_REPLICATION = 3
DEAD_LETTER_RETENTION_MS = 30 * 24 * 3600 * 1000  # a dead letter waits for a person
REQUEST_TIMEOUT_MS = 30_000
READY_TIMEOUT_S = 30.0
BROKER_RESOURCE = 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """A topic to create.  ``partitions`` and ``replication`` of None take what fits the cluster."""

    name: str
    partitions: int | None = None
    replication: int | None = None
    configs: dict[str, str] = field(default_factory=dict)
    like: str | None = None  # as many partitions as this topic, unless ``partitions`` is given
    room_for: tuple[str, ...] = ()  # its records are up to 64 KiB larger than those of these topics


class Outcome(StrEnum):
    CREATED = "created"
    WOULD_CREATE = "would be created"
    EXISTS = "exists"
    DIFFERS = "exists and differs, left alone"


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one topic; ``details`` are its properties, or for DIFFERS what is and what was wanted."""

    name: str
    outcome: Outcome
    details: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome.value}: {', '.join(self.details)}"


def wanted_topics(settings: Settings, partitions: int | None, replication: int | None) -> list[Wanted]:
    """Input, output and dead-letter topics of the settings, as far as they are set."""
    inputs = tuple(settings.input.topics)
    first = inputs[0] if inputs else None
    topics = [Wanted(name, partitions, replication) for name in inputs]
    if settings.output.topic:
        topics.append(Wanted(settings.output.topic, partitions, replication, like=first, room_for=inputs))
    if settings.dead_letter.topic:
        kept = {"cleanup.policy": "delete", "retention.ms": str(DEAD_LETTER_RETENTION_MS)}
        topics.append(
            Wanted(settings.dead_letter.topic, partitions, replication, kept, like=first, room_for=inputs)
        )
    return topics


async def create_topics(kafka: Kafka, topics: Sequence[Wanted], *, dry_run: bool = False) -> list[Report]:
    """Create what is missing, in order; with ``dry_run`` only ask the brokers whether they would.

    Raises KafkaRefused when the brokers do not answer in time or refuse.
    """

    async def work() -> list[Report]:
        async with connected(kafka) as client:
            return await _create(client, kafka, topics, dry_run)

    return await start_with_retry(kafka, work, kafka.connect_timeout_s)


async def _create(
    client: AIOKafkaClient, kafka: Kafka, topics: Sequence[Wanted], dry_run: bool
) -> list[Report]:
    facts = await facts_from(client, kafka, [topic.name for topic in topics])
    brokers = len(client.cluster.brokers())
    limits = {name: found.max_message_bytes for name, found in facts.items()}
    broker_limit: int | None = None
    planned: dict[str, int] = {name: found.partitions for name, found in facts.items()}
    reports: list[Report] = []
    created: list[str] = []
    for topic in topics:
        configs = dict(topic.configs)
        if topic.room_for:
            if broker_limit is None:
                broker_limit = await _broker_limit(client)
            largest = max(limits.get(name) or broker_limit for name in topic.room_for)
            configs["max.message.bytes"] = str(largest + HEADER_ROOM)
        found = facts.get(topic.name)
        if found is not None:
            differences = _differences(topic, configs, found, planned)
            details = differences or (f"{found.partitions} partitions", f"replication {found.replication}")
            outcome = Outcome.DIFFERS if differences else Outcome.EXISTS
            reports.append(Report(topic.name, outcome, tuple(details)))
            continue
        partitions = topic.partitions or planned.get(topic.like or "") or DEFAULT_PARTITIONS
        replication = topic.replication or min(MAX_DEFAULT_REPLICATION, max(brokers, 1))
        planned[topic.name] = partitions
        try:
            await _create_one(client, kafka, topic.name, partitions, replication, configs, dry_run)
        except KafkaRefused as error:
            if dry_run or not created:
                raise
            raise KafkaRefused(f"{error} (created before it: {', '.join(created)})") from error
        created.append(topic.name)
        details = (
            f"{partitions} partitions",
            f"replication {replication}",
            *(f"{name}={value}" for name, value in sorted(configs.items())),
        )
        reports.append(Report(topic.name, Outcome.WOULD_CREATE if dry_run else Outcome.CREATED, details))
    if created and not dry_run:
        await _wait_until_ready(client, kafka, created)
    return reports


async def _create_one(
    client: AIOKafkaClient,
    kafka: Kafka,
    name: str,
    partitions: int,
    replication: int,
    configs: dict[str, str],
    dry_run: bool,
) -> None:
    request = CreateTopicsRequest(
        [(name, partitions, replication, [], list(configs.items()))], REQUEST_TIMEOUT_MS, dry_run
    )
    try:
        answer = await client.send(_controller(client), request)
    except IncompatibleBrokerVersion as error:
        raise KafkaRefused(
            f"topic {name}: this broker cannot create topics by request; if it is the embedded one, start it "
            f"with `inferstream broker --topic {name}:{partitions}`"
        ) from error
    for topic, code, message in answer.topic_errors:
        problem = kafka_errors.for_code(code)
        if code == 0 or problem is TopicAlreadyExistsError:  # someone else was quicker
            continue
        if problem.retriable:
            raise problem(topic)
        if problem in (ClusterAuthorizationFailedError, TopicAuthorizationFailedError):
            raise KafkaRefused(refused_line(kafka, [Right("CREATE", "topic", topic)]))
        raise KafkaRefused(
            f"topic {topic}: not created: {problem.__name__}: {message or problem.description}"
        )


def _controller(client: AIOKafkaClient) -> Any:
    """The node that creates topics; any, where the cluster names none (yet): it answers that it cannot."""
    controller = client.cluster.controller
    node = controller.nodeId if controller is not None else client.get_random_node()
    if node is None:
        raise NodeNotReadyError("no broker is known")
    return node


async def _broker_limit(client: AIOKafkaClient) -> int:
    """The max.message.bytes of a topic that sets none, in bytes."""
    node = client.get_random_node()
    if node is None:
        raise NodeNotReadyError("no broker is known")
    request = DescribeConfigsRequest([(BROKER_RESOURCE, str(node), ["message.max.bytes"])])
    try:
        answer = await client.send(node, request)
    except IncompatibleBrokerVersion:
        return DEFAULT_MAX_MESSAGE_BYTES
    for code, _, _, _, entries in answer.resources:
        for entry in entries:
            if code == 0 and entry[0] == "message.max.bytes" and entry[1] is not None:
                return int(entry[1])
    return DEFAULT_MAX_MESSAGE_BYTES  # no right to ask: Apache Kafka's own


def _differences(
    topic: Wanted, configs: dict[str, str], found: TopicFacts, planned: dict[str, int]
) -> tuple[str, ...]:
    """What of an existing topic is not as wanted; only what was asked for or what a worker needs counts."""
    differences = []
    partitions = topic.partitions or planned.get(topic.like or "")
    if partitions is not None and partitions != found.partitions:
        why = "" if topic.partitions else f" as {topic.like} has"
        differences.append(f"{found.partitions} partitions instead of {partitions}{why}")
    if topic.replication is not None and topic.replication != found.replication:
        differences.append(f"replication {found.replication} instead of {topic.replication}")
    limit = found.max_message_bytes
    if limit is not None and limit < int(configs.get("max.message.bytes", 0)):
        differences.append(f"max.message.bytes={limit} instead of {configs['max.message.bytes']} or more")
    policy = found.cleanup_policy
    if policy is not None and policy != configs.get("cleanup.policy", policy):
        differences.append(f"cleanup.policy={policy} instead of {configs['cleanup.policy']}")
    kept = found.retention_ms
    if kept is not None and 0 <= kept < int(configs.get("retention.ms", 0)):
        differences.append(f"retention.ms={kept} instead of {configs['retention.ms']} or more")
    return tuple(differences)


async def _wait_until_ready(client: AIOKafkaClient, kafka: Kafka, topics: list[str]) -> None:
    """Until every new topic is known with its partitions, so that the next command finds it."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            if len(await facts_from(client, kafka, topics)) == len(topics):
                return
        except KafkaError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(0.1)
