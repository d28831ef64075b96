"""Reads topics with librdkafka, which shares no code with the client that the service is built on.

What ``read_committed`` hides is then not judged by the library under test.
"""

from __future__ import annotations

import time

from aiokafka import ConsumerRecord
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from tests.support.client import DEADLINE_S

AT_ONCE = 1000  # messages of one call


def consumer(bootstrap: str, isolation: str = "read_committed", **options: str | int | bool) -> Consumer:
    """One that joins no group and says nothing of brokers that are away."""
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "nobody",  # librdkafka asks for one; nothing is subscribed or committed
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "isolation.level": isolation,
            "fetch.wait.max.ms": 50,
            "reconnect.backoff.max.ms": 500,
            "log_level": 0,
            **options,
        }
    )


def read_all(bootstrap: str, topic: str, isolation: str = "read_committed") -> list[ConsumerRecord]:
    """The topic from its beginning to its end, partition by partition in offset order.  Blocks.

    The records look as aiokafka's do.  KafkaException if the topic is missing, TimeoutError if its end is not
    reached within DEADLINE_S.
    """
    reader = consumer(bootstrap, isolation, **{"enable.partition.eof": True})
    try:
        found = reader.list_topics(topic, timeout=DEADLINE_S).topics[topic]
        if found.error is not None:
            raise KafkaException(found.error)
        left = set(found.partitions)
        reader.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in left])
        records = []
        deadline = time.monotonic() + DEADLINE_S
        while left:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} is not read to its end after {DEADLINE_S:.0f} s: {sorted(left)}")
            for message in reader.consume(AT_ONCE, 0.2):
                error = message.error()
                if error is None:
                    records.append(_record(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
    finally:
        reader.close()
    return sorted(records, key=lambda record: (record.partition, record.offset))


def _record(message: Message) -> ConsumerRecord:
    key, value = message.key(), message.value()
    kind, timestamp = message.timestamp()
    return ConsumerRecord(
        message.topic(),
        message.partition(),
        message.offset(),
        timestamp,
        kind,
        key,
        value,
        None,
        -1 if key is None else len(key),
        -1 if value is None else len(value),
        tuple(message.headers() or ()),
    )
