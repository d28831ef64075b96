"""Rebalances on a real Kafka: what comes back to a worker goes on where it was, and is not computed twice."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferstream.tasks.hash import digest
from tests.kafka.test_killed_in_the_middle import (
    MAX_UNCOMMITTED,
    SLOW,
    caught_up,
    has_results,
    make_topics,
    until,
)
from tests.support.client import Kafka
from tests.support.judge import judge
from tests.support.worker import Worker, merged, settings

DOCUMENTS = 4000
GUARANTEES = ["at-least-once", "exactly-once"]


class Held:
    """A worker whose device can be held, and what it has computed."""

    def __init__(self, folder: Path, name: str, tree: dict[str, Any], launch: Callable[..., Worker]) -> None:
        self._computed, self._hold = folder / f"{name}.computed", folder / f"{name}.hold"
        environ = {"COMPUTED": str(self._computed), "HOLD": str(self._hold)}
        self.worker = launch(tree, module="tests.support.counting", environ=environ)

    def hold(self) -> None:
        self._hold.touch()

    def go_on(self) -> None:
        self._hold.unlink()

    def computed(self) -> list[bytes]:
        lines = self._computed.read_text().splitlines() if self._computed.exists() else []
        return [bytes.fromhex(line) for line in lines]

    def told(self, message: str) -> list[dict[str, Any]]:
        """The log lines with this message, in order."""
        lines = [line for line in self.worker.stderr_text().splitlines() if line.startswith("{")]
        return [entry for entry in map(json.loads, lines) if entry["message"] == message]

    async def tells(self, message: str, times: int = 1) -> dict[str, Any]:
        async def told() -> bool:
            assert self.worker.returncode is None, self.worker.stderr_text()[-3000:]
            return len(self.told(message)) >= times

        await until(told, 60, f"the worker to tell {message!r} {times} times")
        return self.told(message)[times - 1]

    async def drained(self) -> None:
        self.worker.terminate()
        assert await self.worker.ended(40) == 0, self.worker.stderr_text()[-3000:]


def tree_of(kafka: Kafka, topics: tuple[str, str, str], guarantee: str) -> dict[str, Any]:
    delivery: dict[str, Any] = {"guarantee": guarantee, "revoke_timeout_s": 2}
    if guarantee == "exactly-once":
        delivery |= {"commit_interval_ms": 100, "transaction_timeout_ms": 3000}
    changes = {"delivery": delivery, "telemetry": {"log_format": "json"}}
    return settings(kafka.bootstrap, *topics, merged(SLOW, changes))


async def partition_of_each(kafka: Kafka, source: str) -> dict[bytes, int]:
    """Input partition by the digest of the text, as the device sees it."""
    return {
        digest(orjson.loads(record.value)["text"]): record.partition
        for record in await kafka.read_all(source)
    }


@pytest.mark.timeout(180)
@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_partitions_when_they_come_back_then_nothing_of_them_is_computed_or_delivered_twice(
    kafka: Kafka, launch: Callable[..., Worker], tmp_path: Path, guarantee: str
) -> None:
    topics = source, target, group = await make_topics(kafka, "resumed", DOCUMENTS)
    tree = tree_of(kafka, topics, guarantee)
    first = Held(tmp_path, "first", tree, launch)
    await until(lambda: has_results(kafka, target, 101), 60, "the first results")
    first.hold()  # from now on its documents are slow
    assert not await caught_up(kafka, group, source), "the input ended before the rebalance"

    second = Held(tmp_path, "second", tree, launch)
    await second.tells("assigned")
    assert (await first.tells("resumed"))["documents"] > 0
    await second.drained()
    assert (await first.tells("resumed", 2))["documents"] > 0
    first.go_on()
    await until(lambda: caught_up(kafka, group, source), 60, "the group to catch up")
    await first.drained()

    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    assert verdict.repeats == 0
    assert all(len(runs) == 1 for runs in verdict.runs.values())

    assignments = [set(told["partitions"]) for told in first.told("assigned")]
    kept = {int(name.rpartition(":")[2]) for name in set.intersection(*assignments)}
    assert len(assignments) == 3 and 0 < len(kept) < 4
    partitions = await partition_of_each(kafka, source)
    times = Counter(first.computed() + second.computed())
    assert [n for n, partition in partitions.items() if partition in kept and times[n] != 1] == []
    assert all(times[n] for n in partitions)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("end", "guarantee"),
    [
        ("killed", "at-least-once"),
        ("killed", "exactly-once"),
        ("resumed", "exactly-once"),
        ("drained", "at-least-once"),
    ],
)
async def test_worker_when_its_lanes_are_suspended_then_whatever_becomes_of_it_nothing_is_missing(
    kafka: Kafka, launch: Callable[..., Worker], tmp_path: Path, guarantee: str, end: str
) -> None:
    topics = source, target, group = await make_topics(kafka, "suspended", DOCUMENTS)
    tree = tree_of(kafka, topics, guarantee)
    first = Held(tmp_path, "first", tree, launch)
    await until(lambda: has_results(kafka, target, 101), 60, "the first results")
    first.hold()
    frozen = Held(tmp_path, "frozen", tree, launch)
    await first.tells("resumed")
    # The group waits for it in the next rebalance, and everybody else with their lanes suspended.
    frozen.worker.send_signal(signal.SIGSTOP)
    third = Held(tmp_path, "third", tree, launch)
    assert (await first.tells("suspended", 2))["documents"] > 0
    first.go_on()
    if end == "killed":
        first.worker.kill9()
        await first.worker.ended(10)
    elif end == "drained":
        await first.drained()
    else:
        await first.tells("resumed", 2)
    frozen.worker.send_signal(signal.SIGCONT)
    await until(lambda: caught_up(kafka, group, source), 90, "the group to catch up")
    for worker in (frozen, third, *([first] if end == "resumed" else ())):
        await worker.drained()

    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    if guarantee == "exactly-once":
        assert verdict.repeats == 0 and all(len(runs) == 1 for runs in verdict.runs.values())
    else:
        assert verdict.repeats <= 2 * MAX_UNCOMMITTED  # of the killed and of the frozen one
