"""The fixtures themselves: a real broker, that keeps what it was given whatever is done to it."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import MessageSizeTooLargeError, UnknownTopicOrPartitionError

from tests.support.broker import Broker
from tests.support.client import Kafka, Sent


async def test_produce_when_partition_given_then_record_comes_back_whole(kafka: Kafka) -> None:
    topic = await kafka.create_topic(kafka.unique("fixture"), partitions=3)
    headers = [("trace", b"7"), ("empty", None)]

    placed = await kafka.produce(
        topic, [Sent(b"k", b"first", headers, 2), (None, b"second", (), 0), (b"gone", None, (), 0)]
    )

    records = await kafka.read_all(topic)
    assert placed == [(2, 0), (0, 0), (0, 1)]
    assert [(r.key, r.value) for r in records] == [(None, b"second"), (b"gone", None), (b"k", b"first")]
    [whole] = [r for r in records if r.value == b"first"]
    assert (whole.partition, whole.offset, list(whole.headers)) == (2, 0, headers)


async def test_commit_when_group_has_read_then_offset_is_found(kafka: Kafka) -> None:
    topic = await kafka.create_topic(kafka.unique("fixture"))
    group = kafka.unique("group")
    await kafka.produce(topic, [(b"k", b"v%d" % n, (), 1) for n in range(5)])
    assert await kafka.committed(group, topic) == {}

    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka.bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        got = await consumer.getmany(timeout_ms=10_000)
        await consumer.commit({TopicPartition(topic, 1): 3})
    finally:
        await consumer.stop()

    assert [r.value for r in got[TopicPartition(topic, 1)]] == [b"v%d" % n for n in range(5)]
    assert await kafka.committed(group, topic) == {1: 3}


async def test_read_all_when_transaction_aborted_then_committed_reader_does_not_see_it(kafka: Kafka) -> None:
    topic = await kafka.create_topic(kafka.unique("fixture"), partitions=1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, transactional_id=kafka.unique("tx"))
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"aborted")
        await producer.abort_transaction()
        async with producer.transaction():
            await producer.send_and_wait(topic, b"committed")
    finally:
        await producer.stop()

    assert [r.value for r in await kafka.read_all(topic)] == [b"committed"]
    everything = await kafka.read_all(topic, isolation="read_uncommitted")
    assert [r.value for r in everything] == [b"aborted", b"committed"]


async def test_produce_when_record_above_topic_limit_then_broker_refuses(kafka: Kafka) -> None:
    topic = await kafka.create_topic(kafka.unique("fixture"), configs={"max.message.bytes": "2000"})

    with pytest.raises(MessageSizeTooLargeError):
        await kafka.produce(topic, [(None, b"x" * 4000)])


async def test_read_all_when_topic_missing_then_error(kafka: Kafka) -> None:
    with pytest.raises(UnknownTopicOrPartitionError):
        await kafka.read_all(kafka.unique("missing"))


async def test_own_broker_when_killed_then_same_address_and_records_after_start(own_broker: Broker) -> None:
    topic = await own_broker.create_topic("kept", partitions=1)
    await own_broker.produce(topic, [(None, b"before")])

    own_broker.kill()
    own_broker.start()
    await own_broker.produce(topic, [(None, b"between")])
    own_broker.restart()

    assert [r.value for r in await own_broker.read_all(topic)] == [b"before", b"between"]
