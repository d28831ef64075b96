"""A broker's connection that answers nothing any more, as behind a firewall that has forgotten it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.errors import RequestTimedOutError

from inferstream.kafka import renewal


class Connection:
    def __init__(self) -> None:
        self.open = True

    def connected(self) -> bool:
        return self.open

    def close(self) -> None:
        self.open = False


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``AIOKafkaClient._metadata_update`` as installed, over one that is answered by open, healthy connections."""
    monkeypatch.setattr(AIOKafkaClient, "_metadata_update", renewal._ask)
    monkeypatch.setattr(AIOKafkaClient, "send", renewal._send)
    renewal.install()
    yield AIOKafkaClient._metadata_update


class Client:
    def __init__(self, reachable: bool) -> None:
        self.reachable = reachable
        self.default = Connection()
        self.coordination = Connection()
        self._conns = {
            (1, ConnectionGroup.DEFAULT): self.default,
            (1, ConnectionGroup.COORDINATION): self.coordination,
        }
        self.asked = 0

    async def answer(self, metadata: object, topics: object) -> bool:
        """Over the connection there is, which is dead, or over a new one."""
        self.asked += 1
        return self.reachable and not self.default.open


async def test_metadata_when_a_connection_is_dead_then_it_is_closed_and_a_new_one_asked(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "_ask", Client.answer)
    client = Client(reachable=True)
    assert await ask(client, None, set())
    assert not client.default.open
    assert client.coordination.open  # heartbeats go over it, and tell for themselves
    assert client.asked == 2


async def test_metadata_when_no_broker_is_to_be_had_then_the_question_ends(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "_ask", Client.answer)
    client = Client(reachable=False)
    assert not await ask(client, None, set())
    assert client.asked == 2
    assert not await ask(client, None, set())
    assert client.asked == 3  # nothing was left to close


class DeadConnection:
    """Answers nothing; aiokafka's own gives a request that it has waited for too long a TimeoutError."""

    def __init__(self, client: AIOKafkaClient, silence: asyncio.Event) -> None:
        self._client = client
        self._silence = silence

    def connected(self) -> bool:
        return True

    async def send(self, request: object, expect_response: bool) -> None:
        await self._silence.wait()
        raise TimeoutError

    def close(self, reason: object) -> None:
        del self._client._conns[1, ConnectionGroup.DEFAULT]


async def test_requests_when_two_time_out_over_one_connection_then_both_say_so(
    ask: Callable[..., Any],
) -> None:
    client = AIOKafkaClient(bootstrap_servers="broker:1")
    silence = asyncio.Event()
    client._conns[1, ConnectionGroup.DEFAULT] = DeadConnection(client, silence)
    both = [asyncio.create_task(client.send(1, None)) for _ in range(2)]
    await asyncio.sleep(0)
    silence.set()
    for outcome in await asyncio.gather(*both, return_exceptions=True):
        assert isinstance(outcome, RequestTimedOutError)
