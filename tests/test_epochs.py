"""Who may take up again what was revoked."""

from __future__ import annotations

import pytest
from aiokafka import TopicPartition

from inferstream.kafka.epochs import Identity, Suspended
from inferstream.lanes import Lane

WAS = Identity(7, "me")


@pytest.mark.parametrize(
    ("identity", "follows"),
    [
        (Identity(8, "me"), True),
        (Identity(7, "me"), True),  # nobody was given anything meanwhile
        (Identity(9, "me"), False),  # in generation 8 the partitions may have been anybody's
        (Identity(6, "me"), False),
        (Identity(8, "another"), False),
        (Identity(-1, ""), False),
    ],
)
def test_identity_when_it_is_the_same_member_in_the_next_generation_then_it_follows(
    identity: Identity, follows: bool
) -> None:
    assert identity.follows(WAS) is follows


def test_lost_identity_when_it_is_compared_with_itself_then_it_does_not_follow() -> None:
    assert not Identity(-1, "").follows(Identity(-1, ""))


def test_lanes_when_only_some_partitions_come_back_then_only_theirs_do() -> None:
    lanes = {TopicPartition("in", n): Lane("in", n, 1, 0) for n in range(3)}
    suspended = Suspended(WAS, lanes)
    assigned = {TopicPartition("in", 1), TopicPartition("in", 3)}
    assert suspended.coming_back(Identity(8, "me"), assigned) == {
        TopicPartition("in", 1): lanes[TopicPartition("in", 1)]
    }
    assert suspended.coming_back(Identity(9, "me"), assigned) == {}
