"""A TCP proxy in front of one broker, for networks that cut, swallow and crawl.

The broker advertises the proxy's port, so that a client that learnt of it from the metadata goes through the
proxy as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

CHUNK = 64 * 1024


class _Connection:
    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.silent = False  # what is sent arrives nowhere, and nobody is told

    def abort(self) -> None:
        for end in (self.client, self.server):
            _reset(end)


def _reset(end: asyncio.StreamWriter) -> None:
    """Close with RST: nothing that is still under way arrives, and the other side is told of an error, no end."""
    with contextlib.suppress(OSError):
        end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()


class Proxy:
    """Listens on ``port`` and passes bytes to and from ``target``, a port of this host.

    ``delay_s`` holds every piece back for that long, per direction; ``bytes_per_s`` is how fast one direction of
    one connection passes them, None for as fast as they come.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.target = target
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self._server: asyncio.Server | None = None
        self._connections: dict[_Connection, asyncio.Task[None]] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._connections.values())
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> int:
        """Reset every connection; says how many there were.  New ones pass."""
        for connection in (open_now := list(self._connections)):
            connection.abort()
        return len(open_now)

    def silence(self) -> int:
        """Swallow what the present connections carry, without closing them; says how many.  New ones pass."""
        for connection in (open_now := list(self._connections)):
            connection.silent = True
        return len(open_now)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # the broker is away
            _reset(writer)
            return
        connection = _Connection(writer, server_writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections[connection] = task
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(connection, reader, server_writer))
                both.create_task(self._pass(connection, server_reader, writer, back=True))
        except* (OSError, EOFError):
            pass
        finally:
            del self._connections[connection]
            connection.abort()

    async def _pass(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: bool = False,
    ) -> None:
        """Copy one direction until it ends, which ends the other one too."""
        while data := await reader.read(CHUNK):
            seconds = self.delay_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0)
            if seconds:
                await asyncio.sleep(seconds)
            if not connection.silent:
                writer.write(data)
                await writer.drain()
        if back and connection.silent:
            # The broker gave up an idle connection; the client must not hear of it.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        raise EOFError
