"""Transactions on the wire, as aiokafka 0.14 does not do them: KIP-98 with the offsets of KIP-447.

aiokafka's producer is used for what it does well: InitProducerId, and producing transactional batches in order.
The rest of a transaction is here, because of four things that were seen with 0.14.0 on a real Kafka:

* TxnOffsetCommit is sent as v0, which carries no member: the broker would take a zombie's offsets.  v3 (KIP-447)
  carries generation, member and instance, and the broker refuses those of an ended epoch.  With (-1, '') it
  refuses nothing, so that is never sent.
* After an error inside a transaction ``abort_transaction()`` sends nothing, and the next commit of the same
  producer publishes the aborted records.
* ``commit_transaction()`` succeeds although a send in the transaction has failed.
* OffsetFetch is sent as v3, which does not know ``require_stable`` (v7, KIP-447): right after a transaction it may
  still give the offset from before.

Nothing here aborts: who sees an error throws the producer away and makes a new one with the same transactional
id, whose InitProducerId has the broker end what is open, one way or the other, and refuse the old one (KIP-360).

As this leans on aiokafka's insides, it runs with the versions it was tested with and no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import aiokafka
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.errors import (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    InvalidTransactionTimeout,
    KafkaError,
    NotCoordinatorError,
    RequestTimedOutError,
    for_code,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
)
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)
from aiokafka.structs import OffsetAndMetadata

from inferstream.errors import KafkaRefused, SettingsError
from inferstream.kafka.epochs import Identity

log = logging.getLogger(__name__)

TESTED_WITH: Final = ("0.14.0",)
RETRY_BACKOFF_S = 0.05
# The broker writes the markers of a transaction after it has answered EndTxn, and until then refuses the next.
FIRST_MARKERS_BACKOFF_S = 0.002
MARKERS_BACKOFF_S = 0.02
DISCARD_LOOK_S = 0.02

NO_ERROR: Final = 0
ILLEGAL_GENERATION: Final = 22
UNKNOWN_MEMBER_ID: Final = 25
REBALANCE_IN_PROGRESS: Final = 27
INVALID_PRODUCER_EPOCH: Final = 47
CONCURRENT_TRANSACTIONS: Final = 51
OPERATION_NOT_ATTEMPTED: Final = 55
FENCED_INSTANCE_ID: Final = 82
UNSTABLE_OFFSET_COMMIT: Final = 88
PRODUCER_FENCED: Final = 90

_EPOCH_ENDED = (ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID)
_FENCED = (INVALID_PRODUCER_EPOCH, PRODUCER_FENCED)
_COORDINATOR_GONE = (CoordinatorNotAvailableError, NotCoordinatorError, RequestTimedOutError)


class Fenced(KafkaError):  # type: ignore[misc]  # aiokafka ships no types
    """The broker knows a newer producer with this transactional id, or has timed the transaction out."""


class MemberGone(Exception):
    """The group has gone on: it refuses offsets of this generation, member or instance.

    ``rejoin``: it does not know this member any more, which will have to join again.
    """

    def __init__(self, why: str, *, rejoin: bool = False) -> None:
        super().__init__(why)
        self.rejoin = rejoin


# ---------------------------------------------------------------- what aiokafka has no class for


class _TxnOffsetCommitResponse(Response):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 28
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(("partition", Int32), ("error_code", Int16), ("tags", TaggedFields)),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _TxnOffsetCommitStruct(RequestStruct):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 28
    API_VERSION = 3
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _TxnOffsetCommitResponse
    SCHEMA = Schema(
        ("transactional_id", CompactString("utf-8")),
        ("group_id", CompactString("utf-8")),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation_id", Int32),
        ("member_id", CompactString("utf-8")),
        ("group_instance_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("committed_offset", Int64),
                        ("committed_leader_epoch", Int32),
                        ("committed_metadata", CompactString("utf-8")),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommitRequest(Request[_TxnOffsetCommitStruct]):  # type: ignore[misc]  # aiokafka ships no types
    """TxnOffsetCommit v3 (KIP-447); ``fields`` in the order of its schema."""

    API_KEY = 28

    def __init__(self, *fields: Any) -> None:
        self._fields = fields

    def build(self, request_struct_class: type[_TxnOffsetCommitStruct]) -> _TxnOffsetCommitStruct:
        return request_struct_class(*self._fields)


class _OffsetFetchResponse(Response):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("committed_offset", Int64),
                        ("committed_leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class _OffsetFetchStruct(RequestStruct):  # type: ignore[misc]  # aiokafka ships no types
    API_KEY = 9
    API_VERSION = 7
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _OffsetFetchResponse
    SCHEMA = Schema(
        ("group_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("partitions", CompactArray(Int32)),
                ("tags", TaggedFields),
            ),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class OffsetFetchRequest(Request[_OffsetFetchStruct]):  # type: ignore[misc]  # aiokafka ships no types
    """OffsetFetch v7 (KIP-447); ``fields`` in the order of its schema."""

    API_KEY = 9

    def __init__(self, *fields: Any) -> None:
        self._fields = fields

    def build(self, request_struct_class: type[_OffsetFetchStruct]) -> _OffsetFetchStruct:
        return request_struct_class(*self._fields)


# ---------------------------------------------------------------- the producer


class TransactionalProducer(AIOKafkaProducer):  # type: ignore[misc]  # aiokafka ships no types
    """A producer for one transaction after the other, each begun by :meth:`begin`.

    All methods raise aiokafka's KafkaError, :class:`Fenced` among them.  Those that wait for a coordinator do
    so until they are cancelled.  After an error, or when one was cancelled, call :meth:`discard`.
    """

    def __init__(self, transactional_id: str, **options: Any) -> None:
        if aiokafka.__version__ not in TESTED_WITH:
            raise SettingsError(
                f"delivery.guarantee: exactly-once was tested with aiokafka {', '.join(TESTED_WITH)} and "
                f"leans on its insides, but {aiokafka.__version__} is installed: install the tested one, "
                "or use at-least-once"
            )
        super().__init__(transactional_id=transactional_id, **options)
        self._id = transactional_id
        self._in_transaction: set[TopicPartition] = set()  # partitions the coordinator knows to be part of it
        self._to_add: set[TopicPartition] = set()
        self._adding = asyncio.Lock()
        self._group_added = False
        self.since: float | None = None
        """When the broker may first have heard of the transaction (monotonic seconds); None before."""

    async def start(self) -> None:
        """Connect, and have the broker end what a predecessor with this id left open.

        KafkaRefused if the brokers are too old, or do not take the transaction's timeout.
        """
        try:
            await super().start()
        except InvalidTransactionTimeout as error:
            raise KafkaRefused(
                f"delivery.transaction_timeout_ms={self._txn_manager.transaction_timeout_ms} is more than the "
                "brokers' transaction.max.timeout.ms: lower it"
            ) from error
        manager = self._txn_manager
        # aiokafka sends nothing transactional by itself as long as it knows no pending partition or offset, so
        # its state machine stays where sending is allowed for the producer's whole life.
        manager.begin_transaction()
        manager.wait_for_transaction_end().add_done_callback(lambda end: end.exception())
        self._in_transaction = manager.txn_partitions
        await self._require_new_brokers()

    async def _require_new_brokers(self) -> None:
        connection = None
        while connection is None:
            node = await self._coordinator(CoordinationType.TRANSACTION, self._id)
            connection = self.client._conns.get((node, ConnectionGroup.COORDINATION))
        for request in (_TxnOffsetCommitStruct, _OffsetFetchStruct):
            lowest, highest = connection._versions.get(request.API_KEY, (0, -1))
            if not lowest <= request.API_VERSION <= highest:
                raise KafkaRefused(
                    "delivery.guarantee: exactly-once needs brokers that keep a group's zombies out of "
                    "transactions (KIP-447), Apache Kafka 2.5 or later: upgrade them, or use at-least-once"
                )

    def begin(self) -> None:
        """Begin the first transaction, or the next after :meth:`commit`; the broker hears of it when it grows."""
        self._in_transaction.clear()
        self._group_added = False
        self.since = None

    def _begun(self) -> None:
        if self.since is None:
            self.since = time.monotonic()

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> Any:
        """As aiokafka's, once the coordinator knows the partition to be part of the transaction."""
        tp = TopicPartition(topic, partition)
        if tp not in self._in_transaction:
            await self._add_partition(tp)
        return await super().send_batch(batch, topic, partition=partition)

    async def _add_partition(self, tp: TopicPartition) -> None:
        self._to_add.add(tp)
        async with self._adding:  # what comes meanwhile goes into the next request together
            if tp in self._in_transaction:
                return
            self._begun()
            asked = sorted(self._to_add)
            topics: defaultdict[str, list[int]] = defaultdict(list)
            for topic, partition in asked:
                topics[topic].append(partition)

            def request() -> Any:
                manager = self._txn_manager
                return AddPartitionsToTxnRequest(
                    self._id, manager.producer_id, manager.producer_epoch, list(topics.items())
                )

            await self._transact(
                request,
                lambda answer: [
                    (f"{topic}:{partition}", code)
                    for topic, partitions in answer.errors
                    for partition, code in partitions
                ],
            )
            self._in_transaction.update(asked)
            self._to_add.difference_update(asked)

    async def add_group(self, group_id: str) -> None:
        """Have the transaction take offsets of the group; at once if it does already."""
        if self._group_added:
            return
        self._begun()
        manager = self._txn_manager
        await self._transact(
            lambda: AddOffsetsToTxnRequest(self._id, manager.producer_id, manager.producer_epoch, group_id),
            lambda answer: [(group_id, answer.error_code)],
        )
        self._group_added = True

    async def commit_offsets(
        self,
        group_id: str,
        identity: Identity,
        instance: str | None,
        offsets: Mapping[TopicPartition, tuple[int, str]],
        still: Callable[[], None],
    ) -> None:
        """Put the offsets (next offset and metadata per partition) into the transaction.

        ``still`` is called before each attempt and raises if the identity is not the current one any more;
        MemberGone if the broker says so.
        """
        topics: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)
        for tp, (offset, metadata) in offsets.items():
            topics[tp.topic].append((tp.partition, offset, -1, metadata, {}))
        while True:
            node = await self._coordinator(CoordinationType.GROUP, group_id)
            still()
            if not identity.valid:  # the broker would take it, whoever owns the partitions now
                raise MemberGone("an identity that is none")
            request = TxnOffsetCommitRequest(
                self._id,
                group_id,
                self._txn_manager.producer_id,
                self._txn_manager.producer_epoch,
                identity.generation,
                identity.member,
                instance,
                [(topic, partitions, {}) for topic, partitions in topics.items()],
                {},
            )
            answer = await self.client.send(node, request, group=ConnectionGroup.COORDINATION)
            errors = [
                (f"{topic}:{partition}", code)
                for topic, partitions, _ in answer.topics
                for partition, code, _ in partitions
            ]
            if not await self._again(errors, CoordinationType.GROUP):
                return

    async def commit(self) -> None:
        """End the transaction.  Whatever is raised: it may be committed all the same (see the module)."""
        manager = self._txn_manager
        await self._transact(
            lambda: EndTxnRequest(self._id, manager.producer_id, manager.producer_epoch, True),
            lambda answer: [("EndTxn", answer.error_code)],
        )

    async def stable_offsets(
        self, group_id: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """The group's committed offsets, once no transaction that could change them is pending.

        Partitions without one are left out.
        """
        topics: defaultdict[str, list[int]] = defaultdict(list)
        for tp in sorted(partitions):
            topics[tp.topic].append(tp.partition)
        request = OffsetFetchRequest(
            group_id, [(topic, numbers, {}) for topic, numbers in topics.items()], True, {}
        )
        waiting = False
        while True:
            node = await self._coordinator(CoordinationType.GROUP, group_id)
            answer = await self.client.send(node, request, group=ConnectionGroup.COORDINATION)
            errors = [("group", answer.error_code)]
            found: dict[TopicPartition, OffsetAndMetadata] = {}
            for topic, entries, _ in answer.topics:
                for partition, offset, _, metadata, code, _ in entries:
                    errors.append((f"{topic}:{partition}", code))
                    if offset >= 0:
                        found[TopicPartition(topic, partition)] = OffsetAndMetadata(offset, metadata)
            if any(code == UNSTABLE_OFFSET_COMMIT for _, code in errors):
                if not waiting:
                    log.info("waiting for a transaction on these partitions to end")
                waiting = True
                await asyncio.sleep(RETRY_BACKOFF_S)
            elif not await self._again(errors, CoordinationType.GROUP):
                return found

    async def discard(self) -> None:
        """Close the connections and forget what is not sent; nothing more leaves this producer."""
        self._closed = True
        sending = self._sender.sender_task
        if sending is not None:
            sending.cancel()
        await self.client.close()  # what the sender waits for fails now
        while sending is not None and not sending.done():
            # ... but for fresh metadata, which nobody fetches any more
            if (metadata := self.client._md_update_fut) is not None and not metadata.done():
                metadata.set_result(False)
            await asyncio.wait({sending}, timeout=DISCARD_LOOK_S)

    async def _transact(
        self, request: Callable[[], Any], errors_of: Callable[[Any], list[tuple[str, int]]]
    ) -> None:
        """Send to the transaction's coordinator until it neither moves nor is busy with the last transaction."""
        backoff_s = FIRST_MARKERS_BACKOFF_S
        while True:
            node = await self._coordinator(CoordinationType.TRANSACTION, self._id)
            answer = await self.client.send(node, request(), group=ConnectionGroup.COORDINATION)
            errors = errors_of(answer)
            if any(code == CONCURRENT_TRANSACTIONS for _, code in errors):
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MARKERS_BACKOFF_S)
            elif not await self._again(errors, CoordinationType.TRANSACTION):
                return

    async def _coordinator(self, kind: Any, key: str) -> Any:
        return await self._sender._find_coordinator(kind, key)

    async def _again(self, errors: Collection[tuple[str, int]], kind: Any) -> bool:
        """Whether the coordinator has to be asked again, after some time; raises what is no matter of time."""
        again = False
        for where, code in errors:
            if code in (NO_ERROR, OPERATION_NOT_ATTEMPTED):  # the second: another entry is at fault
                continue
            if code in _EPOCH_ENDED:
                forgotten = code in (ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID)
                raise MemberGone(for_code(code).__name__, rejoin=forgotten)
            if code in _FENCED:
                raise Fenced(for_code(code).__name__)
            error = for_code(code)
            if issubclass(error, _COORDINATOR_GONE):
                self._sender._coordinator_dead(kind)
            elif not issubclass(error, CoordinatorLoadInProgressError):
                raise error(where)
            again = True
        if again:
            await asyncio.sleep(RETRY_BACKOFF_S)
        return again
