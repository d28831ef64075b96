"""The model of the last result on the output topic: another one than ours deserves a warning.

A new model means a new output topic and group side by side; vectors of two models in one topic compare as
nonsense, and nobody is told.
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from inferstream.kafka.connection import client_options
from inferstream.settings import Settings
from inferstream.tasks import ModelInfo

log = logging.getLogger(__name__)

LOOK_BACK = 20  # records: transaction markers and tombstones may stand behind the last result
TIMEOUT_S = 5.0


async def warn_of_another_model(settings: Settings, partitions: int, ours: ModelInfo) -> None:
    """Compare and log; a topic that cannot be read (no READ right, say) is no reason not to start."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            found = await _last_model(settings, partitions)
    except (KafkaError, TimeoutError) as error:
        log.info("the last result could not be read", extra={"error": repr(error)})
        return
    if found is not None and found != {"id": ours.id, "revision": ours.revision, "dtype": ours.dtype}:
        log.warning(
            "the output topic holds results of another model; a new model should have a new topic and group",
            extra={"there": found, "ours": ours.id, "revision": ours.revision, "dtype": ours.dtype},
        )


async def _last_model(settings: Settings, partitions: int) -> dict[str, str] | None:
    topic = settings.output.topic
    consumer = AIOKafkaConsumer(
        **client_options(settings.kafka),
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # retention may overtake the look back
        isolation_level="read_committed",
    )
    try:
        await consumer.start()
        tps = [TopicPartition(topic, n) for n in range(partitions)]
        consumer.assign(tps)
        ends = {tp: end for tp, end in (await consumer.end_offsets(tps)).items() if end}
        for tp, end in ends.items():
            consumer.seek(tp, max(0, end - LOOK_BACK))
        latest: tuple[int, dict[str, str]] | None = None
        unread = set(ends)
        while unread:
            for records in (await consumer.getmany(*unread, timeout_ms=200)).values():
                for record in records:
                    if record.value and (latest is None or record.timestamp >= latest[0]):
                        model = _model_of(record.value)
                        latest = (record.timestamp, model) if model is not None else latest
            unread = {tp for tp in unread if await consumer.position(tp) < ends[tp]}
        return latest[1] if latest is not None else None
    finally:
        await consumer.stop()


def _model_of(value: bytes) -> dict[str, str] | None:
    try:
        model = orjson.loads(value)["model"]
    except (ValueError, TypeError, KeyError):
        return None  # not one of ours
    return model if isinstance(model, dict) else None
