"""Epochs: who we were when partitions were given to us.

The coordinator fences a commit by (generation, member).  aiokafka reads both at the moment it sends, so a
commit that was computed before a rebalance and is sent after it goes out under the new identity and may move
another member's offset.  An epoch therefore captures its identity when its lanes are built, every commit is
sent with the captured one, and every attempt first checks that it is still current.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, TopicPartition

from inferstream.kafka.caution import Caution
from inferstream.kafka.notes import Note
from inferstream.lanes import Lane


@dataclass(frozen=True, slots=True)
class Identity:
    """A member of one generation of the group, as the coordinator knows it."""

    generation: int
    member: str

    @property
    def valid(self) -> bool:
        """False for (-1, ''): what aiokafka holds after it has lost its session."""
        return self.generation >= 0 and self.member != ""

    def follows(self, earlier: Identity) -> bool:
        """Whether what was ours then and is ours now cannot have been another member's in between.

        It is so for the same member in the next generation: had there been one between the two, the group could
        have given the partitions to somebody else for its time.  In the same one nothing was given to anybody.
        """
        return (
            self.valid
            and self.member == earlier.member
            and self.generation in (earlier.generation, earlier.generation + 1)
        )


def current_identity(consumer: AIOKafkaConsumer) -> Identity:
    """The identity the consumer holds right now."""
    coordinator = consumer._coordinator
    return Identity(coordinator.generation, coordinator.member_id)


@dataclass(slots=True, eq=False)
class Epoch:
    """One assignment: its identity and its lanes.

    ``gate`` opens when every lane has its start offset and that offset is committed; before, nothing is
    admitted.  ``closing`` means that nothing more is admitted.  ``resuming`` are the partitions whose lanes come
    from the epoch before; they are suspended until the gate opens.  ``noted`` are those whose commits say that a
    process may be dying of them, with what they are to say instead if the epoch ends in order before they move.
    """

    number: int
    identity: Identity
    lanes: dict[TopicPartition, Lane]
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    closing: bool = False
    resuming: set[TopicPartition] = field(default_factory=set)
    noted: dict[TopicPartition, Note] = field(default_factory=dict)
    condemned: dict[TopicPartition, int] = field(default_factory=dict)
    caution: Caution | None = None
    opener: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Suspended:
    """The lanes of an epoch that has ended, as long as they may come back; see :meth:`Identity.follows`."""

    identity: Identity
    lanes: dict[TopicPartition, Lane]

    def coming_back(
        self, identity: Identity, assigned: Collection[TopicPartition]
    ) -> dict[TopicPartition, Lane]:
        """The lanes that go on in the epoch of ``identity``, to which ``assigned`` was given."""
        if not identity.follows(self.identity):
            return {}
        return {tp: lane for tp, lane in self.lanes.items() if tp in assigned}
