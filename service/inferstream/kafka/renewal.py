"""A connection that died unnoticed is closed when the question for metadata is not answered over it.

aiokafka 0.14 closes a connection over which a request times out, but for this one request
(``AIOKafkaClient._metadata_update``, which asks the connection itself).  Where nothing else is sent over it, as by
a worker that has no partition or has not published yet, it would ask over the dead connection for ever: the
producer finds no topic, and a group's leader that does not know the input topic assigns it to nobody.
"""

from __future__ import annotations

from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.cluster import ClusterMetadata

_ask = AIOKafkaClient._metadata_update


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


def install() -> None:
    """For every client of this process; as often as one likes."""
    AIOKafkaClient._metadata_update = _ask_again
