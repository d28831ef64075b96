"""The three ends of a transaction on a real Kafka, and what aiokafka and the broker do that makes them three."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import TopicAuthorizationFailedError

from inferstream.kafka.epochs import Identity, current_identity
from inferstream.kafka.refusals import FencedInstanceIdError
from inferstream.kafka.txn_protocol import Fenced, MemberGone, TransactionalProducer
from tests.kafka.test_exactly_once import EXACTLY_ONCE, transaction_is_open, verdict_on
from tests.kafka.test_killed_in_the_middle import caught_up, documents, make_topics, until
from tests.kafka.test_life_cycle import drained
from tests.support.broker import BrokerUnavailable
from tests.support.client import Kafka
from tests.support.proxy import END_TXN, HEARTBEAT, Loss, ProxiedKafka, Proxy
from tests.support.worker import Worker, merged, settings

Make = Callable[..., Awaitable[TransactionalProducer]]


@pytest.fixture
async def producer(kafka: Kafka) -> AsyncIterator[Make]:
    """Makes started producers; those with the same id are each other's successors."""
    made: list[TransactionalProducer] = []

    async def make(transactional_id: str) -> TransactionalProducer:
        fresh = TransactionalProducer(transactional_id, bootstrap_servers=kafka.bootstrap)
        made.append(fresh)
        await fresh.start()
        return fresh

    yield make
    for one in made:
        await one.discard()


@pytest.fixture
async def member(
    kafka: Kafka, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[AIOKafkaConsumer, str, str]]:
    """A consumer that is in its group, static with a parameter, the group, and its topic of one partition."""
    topic = await kafka.create_topic(kafka.unique("ends"), partitions=1)
    group = kafka.unique("ends-group")
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka.bootstrap,
        group_id=group,
        group_instance_id=getattr(request, "param", None),
        enable_auto_commit=False,
    )
    await consumer.start()
    yield consumer, group, topic
    await consumer.stop()


async def publish(producer: TransactionalProducer, topic: str, *values: bytes) -> None:
    batch = producer.create_batch()
    for value in values:
        batch.append(timestamp=None, key=None, value=value)
    batch.close()
    await (await producer.send_batch(batch, topic, partition=0))


async def commit(
    producer: TransactionalProducer,
    group: str,
    identity: Identity,
    topic: str,
    offset: int,
    instance: str | None = None,
) -> None:
    await producer.add_group(group)
    await producer.commit_offsets(
        group, identity, instance, {TopicPartition(topic, 0): (offset, "m")}, lambda: None
    )


async def visible(kafka: Kafka, topic: str) -> list[bytes]:
    return [record.value for record in await kafka.read_all(topic)]


# ---- what aiokafka 0.14 does: when one of these fails, a fixed release is there to be looked at


async def test_aiokafka_when_an_error_was_aborted_then_its_next_commit_publishes_the_aborted_records(
    kafka: Kafka,
) -> None:
    topic = await kafka.create_topic(kafka.unique("aiokafka"), partitions=1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, transactional_id=kafka.unique("aiokafka"))
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"aborted")
        # as its handlers do when a right to another topic or to the group is missing
        producer._txn_manager.error_transaction(TopicAuthorizationFailedError(topic))
        await producer.abort_transaction()
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"good")
        await producer.commit_transaction()
    finally:
        await producer.stop()
    assert await visible(kafka, topic) == [b"aborted", b"good"]


async def test_broker_when_offsets_come_from_nobody_then_it_takes_them(
    kafka: Kafka, producer: Make, member: tuple[AIOKafkaConsumer, str, str]
) -> None:
    """Why an identity is captured and checked: (-1, '') is what aiokafka holds after its session is lost."""
    _, group, topic = member
    zombie = await producer(kafka.unique("tx"))
    nobody = Identity(-1, "")
    with pytest.raises(MemberGone):
        await commit(zombie, group, nobody, topic, 7)
    pretended = type("Pretended", (), {"generation": -1, "member": "", "valid": True})()
    await commit(zombie, group, pretended, topic, 7)
    await zombie.commit()
    assert (await zombie.stable_offsets(group, [TopicPartition(topic, 0)]))[
        TopicPartition(topic, 0)
    ].offset == 7


# ---- what the module does


async def test_transaction_when_thrown_away_then_a_good_one_with_the_same_id_does_not_publish_it(
    kafka: Kafka, producer: Make, member: tuple[AIOKafkaConsumer, str, str]
) -> None:
    consumer, group, topic = member
    identity = current_identity(consumer)
    name = kafka.unique("tx")
    failed = await producer(name)
    await publish(failed, topic, b"aborted")
    await commit(failed, group, identity, topic, 5)

    good = await producer(name)
    await publish(good, topic, b"good")
    await commit(good, group, identity, topic, 9)
    await good.commit()

    assert await visible(kafka, topic) == [b"good"]
    found = await good.stable_offsets(group, [TopicPartition(topic, 0)])
    assert [(entry.offset, entry.metadata) for entry in found.values()] == [(9, "m")]
    with pytest.raises(Fenced):
        await failed.commit()
    assert await visible(kafka, topic) == [b"good"]


async def test_transactions_when_they_follow_each_other_then_each_is_visible_in_order(
    kafka: Kafka, producer: Make, member: tuple[AIOKafkaConsumer, str, str]
) -> None:
    consumer, group, topic = member
    one = await producer(kafka.unique("tx"))
    for n in range(20):
        await publish(one, topic, b"%d" % n)
        await commit(one, group, current_identity(consumer), topic, n + 1)
        await one.commit()
        one.begin()
    assert await visible(kafka, topic) == [b"%d" % n for n in range(20)]
    found = await one.stable_offsets(group, [TopicPartition(topic, 0)])
    assert [entry.offset for entry in found.values()] == [20]


