"""Where a partition starts: the policy that ``auto_offset_reset`` is not.

A start is decided once and committed before the first record is admitted, so that a crash before the first
ordinary commit finds the same start again (with ``latest`` it would otherwise skip what arrived meanwhile).

Each commit notes how many partitions the topic had when the group first read it (see ``notes.py``).  A partition
numbered so or above that has no commit was born later, and is read from its beginning whatever ``input.start``
says; partition counts never shrink, so members starting at the same time cannot take each other's fresh commits
for an old group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    NotCoordinatorForGroupError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.structs import OffsetAndMetadata

from inferstream.errors import InferstreamError
from inferstream.kafka.notes import Note

# Committed offsets of the partitions that are assigned, and of others.
Fetch = Callable[
    [Collection[TopicPartition], Collection[TopicPartition]],
    Awaitable[Mapping[TopicPartition, OffsetAndMetadata]],
]
Start = Literal["earliest", "latest", "error"]


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed offset and what it notes."""

    offset: int
    note: Note


def starts(
    assigned: set[TopicPartition],
    partitions: Mapping[str, int],
    committed: Mapping[TopicPartition, Committed],
    start: Start,
) -> dict[TopicPartition, int | Literal["beginning", "end", "error"]]:
    """Decide the start of each assigned partition: an offset, or which end of the log to look up."""
    decided: dict[TopicPartition, int | Literal["beginning", "end", "error"]] = {}
    for tp in assigned:
        if tp in committed:
            decided[tp] = committed[tp].offset
        elif start == "earliest" or tp.partition >= first_partitions(tp.topic, partitions, committed):
            decided[tp] = "beginning"
        else:
            decided[tp] = "end" if start == "latest" else "error"
    return decided


def first_partitions(
    topic: str, partitions: Mapping[str, int], committed: Mapping[TopicPartition, Committed]
) -> int:
    """How many partitions ``topic`` had when the group first read it."""
    noted = [
        first
        for tp, entry in committed.items()
        if tp.topic == topic and (first := entry.note.partitions) is not None
    ]
    return min(noted, default=partitions.get(topic, 0))


class NoStartOffset(InferstreamError):
    """``input.start: error`` and the group has no offset for a partition."""


class OffsetLost(InferstreamError):
    """The committed offset is no longer in the log and ``input.on_lost_range`` is ``stop``."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What an epoch starts with: where each partition starts and ends, and what its commit notes.

    ``committed`` says which of them have a commit.
    """

    positions: dict[TopicPartition, int]
    ends: dict[TopicPartition, int]
    committed: set[TopicPartition]
    notes: dict[TopicPartition, Note]


async def committed_offsets(
    consumer: AIOKafkaConsumer, group_id: str, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The group's committed offsets; partitions without one are left out.  Raises aiokafka's KafkaError.

    aiokafka 0.14 does not look at the error of the whole answer, with which a coordinator that is still loading the
    group says so: it takes that for a group without offsets, which would begin anew.
    """
    coordinator = consumer._coordinator
    await coordinator.ensure_coordinator_known()
    topics: defaultdict[str, list[int]] = defaultdict(list)
    for tp in partitions:
        topics[tp.topic].append(tp.partition)
    answer = await coordinator._send_req(OffsetFetchRequest(group_id, list(topics.items())))
    _raise_if(
        coordinator, getattr(answer, "error_code", 0), f"group {group_id}"
    )  # brokers before 0.10.2 have none
    found: dict[TopicPartition, OffsetAndMetadata] = {}
    for topic, entries in answer.topics:
        for partition, offset, metadata, code in entries:
            _raise_if(coordinator, code, f"{topic}:{partition}")
            if offset >= 0:
                found[TopicPartition(topic, partition)] = OffsetAndMetadata(offset, metadata)
    return found


def _raise_if(coordinator: Any, code: int, where: str) -> None:
    error = for_code(code)
    if code == 0 or error is UnknownTopicOrPartitionError:  # deleted meanwhile: it has no offset
        return
    if issubclass(error, NotCoordinatorForGroupError | GroupCoordinatorNotAvailableError):
        coordinator.coordinator_dead()
    raise error(where)


async def open_positions(
    consumer: AIOKafkaConsumer,
    fetch: Fetch,
    group_id: str,
    assigned: set[TopicPartition],
    start: Start,
    timeout_ms: int,
) -> Opening:
    """Look up committed offsets (``fetch``) and the ends of the log, and apply the policy.

    Raises NoStartOffset, or aiokafka's KafkaError.
    """
    partitions: dict[str, int] = {}
    for topic in {tp.topic for tp in assigned}:
        partitions[topic] = len(consumer.partitions_for_topic(topic) or ())
    everything = {TopicPartition(topic, n) for topic, count in partitions.items() for n in range(count)}
    fetched = await fetch(assigned, everything - assigned)
    committed = {tp: Committed(entry.offset, Note.parse(entry.metadata)) for tp, entry in fetched.items()}
    decided = starts(assigned, partitions, committed, start)
    missing = sorted(tp for tp, where in decided.items() if where == "error")
    if missing:
        raise NoStartOffset(
            f"input.start is 'error' and group {group_id!r} has no committed offset for "
            f"{', '.join(f'{tp.topic}:{tp.partition}' for tp in missing)}: set input.start to earliest or "
            "latest, or commit a start with kafka-consumer-groups --reset-offsets"
        )
    beginning = [tp for tp, where in decided.items() if where == "beginning"]
    ends = await consumer._fetcher.end_offsets(list(assigned), timeout_ms)
    found = ends | (await consumer._fetcher.beginning_offsets(beginning, timeout_ms) if beginning else {})
    positions = {tp: where if isinstance(where, int) else found[tp] for tp, where in decided.items()}
    first = {topic: first_partitions(topic, partitions, committed) for topic in partitions}
    notes = {
        tp: replace(committed[tp].note if tp in committed else Note(), partitions=first[tp.topic])
        for tp in assigned
    }
    return Opening(positions, ends, assigned & committed.keys(), notes)
