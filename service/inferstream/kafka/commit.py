"""OffsetCommit with the identity of the epoch that did the work.

aiokafka's own ``commit()`` retries for ever and reads generation and member at send time.  Here each attempt
checks the captured identity first and is sent with it, so that the broker refuses what an ended epoch sends
even if the check and the send are separated by a rebalance.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalGenerationError,
    KafkaError,
    NotCoordinatorForGroupError,
    RebalanceInProgressError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    for_code,
)
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.structs import OffsetAndMetadata

from inferstream.kafka.epochs import Epoch, current_identity
from inferstream.kafka.offsets import committed_offsets
from inferstream.lanes import Lane
from inferstream.telemetry.timeline import Timeline

log = logging.getLogger(__name__)

RETRY_BACKOFF_S = 0.1


class EpochEnded(Exception):
    """The epoch is over: its offsets must not be committed any more."""


class CommitFailed(Exception):
    """The commit did not succeed in its time; it can be tried again on the next tick."""


class CommitRefused(CommitFailed):
    """The broker refuses the commit for want of a right; the message is its error's name."""


class Settler(Protocol):
    """What makes the progress of lanes durable: OffsetCommit, or a transaction (``transactions.py``)."""

    async def settle(
        self, epoch: Epoch, committed: Mapping[Lane, int], metadata: Mapping[str, str], timeout_s: float
    ) -> dict[Lane, tuple[int, int]]:
        """Commit what has moved past ``committed`` (lane → offset), with the metadata of each topic.

        Gives, for each lane that moved, the offset that is committed now and how many settled slots it covers.
        Raises EpochEnded, CommitRefused or CommitFailed.
        """
        ...

    async def offsets(
        self, assigned: Collection[TopicPartition], others: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """The group's committed offsets; partitions without one are left out.

        Those of ``assigned`` are to start from; those of ``others`` may be about to change.
        """
        ...

    def abandon(self) -> None:
        """The epoch is over: what of it is not settled must not be settled any more."""
        ...


_ENDED = (UnknownMemberIdError, IllegalGenerationError, RebalanceInProgressError)
_REFUSED = (GroupAuthorizationFailedError, TopicAuthorizationFailedError)


class Committer:
    """Commits offsets for an epoch, one commit at a time."""

    def __init__(self, consumer: AIOKafkaConsumer, group_id: str, timeline: Timeline) -> None:
        self._timeline = timeline
        self._consumer = consumer
        self._group_id = group_id
        self._lock = asyncio.Lock()

    async def settle(
        self, epoch: Epoch, committed: Mapping[Lane, int], metadata: Mapping[str, str], timeout_s: float
    ) -> dict[Lane, tuple[int, int]]:
        """Commit the watermarks; see :class:`Settler`."""
        moved = {
            tp: lane
            for tp, lane in epoch.lanes.items()
            if lane in committed and lane.watermark > committed[lane]
        }
        offsets = {tp: (lane.watermark, metadata.get(tp.topic, "")) for tp, lane in moved.items()}
        covered = {lane: (lane.watermark, lane.settled) for lane in moved.values()}
        await self.commit(epoch, offsets, timeout_s)
        return covered

    async def offsets(
        self, assigned: Collection[TopicPartition], others: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, OffsetAndMetadata]:
        return await committed_offsets(self._consumer, self._group_id, [*assigned, *others])

    def abandon(self) -> None:
        """What was handed to the producer may still land, and is then repeated by the next owner."""

    async def commit(
        self, epoch: Epoch, offsets: Mapping[TopicPartition, tuple[int, str]], timeout_s: float
    ) -> None:
        """Commit ``offsets`` (next offset and metadata per partition).

        Raises EpochEnded when the identity has changed or the broker says so, CommitRefused for a missing
        right, CommitFailed when it was not confirmed within ``timeout_s``.
        """
        if not offsets:
            return
        last: BaseException | None = None
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                while True:
                    try:
                        await self._attempt(epoch, offsets)
                        self._timeline.span("commit", "commit", started, time.monotonic())
                        return
                    except _ENDED as error:
                        raise EpochEnded(str(error)) from error
                    except _REFUSED as error:
                        raise CommitRefused(type(error).__name__) from error
                    except KafkaError as error:
                        last = error
                        if not error.retriable:
                            raise CommitFailed(f"{type(error).__name__}: {error}") from error
                    await asyncio.sleep(RETRY_BACKOFF_S)
        except TimeoutError:
            raise CommitFailed(f"not confirmed within {timeout_s:.1f} s ({last!r})") from None

    async def _attempt(self, epoch: Epoch, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        coordinator = self._consumer._coordinator
        await coordinator.ensure_coordinator_known()
        identity = epoch.identity
        if not identity.valid or identity != current_identity(self._consumer):
            raise EpochEnded(f"the group has moved on from generation {identity.generation}")
        topics: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for tp, (offset, metadata) in offsets.items():
            topics[tp.topic].append((tp.partition, offset, metadata))
        request = OffsetCommitRequest(
            self._group_id,
            identity.generation,
            identity.member,
            OffsetCommitRequest.DEFAULT_RETENTION_TIME,
            list(topics.items()),
        )
        response = await coordinator._send_req(request)
        for topic, partitions in response.topics:
            for partition, code in partitions:
                if code == 0:
                    continue
                error = for_code(code)
                if issubclass(error, NotCoordinatorForGroupError) or error.__name__ in (
                    "GroupCoordinatorNotAvailableError",
                    "RequestTimedOutError",
                ):
                    coordinator.coordinator_dead()
                if (
                    issubclass(error, UnknownMemberIdError | IllegalGenerationError)
                    and identity == current_identity(self._consumer)  # else it is not the new one's fault
                ):
                    # the heartbeat will hear the same and rejoin; waiting for it would only cost time
                    coordinator.reset_generation()
                raise error(f"{topic}:{partition}")