@pytest.mark.parametrize("wrong", ["generation", "member"])
async def test_offsets_when_the_identity_is_not_that_of_the_group_then_the_broker_refuses_them(
    kafka: Kafka, producer: Make, member: tuple[AIOKafkaConsumer, str, str], wrong: str
) -> None:
    consumer, group, topic = member
    now = current_identity(consumer)
    stale = (
        Identity(now.generation - 1, now.member) if wrong == "generation" else Identity(now.generation, "x")
    )
    zombie = await producer(kafka.unique("tx"))
    await publish(zombie, topic, b"a zombie's")
    with pytest.raises(MemberGone):
        await commit(zombie, group, stale, topic, 3)


@pytest.mark.parametrize("member", ["pod-0"], indirect=True)
async def test_offsets_when_another_member_has_the_static_identity_by_now_then_the_broker_refuses_them(
    kafka: Kafka, producer: Make, member: tuple[AIOKafkaConsumer, str, str]
) -> None:
    consumer, group, topic = member
    now = current_identity(consumer)
    name = kafka.unique("tx")
    one = await producer(name)
    await commit(one, group, now, topic, 3, instance="pod-0")
    await one.commit()
    found = await one.stable_offsets(group, [TopicPartition(topic, 0)])
    assert [entry.offset for entry in found.values()] == [3]

    before = Identity(now.generation, "who had it before")
    zombie = await producer(name)
    with pytest.raises(MemberGone, match=FencedInstanceIdError.__name__):
        await commit(zombie, group, before, topic, 5, instance="pod-0")


async def test_offsets_when_a_transaction_is_pending_then_the_stable_ones_are_waited_for(
    kafka: Kafka, producer: Make, member: tuple[AIOKafkaConsumer, str, str]
) -> None:
    consumer, group, topic = member
    name = kafka.unique("tx")
    pending, other = await producer(name), await producer(kafka.unique("other"))
    await commit(pending, group, current_identity(consumer), topic, 4)
    asking = asyncio.create_task(other.stable_offsets(group, [TopicPartition(topic, 0)]))
    done, _ = await asyncio.wait({asking}, timeout=0.5)
    assert not done
    await pending.commit()
    assert [entry.offset for entry in (await asking).values()] == [4]


# ---- the unknown end


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedKafka]:
    broker = ProxiedKafka(tmp_path_factory.mktemp("proxied"))
    try:
        broker.start()
    except BrokerUnavailable as error:
        pytest.fail(str(error), pytrace=False)
    yield broker
    broker.remove()


@pytest.fixture
async def proxy(proxied: ProxiedKafka) -> AsyncIterator[Proxy]:
    proxy = Proxy(proxied.proxied_port, proxied.behind_port)
    await proxy.start()
    yield proxy
    await proxy.stop()


async def told(worker: Worker, outcome: str, times: int) -> bool:
    return worker.stderr_text().count(f"the unknown transaction was {outcome}") == times


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_end_when_its_answer_is_lost_then_it_is_found_out_and_nothing_is_missing_or_twice(
    proxied: ProxiedKafka, proxy: Proxy, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(proxied, "unknown", 0)
    changes = merged(EXACTLY_ONCE, {"delivery": {"transaction_timeout_ms": 3000}})
    worker = launch(settings(f"127.0.0.1:{proxied.proxied_port}", source, target, group, changes))
    await worker.says("assigned")
    ends: list[tuple[Loss, str]] = [("answer", "committed"), ("request", "aborted")] * 2
    for n, (loss, outcome) in enumerate(ends):
        proxy.lose(END_TXN, loss)
        await proxied.produce(source, documents(300))
        await proxy.lost.wait()
        await until(partial(told, worker, outcome, n // 2 + 1), 60, f"what was found out: {outcome}")
        await until(lambda: caught_up(proxied, group, source), 60, "the offsets")
    await drained(worker)
    await verdict_on(proxied, source, target)


# ---- the zombie


@pytest.mark.kafka
@pytest.mark.timeout(120)
async def test_zombie_when_it_wakes_after_its_session_then_nothing_of_it_becomes_visible(
    proxied: ProxiedKafka, proxy: Proxy, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(proxied, "zombie", 0)
    # Its transaction outlives its session, and is closed when half of what may be uncommitted is in it.
    delivery = {
        "commit_interval_ms": 20_000,
        "transaction_timeout_ms": 60_000,
        "max_uncommitted_documents": 40,
    }
    through = {"kafka": {"bootstrap_servers": [f"127.0.0.1:{proxied.proxied_port}"]}}
    tree = settings(proxied.bootstrap, source, target, group, merged(EXACTLY_ONCE, {"delivery": delivery}))
    zombie = launch(merged(tree, through))
    await zombie.says("assigned")
    await proxied.produce(source, [(None, b'{"text": "document"}', (), partition) for partition in range(4)])
    await until(partial(transaction_is_open, proxied, target), 60, "an open transaction")
    proxy.hold(HEARTBEAT)  # so that the group's refusal of the offsets is the first that it hears
    zombie.send_signal(signal.SIGSTOP)
    other = launch(merged(tree, {"delivery": {"commit_interval_ms": 100}}))
    await until(lambda: caught_up(proxied, group, source), 60, "the other to do the zombie's documents")
    assert await transaction_is_open(proxied, target), "the zombie's transaction was closed before it woke"

    zombie.send_signal(signal.SIGCONT)
    await proxied.produce(source, documents(400))
    await zombie.says("the epoch has ended.*UnknownMemberIdError", 30)
    proxy.go_on(HEARTBEAT)
    await drained(zombie)
    await until(lambda: caught_up(proxied, group, source), 60, "the other to catch up")
    await drained(other)
    await verdict_on(proxied, source, target)
