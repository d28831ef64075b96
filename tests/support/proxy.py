"""A proxy in front of a broker that understands just enough of Kafka's protocol to lose chosen requests.

It listens on the port that one listener of the broker advertises, so that all connections of the clients that
bootstrap there come through it.  Every request starts with its length, API key,
version and correlation id; every answer with its length and correlation id.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path
from typing import Literal

from tests.support.broker import NativeKafka, free_ports

HEARTBEAT = 12
END_TXN = 26
Loss = Literal["request", "answer"]


class ProxiedKafka(NativeKafka):
    """A broker with a second listener, PROXIED, that sends its clients to ``proxied_port``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.behind_port, self.proxied_port = free_ports(2)
        text = self._properties.read_text()
        for old, new in (
            ("\nlisteners=", f"\nlisteners=PROXIED://127.0.0.1:{self.behind_port},"),
            ("advertised.listeners=", f"advertised.listeners=PROXIED://127.0.0.1:{self.proxied_port},"),
            ("protocol.map=", "protocol.map=PROXIED:PLAINTEXT,"),
        ):
            text = text.replace(old, new)
        self._properties.write_text(f"{text}inter.broker.listener.name=PLAINTEXT\n")


class Proxy:
    """``lose(api_key, what)`` loses the next such request, or its answer; the connection hangs from then on.

    ``hold(api_key)`` keeps all such requests back, and what follows on their connections, until ``go_on(api_key)``.
    """

    def __init__(self, port: int, upstream_port: int) -> None:
        self.port = port
        self._upstream_port = upstream_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_lose: dict[int, Loss] = {}
        self._held: dict[int, asyncio.Event] = {}
        self.lost = asyncio.Event()

    def lose(self, api_key: int, what: Loss) -> None:
        self.lost.clear()
        self._to_lose[api_key] = what

    def hold(self, api_key: int) -> None:
        self._held[api_key] = asyncio.Event()

    def go_on(self, api_key: int) -> None:
        self._held.pop(api_key).set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            unanswered: set[int] = set()
            ways = {
                asyncio.create_task(self._requests(reader, up_writer, unanswered)),
                asyncio.create_task(self._answers(up_reader, writer, unanswered)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                for end in (writer, up_writer):
                    end.close()
        except (OSError, asyncio.CancelledError):
            writer.close()
        finally:
            self._tasks.discard(task)

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unanswered: set[int]
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                frame = await _frame(reader)
                api_key, _, correlation = struct.unpack(">hhi", frame[4:12])
                if (held := self._held.get(api_key)) is not None:
                    await held.wait()
                match self._to_lose.pop(api_key, None):
                    case "request":
                        self.lost.set()
                        await asyncio.Event().wait()  # what follows on this connection is lost as well
                    case "answer":
                        unanswered.add(correlation)
                writer.write(frame)
                await writer.drain()

    async def _answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unanswered: set[int]
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                frame = await _frame(reader)
                (correlation,) = struct.unpack(">i", frame[4:8])
                if correlation in unanswered:
                    self.lost.set()
                    await asyncio.Event().wait()
                writer.write(frame)
                await writer.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """One length-prefixed message, prefix included."""
    prefix = await reader.readexactly(4)
    return prefix + await reader.readexactly(struct.unpack(">i", prefix)[0])
