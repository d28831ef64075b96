"""What a group refuses, told from what passes by itself, and what to do about it in one line.

aiokafka 0.14 hands every refusal of JoinGroup, SyncGroup and Heartbeat to ``getmany`` and then tries again, for
ever.  Most it hands on as a bare ``KafkaError`` around the repr of the broker's error, and two that a group
gives to its members it has no class for.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from aiokafka import errors as kafka_errors
from aiokafka.errors import BrokerResponseError, KafkaError

from inferstream.errors import KafkaRefused
from inferstream.kafka.rights import Right, refused_line

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka

log = logging.getLogger(__name__)

REFUSED_FOR_S = 60.0  # how long refusals may last before they end the process
REFUSAL_GAP_S = 15.0  # refusals further apart than this are not of one cause; what works between is no answer


class GroupMaxSizeReachedError(BrokerResponseError):  # type: ignore[misc]  # aiokafka ships no types
    errno = 81
    message = "GROUP_MAX_SIZE_REACHED"
    description = "The group has as many members as the brokers allow."


class FencedInstanceIdError(BrokerResponseError):  # type: ignore[misc]  # aiokafka ships no types
    errno = 82
    message = "FENCED_INSTANCE_ID"
    description = "Another member has joined with the same group.instance.id."


for _error in (GroupMaxSizeReachedError, FencedInstanceIdError):
    kafka_errors.kafka_errors.setdefault(_error.errno, _error)

_WRAPPED = re.compile(r"(?:Unexpected exception in heartbeat task: )?(\w+)\(")

_ADVICE: Final = {
    "GroupAuthorizationFailedError": "{group_rights}",
    "TopicAuthorizationFailedError": "{topic_rights}",
    "InvalidSessionTimeoutError": (
        "kafka.session_timeout_ms={session} is refused: set it within the brokers' "
        "group.min.session.timeout.ms (6000 unless changed) and group.max.session.timeout.ms (1800000), "
        "or change those on every broker"
    ),
    "InconsistentGroupProtocolError": (
        "group {group!r} has members of another kind: an application whose consumers share no assignor "
        "with this one (`sticky`); stop it, or give this service a kafka.group_id of its own"
    ),
    "GroupMaxSizeReachedError": (
        "group {group!r} is full: run fewer workers, or raise group.max.size on every broker"
    ),
    "FencedInstanceIdError": (
        "another live worker of group {group!r} has kafka.group_instance_id={instance!r}: "
        "give each worker its own"
    ),
    "InvalidGroupIdError": "the brokers do not take kafka.group_id={group!r}: choose another",
    "UnsupportedVersionError": "the brokers do not speak the group protocol of this worker: use Kafka 2.3 or later",
}


def refusal_of(error: BaseException) -> str | None:
    """The name of the broker's error if it is a refusal and no passing state, else None."""
    name = type(error).__name__
    if name in _ADVICE:
        return name
    if type(error) is KafkaError and (wrapped := _WRAPPED.match(str(error.args[0] if error.args else ""))):
        kind = next((e for e in kafka_errors.kafka_errors.values() if e.__name__ == wrapped[1]), None)
        return None if kind is not None and kind.retriable else wrapped[1]
    return None


def certain(refusal: str, joined: bool) -> bool:
    """Whether to give up at the first such answer: what is known, at start; being fenced, always."""
    return refusal == "FencedInstanceIdError" or (refusal in _ADVICE and not joined)


def refusal_line(kafka: Kafka, topics: Sequence[str], refusal: str) -> str:
    """What is refused to a member that reads the topics, and what to do, on one line."""
    advice = _ADVICE.get(refusal, "group {group!r} does not take this worker")
    text = advice.format(
        group=kafka.group_id,
        session=kafka.session_timeout_ms,
        instance=kafka.group_instance_id,
        group_rights=refused_line(kafka, [Right("READ", "group", kafka.group_id)]),
        topic_rights=refused_line(kafka, [Right("READ", "topic", name) for name in topics]),
    )
    return f"{text} ({refusal})"


class Refusals:
    """How long a member has been refused, and when that is enough."""

    def __init__(self, kafka: Kafka, topics: Sequence[str]) -> None:
        self._kafka = kafka
        self._topics = topics
        self._since = self._last = -math.inf

    def note(self, refusal: str, *, joined: bool) -> None:
        """Raise KafkaRefused: at start at once, once it has ``joined`` when the refusals do not end."""
        why = refusal_line(self._kafka, self._topics, refusal)
        if certain(refusal, joined):
            raise KafkaRefused(why)
        now = time.monotonic()
        if now - self._last > REFUSAL_GAP_S:
            self._since = now
            log.error("Kafka refuses", extra={"error": why})
        self._last = now
        if now - self._since > REFUSED_FOR_S:
            raise KafkaRefused(f"Kafka has refused for {REFUSED_FOR_S:.0f} s: {why}")
