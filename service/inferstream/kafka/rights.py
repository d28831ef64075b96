"""What the brokers allow us to do, asked for before it is tried (KIP-430), and the line that says what to grant.

Without the right to describe it, a topic or group that exists and one that does not look the same to us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from aiokafka import errors as kafka_errors
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IncompatibleBrokerVersion,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.protocol.admin import DescribeGroupsRequest_v3 as _DescribeGroupsRequest_v3
from aiokafka.protocol.admin import DescribeGroupsResponse_v3
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v5
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka

Operation = Literal["READ", "WRITE", "DESCRIBE", "CREATE", "DESCRIBE_CONFIGS", "IDEMPOTENT_WRITE"]
Kind = Literal["topic", "group", "transactional id", "cluster"]

# The bit of each operation in an authorized_operations field is its AclOperation code.
_CODES: Final[dict[Operation, int]] = {
    "READ": 3,
    "WRITE": 4,
    "CREATE": 5,
    "DESCRIBE": 8,
    "DESCRIBE_CONFIGS": 10,
    "IDEMPOTENT_WRITE": 12,
}
_NOT_TOLD = -(1 << 31)


@dataclass(frozen=True, slots=True)
class Right:
    """An operation on a resource, in the words of Kafka's ACLs."""

    operation: Operation
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.operation} on {self.kind} {self.name}"


def principal(kafka: Kafka) -> str:
    """Who we are to the brokers' ACLs, as far as that can be known here."""
    security = kafka.security
    if security.mechanism is not None:
        return f"User:{security.username}"
    if security.cert_file is not None:
        return f"the subject of {security.cert_file} (User:CN=… unless the brokers map it)"
    return "User:ANONYMOUS"


def refused_line(kafka: Kafka, missing: Iterable[Right]) -> str:
    """What to grant to whom, on one line."""
    *head, last = dict.fromkeys(map(str, missing))
    listed = f"{', '.join(head)} and {last}" if head else last
    return f"not authorized: grant {listed} to {principal(kafka)}"


def lacking(
    needed: Sequence[Right], denied: Iterable[str], operations: Mapping[str, int | None]
) -> list[Right]:
    """Those of the needed rights on topics that we have not.

    ``denied`` are the topics that we may not even describe; ``operations`` has the field of each other topic, None
    where the brokers do not tell.
    """
    unseen = set(denied)
    described = {right.name for right in needed if right.kind == "topic"}
    missing = [
        right
        for right in needed
        if right.kind == "topic"
        and (right.name in unseen or not _allows(operations.get(right.name), right.operation))
    ]
    return missing + [Right("DESCRIBE", "topic", name) for name in sorted(unseen - described)]


async def lacking_elsewhere(client: AIOKafkaClient, needed: Sequence[Right]) -> list[Right]:
    """Those of the needed rights on groups and transactional ids that we have not.

    The right to write a transactional id cannot be asked for: only one that we may not describe is found.
    Raises aiokafka's KafkaError when no broker answers.
    """
    missing = []
    for right in needed:
        if right.kind == "group" and not await _group_allows(client, right):
            missing.append(right)
        elif right.kind == "transactional id":
            try:
                await client.coordinator_lookup(CoordinationType.TRANSACTION, right.name)
            except TransactionalIdAuthorizationFailed:
                missing.append(right)
    return missing


async def _group_allows(client: AIOKafkaClient, right: Right) -> bool:
    try:
        node = await client.coordinator_lookup(CoordinationType.GROUP, right.name)
        answer = await client.send(node, _GroupsRequest([right.name]))
    except GroupAuthorizationFailedError:
        return False
    except (IncompatibleBrokerVersion, NotImplementedError):
        return True  # a broker that does not tell, such as the embedded one: joining will
    [(code, *_, operations)] = answer.groups
    if kafka_errors.for_code(code) is GroupAuthorizationFailedError:
        return False
    return code != 0 or _allows(operations, right.operation)


def _allows(operations: int | None, operation: Operation) -> bool:
    return operations is None or operations == _NOT_TOLD or bool(operations >> _CODES[operation] & 1)


class _MetadataResponse_v8(Response):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            Array(("node_id", Int32), ("host", String("utf-8")), ("port", Int32), ("rack", String("utf-8"))),
        ),
        ("cluster_id", String("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", String("utf-8")),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _MetadataRequest_v8(RequestStruct):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _MetadataResponse_v8
    SCHEMA = Schema(
        ("topics", Array(String("utf-8"))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class TopicsRequest(Request[MetadataRequest_v5 | _MetadataRequest_v8]):  # type: ignore[misc]
    """Metadata of topics, which are not created by asking; from version 8 on with what we may do to them."""

    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: Any) -> Any:
        if request_struct_class.API_VERSION < 8:
            return request_struct_class(self._topics, False)
        return request_struct_class(self._topics, False, False, True)


class _GroupsRequest_v3(_DescribeGroupsRequest_v3):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 15
    API_VERSION = 3
    RESPONSE_TYPE = DescribeGroupsResponse_v3  # aiokafka 0.14 reads it as version 2, without the operations
    SCHEMA = _DescribeGroupsRequest_v3.SCHEMA


class _GroupsRequest(Request[_GroupsRequest_v3]):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 15

    def __init__(self, groups: list[str]) -> None:
        self._groups = groups

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(self._groups, True)
