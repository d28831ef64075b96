"""What has to be true of the cluster before a worker joins its group; asked at start and by `config check`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokafka.admin import AIOKafkaAdminClient

from inferstream.errors import KafkaRefused
from inferstream.kafka.connection import TopicFacts, client_options, start_with_retry, topic_facts
from inferstream.kafka.rights import Right, refused_line

if TYPE_CHECKING:
    from inferstream.settings import Settings

log = logging.getLogger(__name__)

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588  # Apache Kafka's own; used where DescribeConfigs is not to be had
HEADER_ROOM = 64 * 1024  # what the headers of a dead letter may add to the input record


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the worker needs to know of its topics.  Limits are in bytes."""

    input_partitions: dict[str, int]
    output_partitions: int
    dead_letter_partitions: int
    output_limit: int
    dead_letter_limit: int


def needed_rights(settings: Settings) -> list[Right]:
    """What a worker cannot do without; READ and WRITE bring DESCRIBE with them."""
    rights = [Right("READ", "topic", name) for name in settings.input.topics]
    rights += [
        Right("WRITE", "topic", settings.output.topic),
        Right("WRITE", "topic", settings.dead_letter.topic),
        Right("READ", "group", settings.kafka.group_id),
    ]
    if settings.delivery.guarantee == "exactly-once" and settings.kafka.transactional_id is not None:
        rights.append(Right("WRITE", "transactional id", settings.kafka.transactional_id))
    return rights


async def inspect(settings: Settings, *, embedded: bool) -> Cluster:
    """Look at the topics; raises KafkaRefused with one line that names what is missing and what to do."""
    names = [*settings.input.topics, settings.output.topic, settings.dead_letter.topic]
    facts = await topic_facts(settings.kafka, names, needed_rights(settings))
    missing = [name for name in names if name not in facts]
    if missing:
        raise KafkaRefused(
            f"topic{'s' if len(missing) > 1 else ''} {', '.join(missing)} not found on "
            f"{','.join(settings.kafka.bootstrap_servers)}: create them with `inferstream topics create`"
        )
    hidden = [Right("DESCRIBE_CONFIGS", "topic", name) for name in names if facts[name].configs_denied]
    if hidden:
        log.warning(
            "the limits of topics are not known; Kafka's defaults are taken",
            extra={"why": refused_line(settings.kafka, hidden)},
        )
    output, dead = facts[settings.output.topic], facts[settings.dead_letter.topic]
    output_limit = settings.output.max_message_bytes or output.max_message_bytes or DEFAULT_MAX_MESSAGE_BYTES
    dead_limit = settings.dead_letter.max_message_bytes or dead.max_message_bytes or DEFAULT_MAX_MESSAGE_BYTES
    if not embedded:
        _dead_letters_fit(settings, facts, dead, dead_limit)
    return Cluster(
        {name: facts[name].partitions for name in settings.input.topics},
        output.partitions,
        dead.partitions,
        output_limit,
        dead_limit,
    )


def _dead_letters_fit(
    settings: Settings, facts: dict[str, TopicFacts], dead: TopicFacts, dead_limit: int
) -> None:
    if dead.cleanup_policy is not None and "compact" in dead.cleanup_policy:
        raise KafkaRefused(
            f"dead_letter.topic {settings.dead_letter.topic} is compacted (cleanup.policy={dead.cleanup_policy}): "
            "it would lose dead letters with equal keys and refuse those without; set cleanup.policy=delete"
        )
    if settings.dead_letter.oversize == "strip":
        return
    for name in settings.input.topics:
        limit = facts[name].max_message_bytes
        if limit is not None and dead_limit < limit + HEADER_ROOM:
            raise KafkaRefused(
                f"dead_letter.topic {settings.dead_letter.topic} takes {dead_limit} bytes, which is less than "
                f"input topic {name}'s {limit} + {HEADER_ROOM} for headers: set its max.message.bytes to "
                f"{limit + HEADER_ROOM} or more, or dead_letter.oversize=strip"
            )


async def _committed_partitions(settings: Settings) -> int:
    """How many input partitions the group has offsets for; raises aiokafka's KafkaError."""
    admin = AIOKafkaAdminClient(**client_options(settings.kafka))
    try:
        await admin.start()
        offsets = await admin.list_consumer_group_offsets(settings.kafka.group_id)
    finally:
        await admin.close()
    return sum(entry.offset >= 0 for tp, entry in offsets.items() if tp.topic in settings.input.topics)


async def check(settings: Settings) -> list[str]:
    """`config check --connect`: the findings, a line each; raises KafkaRefused on the first that is fatal.

    Among what is looked at are the rights of a worker; with brokers before Kafka 2.3, only those to describe the
    topics and the group.
    """

    async def look() -> tuple[Cluster, int]:
        return await inspect(settings, embedded=False), await _committed_partitions(settings)

    cluster, committed = await start_with_retry(settings.kafka, look, settings.kafka.connect_timeout_s)
    return [
        f"kafka.group_id {settings.kafka.group_id}: offsets of {committed} partitions are committed",
        *(f"input.topics {name}: {count} partitions" for name, count in cluster.input_partitions.items()),
        f"output.topic {settings.output.topic}: {cluster.output_partitions} partitions, "
        f"{cluster.output_limit} bytes a batch",
        f"dead_letter.topic {settings.dead_letter.topic}: {cluster.dead_letter_partitions} partitions, "
        f"{cluster.dead_letter_limit} bytes a batch",
    ]
