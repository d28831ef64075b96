"""Promise 3 on a real Kafka: a reader with read_committed sees each result once, whatever was killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.kafka.test_killed_in_the_middle import (
    SLOW,
    caught_up,
    documents,
    has_results,
    make_topics,
    results_so_far,
    until,
)
from tests.kafka.test_life_cycle import assert_one_line, drained
from tests.support.client import Kafka
from tests.support.judge import Verdict, judge
from tests.support.worker import Worker, merged, settings

EXACTLY_ONCE = {"delivery": {"guarantee": "exactly-once"}}
# The shortest transaction timeout: a killed worker's transaction holds its successor back for that long.
SLOW_ONCE = merged(
    merged(SLOW, EXACTLY_ONCE), {"delivery": {"commit_interval_ms": 100, "transaction_timeout_ms": 3000}}
)

# What is released goes into one transaction that no tick closes in the time of a test.
LEFT_OPEN = merged(
    EXACTLY_ONCE, {"delivery": {"commit_interval_ms": 120_000, "transaction_timeout_ms": 600_000}}
)


def tree_of(
    kafka: Kafka, topics: tuple[str, str, str], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    return settings(kafka.bootstrap, *topics, changes or EXACTLY_ONCE)


async def verdict_on(kafka: Kafka, source: str, target: str) -> Verdict:
    """What a reader with read_committed finds: asserted to be each result once and in order."""
    verdict = judge(await kafka.read_all(target), await kafka.read_all(f"{target}.dead-letters"))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    assert verdict.repeats == 0
    assert all(len(runs) == 1 for runs in verdict.runs.values())
    return verdict


async def transaction_is_open(kafka: Kafka, target: str) -> bool:
    written = sum((await kafka.end_offsets(target, isolation="read_uncommitted")).values())
    return written > await results_so_far(kafka, target)


@pytest.mark.timeout(120)
async def test_results_when_all_is_well_then_each_is_visible_once_in_order_and_offsets_with_them(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "once", 5000)
    await kafka.produce(source, [(b"k", b"no json", (), 1), (b"k", None, (), 2)])
    worker = launch(tree_of(kafka, (source, target, group)))
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    await drained(worker)

    assert len(await kafka.read_all(f"{target}.dead-letters")) == 1
    records = await kafka.read_all(target)
    [tombstone] = [record for record in records if record.value is None]
    assert tombstone.key == b"k"
    verdict = judge([record for record in records if record.value is not None])
    assert verdict.repeats == 0 and all(len(runs) == 1 for runs in verdict.runs.values())
    assert sum(map(len, verdict.answered.values())) == 5000
    assert "given up" not in worker.stderr_text()


@pytest.mark.timeout(300)
async def test_results_when_killed_five_times_then_each_is_visible_once_in_order(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    kills = 5
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    source, target, group = await make_topics(kafka, "once-killed", 30_000)
    # Long transactions: what is seen open is still open when the kill arrives.
    tree = tree_of(
        kafka, (source, target, group), merged(SLOW_ONCE, {"delivery": {"commit_interval_ms": 900}})
    )
    for _ in range(kills):
        goal = await results_so_far(kafka, target) + chance.randrange(200, 2500)
        worker = launch(tree)
        await until(partial(has_results, kafka, target, goal), 60, f"{goal} results")
        await until(partial(transaction_is_open, kafka, target), 60, "an open transaction")
        worker.kill9()
        await worker.ended(60)
        assert not await caught_up(kafka, group, source), "the input ended before the kills did"
    worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 120, "the last worker to finish")
    await drained(worker)

    await verdict_on(kafka, source, target)
    everything = await kafka.read_all(target, isolation="read_uncommitted")
    assert len(everything) > 30_000, "no kill met an open transaction: the test has shown nothing"


@pytest.mark.timeout(240)
async def test_results_when_drained_and_joined_by_others_then_each_is_visible_once_in_order(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    chance = random.Random(20_261_121)
    source, target, group = await make_topics(kafka, "once-drained", 80_000)
    tree = tree_of(kafka, (source, target, group), SLOW_ONCE)
    worker = launch(tree)
    for _ in range(3):  # the next one joins while the last one works, and then the last one leaves
        goal = await results_so_far(kafka, target) + chance.randrange(500, 1500)
        await until(partial(has_results, kafka, target, goal), 60, f"{goal} results")
        other = launch(tree)
        await other.says("assigned")
        goal = await results_so_far(kafka, target) + chance.randrange(500, 1500)
        await until(partial(has_results, kafka, target, goal), 60, f"{goal} results")
        await drained(worker)
        assert not await caught_up(kafka, group, source), "the input ended before the drains did"
        worker = other
    await until(lambda: caught_up(kafka, group, source), 120, "the last worker to finish")
    await drained(worker)
    await verdict_on(kafka, source, target)


# ---- what closes a transaction before its time


async def in_partition_0(kafka: Kafka, source: str, count: int) -> None:
    await kafka.produce(source, [(None, b'{"text": "document"}', (), 0)] * count)


async def left_open(
    kafka: Kafka, launch: Callable[..., Worker], name: str, changes: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, str, str], Worker]:
    """A worker with four results in a transaction that no tick closes, its settings and its topics."""
    topics = source, target, _ = await make_topics(kafka, name, 0)
    tree = tree_of(kafka, topics, merged(LEFT_OPEN, changes))
    worker = launch(tree)
    await worker.says("assigned")
    await in_partition_0(kafka, source, 4)

    async def written() -> bool:
        return (await kafka.end_offsets(target, isolation="read_uncommitted"))[0] == 4

    await until(written, 60, "four results")
    assert await kafka.read_all(target) == []
    return tree, topics, worker


@pytest.mark.timeout(90)
async def test_transaction_when_half_of_what_may_be_uncommitted_is_in_it_then_it_is_closed_at_once(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    ten_a_partition = {"delivery": {"max_uncommitted_documents": 40}}
    _, (source, target, group), worker = await left_open(kafka, launch, "half", ten_a_partition)
    await in_partition_0(kafka, source, 1)
    await until(partial(has_results, kafka, target, 5), 30, "the results")
    await until(lambda: caught_up(kafka, group, source), 30, "their offsets")
    await drained(worker)


@pytest.mark.timeout(90)
async def test_transaction_when_its_worker_drains_then_it_is_closed_at_once(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    _, (source, target, group), worker = await left_open(kafka, launch, "drain-closes", {})
    await drained(worker)
    assert await caught_up(kafka, group, source)
    await verdict_on(kafka, source, target)


@pytest.mark.timeout(90)
async def test_transaction_when_its_partitions_are_revoked_then_it_is_closed_at_once(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    patient = {
        "kafka": {"rebalance_timeout_ms": 500_000, "request_timeout_ms": 600_000},
        "delivery": {"revoke_timeout_s": 200},
    }
    tree, (source, target, group), worker = await left_open(kafka, launch, "revoke-closes", patient)
    other = launch(tree)
    await other.says("assigned", 40)
    assert await caught_up(kafka, group, source)
    await verdict_on(kafka, source, target)
    for each in (worker, other):
        await drained(each)


# ---- the predecessor, and others like us


@pytest.mark.timeout(120)
async def test_predecessor_when_it_has_our_transactional_id_then_its_transaction_ends_before_the_model_loads(
    kafka: Kafka, launch: Callable[..., Worker], tmp_path: Path
) -> None:
    source, target, group = await make_topics(kafka, "once-stable", 100)
    stable = {"kafka": {"transactional_id": kafka.unique("stable"), "group_instance_id": "the only one"}}
    tree = tree_of(kafka, (source, target, group), merged(LEFT_OPEN, stable))
    worker = launch(tree)
    await until(partial(transaction_is_open, kafka, target), 60, "an open transaction")
    worker.kill9()
    await worker.ended(60)
    assert await transaction_is_open(kafka, target)

    # A folder without a model: the successor ends where it would load it.
    no_model = tmp_path / "no-model"
    no_model.mkdir()
    worker = launch(merged(tree, {"model": {"id": str(no_model)}}))
    assert await worker.ended(60) == 4, worker.stderr_text()[-3000:]
    assert not await transaction_is_open(kafka, target)
    assert await kafka.read_all(target) == []

    worker = launch(merged(tree, {"delivery": {"commit_interval_ms": 100}}))
    await until(lambda: caught_up(kafka, group, source), 60, "the next worker to finish")
    await drained(worker)
    await verdict_on(kafka, source, target)


@pytest.mark.timeout(120)
async def test_transactional_id_when_two_live_workers_have_it_then_one_exits_3_naming_it(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "once-fenced", 30_000)
    name = kafka.unique("twice")
    tree = tree_of(kafka, (source, target, group), merged(SLOW_ONCE, {"kafka": {"transactional_id": name}}))
    first = launch(tree)
    await until(lambda: has_results(kafka, target, 1001), 60, "the first results")
    second = launch(tree)
    workers = {first, second}

    async def one_has_ended() -> Worker | None:
        return next((worker for worker in workers if worker.returncode is not None), None)

    ended = await until(one_has_ended, 60, "one of the two to end")
    assert ended.returncode == 3, ended.stderr_text()[-3000:]
    assert_one_line(ended, "kafka.transactional_id", name)
    [other] = workers - {ended}
    await until(lambda: caught_up(kafka, group, source), 60, "the other to finish")
    await drained(other)
    await verdict_on(kafka, source, target)


@pytest.mark.timeout(120)
async def test_result_when_larger_than_the_topic_takes_then_its_mates_and_its_dead_letter_are_visible_once(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source = await kafka.create_topic(kafka.unique("once-large-in"))
    target = await kafka.create_topic(kafka.unique("once-large-out"), configs={"max.message.bytes": "20000"})
    await kafka.create_topic(f"{target}.dead-letters", configs={"max.message.bytes": str(2 << 20)})
    records = documents(2000)
    # The worker is told that the topic takes more than it does, so that the broker is the one to refuse.
    noise = random.Random(1).randbytes(40_000).hex()
    records[700] = (b"big", orjson.dumps({"id": 700, "text": "t", "metadata": {"noise": noise}}))
    await kafka.produce(source, records)
    group = kafka.unique("once-large")
    changes = merged(EXACTLY_ONCE, {"output": {"max_message_bytes": 1 << 20}})
    worker = launch(tree_of(kafka, (source, target, group), changes))
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    await drained(worker)

    [dead] = await kafka.read_all(f"{target}.dead-letters")
    assert dict(dead.headers)["inferstream.error.reason"] == b"record_refused"
    await verdict_on(kafka, source, target)
    assert "a transaction was given up; it is aborted" in worker.stderr_text()
    written = await kafka.read_all(target, isolation="read_uncommitted")
    assert len(written) > 1999, "what was in the transaction with the refused record was not written before"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delivery": {"order": "none"}}, ("delivery.order",)),
        ({"kafka": {"bootstrap_servers": ["embedded"]}}, ("kafka.bootstrap_servers",)),
        (
            {"delivery": {"commit_interval_ms": 5000}},
            ("delivery.commit_interval_ms", "delivery.transaction_timeout_ms"),
        ),
    ],
    ids=["order", "embedded", "timeout"],
)
async def test_settings_when_they_cannot_go_with_exactly_once_then_exits_2_naming_them(
    launch: Callable[..., Worker], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    worker = launch(settings("127.0.0.1:1", "in", "out", "g", merged(EXACTLY_ONCE, changes)))
    assert await worker.ended(30) == 2
    story = worker.stderr_text()
    assert "Traceback" not in story and all(word in story for word in words), story
