"""The group's offsets as the coordinator answers them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)
from aiokafka.protocol.commit import OffsetFetchResponse_v1, OffsetFetchResponse_v3
from aiokafka.structs import OffsetAndMetadata

from inferstream.kafka.offsets import committed_offsets

PARTITIONS = [TopicPartition("in", 0), TopicPartition("in", 1)]


class Coordinator:
    """Answers one request."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.dead = False

    async def ensure_coordinator_known(self) -> None: ...

    async def _send_req(self, request: Any) -> Any:
        return self.answer

    def coordinator_dead(self) -> None:
        self.dead = True


async def fetch(coordinator: Coordinator) -> dict[TopicPartition, OffsetAndMetadata]:
    return await committed_offsets(SimpleNamespace(_coordinator=coordinator), "group", PARTITIONS)


async def test_offsets_when_some_are_committed_then_the_others_are_left_out() -> None:
    entries = [(0, 7, "partitions=2", 0), (1, -1, "", 0)]
    for answer in (
        OffsetFetchResponse_v3(0, [("in", entries)], 0),
        OffsetFetchResponse_v1([("in", entries)]),
    ):
        assert await fetch(Coordinator(answer)) == {PARTITIONS[0]: OffsetAndMetadata(7, "partitions=2")}


@pytest.mark.parametrize(
    ("code", "error", "dead"),
    [
        (14, GroupLoadInProgressError, False),
        (16, NotCoordinatorForGroupError, True),
        (30, GroupAuthorizationFailedError, False),
    ],
)
async def test_offsets_when_the_whole_answer_is_an_error_then_it_is_not_taken_for_none(
    code: int, error: type[Exception], dead: bool
) -> None:
    """The group would begin anew, under ``latest`` past all that waits."""
    coordinator = Coordinator(OffsetFetchResponse_v3(0, [], code))

    with pytest.raises(error):
        await fetch(coordinator)

    assert coordinator.dead is dead


async def test_offsets_when_a_topic_was_deleted_then_it_has_none() -> None:
    answer = OffsetFetchResponse_v3(0, [("in", [(0, -1, "", 3), (1, 4, "", 0)])], 0)

    assert await fetch(Coordinator(answer)) == {PARTITIONS[1]: OffsetAndMetadata(4, "")}
