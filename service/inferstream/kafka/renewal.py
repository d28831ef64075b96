"""A connection that died unnoticed is closed when the question for metadata is not answered over it.

aiokafka 0.14 closes a connection over which a request times out, but for this one request
(``AIOKafkaClient._metadata_update``, which asks the connection itself).  Where nothing else is sent over it, as by
a worker that has no partition or has not published yet, it would ask over the dead connection for ever: the
producer finds no topic, and a group's leader that does not know the input topic assigns it to nobody.

And a connection that is closed already is not closed again.  Where two requests over one time out together, aiokafka
finds it gone when it wants to close it for the second, and the KeyError ends whichever of its tasks had asked: the
coordination's, and with it the worker.
"""

from __future__ import annotations

from typing import Any

from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import RequestTimedOutError

_ask = AIOKafkaClient._metadata_update
_send = AIOKafkaClient.send


async def _ask_again(client: AIOKafkaClient, metadata: ClusterMetadata, topics: set[str] | None) -> bool:
    """As aiokafka does, and once more over new connections if no broker has answered over those there were."""
    updated: bool = await _ask(client, metadata, topics)
    if updated:
        return True
    silent = [
        connection
        for (_, group), connection in client._conns.items()
        if group == ConnectionGroup.DEFAULT and connection.connected()
    ]
    for connection in silent:  # what else is under way over them is tried again
        connection.close()
    if silent:
        updated = await _ask(client, metadata, topics)
    return updated


async def _send_once(
    client: AIOKafkaClient, node_id: int, request: Any, *, group: Any = ConnectionGroup.DEFAULT
) -> Any:
    """As aiokafka does; RequestTimedOutError also where the connection is closed by the time it has timed out."""
    try:
        return await _send(client, node_id, request, group=group)
    except KeyError as error:
        raise RequestTimedOutError from error


def install() -> None:
    """For every client of this process; as often as one likes."""
    AIOKafkaClient._metadata_update = _ask_again
    AIOKafkaClient.send = _send_once
