"""The proxy does to connections what the faults say it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.broker import free_ports
from tests.support.network import Proxy

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """In front of a server that says back what it hears."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    port, target = free_ports(2)
    server = await asyncio.start_server(echo, "127.0.0.1", target)
    proxy = Proxy(port, target)
    await proxy.start()
    yield proxy
    await proxy.stop()
    server.close()


async def connected(proxy: Proxy) -> Ends:
    ends = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await asked(ends) == b"ping"
    return ends


async def asked(ends: Ends) -> bytes:
    ends[1].write(b"ping")
    return await ends[0].read(4)


async def test_cut_when_connections_are_open_then_they_are_reset_and_new_ones_pass(proxy: Proxy) -> None:
    reader, _ = await connected(proxy)
    assert proxy.cut() == 1
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    await connected(proxy)


async def test_silence_when_connections_are_open_then_they_stay_without_answers(proxy: Proxy) -> None:
    silent = await connected(proxy)
    assert proxy.silence() == 1
    await connected(proxy)  # new ones pass, and pass later than what the silent one was asked before
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asked(silent)


async def test_accept_when_the_broker_is_away_then_the_client_is_refused(proxy: Proxy) -> None:
    proxy.target = free_ports(1)[0]
    reader, _ = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
