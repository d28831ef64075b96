"""The group of ``dead-letters replay``: one process holds it, and its commits say what was replayed.

It is an ordinary consumer group, so that the usual tools show and reset it, with an assignor of its own: one
member has every partition, and keeps them when another joins, which sees that it has none and gives up.
Commits carry the generation and the member that hold the group, so the broker refuses those of a process that
has lost it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalGenerationError,
    KafkaError,
    NotCoordinatorForGroupError,
    OffsetMetadataTooLargeError,
    RebalanceInProgressError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    for_code,
)
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest

from inferstream.errors import Incomplete, KafkaRefused
from inferstream.kafka.connection import ask, client_options, connected, start_with_retry, stop_client
from inferstream.kafka.epochs import Identity, current_identity
from inferstream.kafka.refusals import refusal_line, refusal_of
from inferstream.tools.dead_letters_progress import MAX_METADATA, Progress, UnknownProgress

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka

log = logging.getLogger(__name__)

# A group without members forgets ordinary commits after offsets.retention.minutes (7 days), long before the
# dead-letter topic forgets its letters.  OffsetCommit up to v4 lets a commit say its own time, and the brokers
# keep to it.
KEPT_MS = 10 * 365 * 86_400_000
COMMIT_TIMEOUT_S = 30.0
PATIENCE_S = 5.0
STOP_TIMEOUT_S = 5.0
_BACKOFF_S = 0.1
_POLL_S = 0.2
_NEVER_MS = 2**31 - 1
_NOWHERE = TopicPartition("__none__", 0)


def one_holder() -> type[AbstractPartitionAssignor]:
    """An assignor for one membership: ``held`` of the class is the generation in which it last held the group.

    Who held it last keeps it; else the smallest member id gets it.  A class of its own each time, as aiokafka
    keeps the state of an assignor in its class.
    """

    class OneHolder(AbstractPartitionAssignor):  # type: ignore[misc]  # aiokafka ships no types
        name = "inferstream-one-holder"
        held = -1

        @classmethod
        def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
            return ConsumerProtocolMemberMetadata(0, list(topics), b"%d" % cls.held)

        @classmethod
        def assign(
            cls, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
        ) -> dict[str, ConsumerProtocolMemberAssignment]:
            holder = min(members, key=lambda member: (-int(members[member].user_data or b"-1"), member))
            topics = sorted({topic for member in members.values() for topic in member.subscription})
            everything = [(topic, sorted(cluster.partitions_for_topic(topic) or ())) for topic in topics]
            return {
                member: ConsumerProtocolMemberAssignment(0, everything if member == holder else [], b"")
                for member in members
            }

        @classmethod
        def on_assignment(cls, assignment: ConsumerProtocolMemberAssignment) -> None:
            pass

    return OneHolder


class Holding(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """The membership; ``kafka.group_id`` is the replay's group.

    It reads nothing: its partitions are paused, and the only polls are those that keep it alive.
    """

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._kafka = kafka
        self._topic = topic
        self._assignor = one_holder()
        self._consumer = AIOKafkaConsumer(
            **client_options(kafka),
            group_id=kafka.group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=kafka.session_timeout_ms,
            heartbeat_interval_ms=kafka.heartbeat_interval_ms,
            rebalance_timeout_ms=kafka.rebalance_timeout_ms,
            max_poll_interval_ms=_NEVER_MS,
            partition_assignment_strategy=(self._assignor,),
        )
        self._member = ""
        self._identity: Identity | None = None  # None while the group rebalances
        self._settled = asyncio.Event()
        self._problem: Exception | None = None
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Join and wait until the group is held.

        Raises Incomplete if another process holds it, KafkaRefused if the brokers or the group refuse us.
        """
        await start_with_retry(self._kafka, self._consumer.start, self._kafka.connect_timeout_s)
        self._consumer.subscribe(topics=[self._topic], listener=self)
        self._polling = asyncio.create_task(self._poll(), name="keep-alive")
        kafka = self._kafka
        longest_s = (kafka.session_timeout_ms + kafka.rebalance_timeout_ms) / 1000 + kafka.connect_timeout_s
        try:
            async with asyncio.timeout(longest_s):
                if not await self._soon():
                    log.warning(
                        "waiting for the group: one that was killed is in it until its session ends",
                        extra={"group": kafka.group_id, "kafka.session_timeout_ms": kafka.session_timeout_ms},
                    )
                await self.ready()
        except TimeoutError:
            raise Incomplete(
                f"group {kafka.group_id} could not be joined within {longest_s:.0f} s; nothing was replayed"
            ) from None

    async def stop(self) -> None:
        """Leave the group; never raises."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        await stop_client(self._consumer.stop(), STOP_TIMEOUT_S)

    async def commit(self, progress: Mapping[int, Progress]) -> None:
        """Commit what is done, by partition; returns when the broker has it.

        Over a rebalance that leaves the group with us it is sent again under the new generation.  Raises
        Incomplete if the group was lost, or nothing was confirmed in time.
        """
        last: BaseException | None = None
        timeout_s = COMMIT_TIMEOUT_S + self._kafka.rebalance_timeout_ms / 1000
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self.ready()
                    try:
                        return await self._attempt(progress)
                    except (UnknownMemberIdError, IllegalGenerationError, RebalanceInProgressError) as error:
                        last = error
                    except OffsetMetadataTooLargeError:
                        raise KafkaRefused(
                            f"the brokers take less than {MAX_METADATA} characters of metadata with a commit: "
                            "raise their offset.metadata.max.bytes"
                        ) from None
                    except GroupAuthorizationFailedError:
                        raise KafkaRefused(
                            f"no right to commit for group {self._kafka.group_id}: grant READ on it"
                        ) from None
                    except TopicAuthorizationFailedError:
                        raise KafkaRefused(
                            f"no right to commit for topic {self._topic}: grant READ on it"
                        ) from None
                    except KafkaError as error:
                        if not error.retriable:
                            raise
                        last = error
                    await asyncio.sleep(_BACKOFF_S)
        except TimeoutError:
            raise Incomplete(
                f"what was replayed last could not be committed within {timeout_s:.0f} s ({last!r})"
            ) from None

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self._identity = None
        self._settled.clear()

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        identity = current_identity(self._consumer)
        if assigned:
            self._consumer.pause(*assigned)
            self._assignor.held = identity.generation
        else:
            self._problem = Incomplete(
                f"another `dead-letters replay` of group {self._kafka.group_id} is running: nothing was "
                "replayed by this one"
            )
        if self._problem is None and self._member not in ("", identity.member):
            self._problem = Incomplete(
                f"the membership in group {self._kafka.group_id} was lost (the process stood still for longer "
                "than kafka.session_timeout_ms, or the brokers did not reach it)"
            )
        self._member = identity.member
        self._identity = identity
        self._settled.set()

    async def _soon(self) -> bool:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._settled.wait()
        except TimeoutError:
            return False

    async def ready(self) -> None:
        """Wait while the group rebalances; raises what ended the membership."""
        await self._settled.wait()
        if self._problem is not None:
            raise self._problem

    async def _attempt(self, progress: Mapping[int, Progress]) -> None:
        coordinator = self._consumer._coordinator
        await coordinator.ensure_coordinator_known()
        identity = self._identity
        if identity is None or identity != current_identity(self._consumer):
            raise RebalanceInProgressError()
        offsets = [(partition, each.watermark, each.metadata()) for partition, each in progress.items()]
        response = await coordinator._send_req(
            OffsetCommitRequest(
                self._kafka.group_id, identity.generation, identity.member, KEPT_MS, [(self._topic, offsets)]
            )
        )
        for _, partitions in response.topics:
            for partition, code in partitions:
                if code == 0:
                    continue
                error = for_code(code)
                if issubclass(error, NotCoordinatorForGroupError) or error.__name__ in (
                    "GroupCoordinatorNotAvailableError",
                    "RequestTimedOutError",
                ):
                    coordinator.coordinator_dead()
                raise error(f"{self._topic}:{partition}")

    async def _poll(self) -> None:
        """Keep the membership alive, and hear what the group refuses: aiokafka tells it to a poll only."""
        try:
            while True:
                try:
                    await self._consumer.getmany(_NOWHERE, timeout_ms=0)
                except KafkaError as error:
                    if (refusal := refusal_of(error)) is not None:
                        raise KafkaRefused(refusal_line(self._kafka, [self._topic], refusal)) from error
                await asyncio.sleep(_POLL_S)
        except Exception as error:
            self._problem = error
            self._settled.set()


async def committed(kafka: Kafka, topic: str, partitions: int) -> dict[int, Progress]:
    """What the group (``kafka.group_id``) has committed, by partition; needs no membership.

    Raises Incomplete for a commit that this version cannot read, KafkaRefused when the brokers refuse.
    """

    async def look() -> list[tuple[int, int, str | None]]:
        async with connected(kafka) as client:
            found = await ask(client, FindCoordinatorRequest(kafka.group_id, 0))
            _raise_for(found.error_code)
            request = OffsetFetchRequest(kafka.group_id, [(topic, list(range(partitions)))])
            answer = await client.send(found.coordinator_id, request)
            # An error of the whole group comes without partitions: aiokafka's own ways take it for no commits.
            _raise_for(answer.error_code)
            [(_, entries)] = answer.topics
            for *_, code in entries:
                _raise_for(code)
            return [(partition, offset, metadata) for partition, offset, metadata, _ in entries]

    found = await start_with_retry(kafka, look, kafka.connect_timeout_s)
    progress: dict[int, Progress] = {}
    for partition, offset, metadata in found:
        if offset < 0:
            continue
        try:
            progress[partition] = Progress.of(offset, metadata or "")
        except UnknownProgress as error:
            raise Incomplete(
                f"group {kafka.group_id}: the commit of {topic}:{partition} has metadata that this version "
                f"does not know ({error}); nothing was replayed.  Another program commits for this group, or a "
                "later version did"
            ) from None
    return progress


def _raise_for(code: int) -> None:
    if code:
        raise for_code(code)
