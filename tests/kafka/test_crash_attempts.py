"""The document that kills the process is found out and dead-lettered; its mates are delivered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.kafka.test_killed_in_the_middle import caught_up, until
from tests.kafka.test_rebalances import GUARANTEES
from tests.support.client import Kafka
from tests.support.judge import judge
from tests.support.worker import Worker, settings

ABORTED = -6
DEADLY = "the text that no process survives"
CAUTION = "one document at a time"


async def topics_with(kafka: Kafka, name: str, texts: list[str]) -> tuple[str, str, str]:
    source = await kafka.create_topic(kafka.unique(f"{name}-in"), partitions=2)
    target = await kafka.create_topic(kafka.unique(f"{name}-out"), partitions=2)
    await kafka.create_topic(f"{target}.dead-letters", configs={"max.message.bytes": str(2 << 20)})
    await kafka.produce(
        source, [(b"%d" % n, orjson.dumps({"id": n, "text": text})) for n, text in enumerate(texts)]
    )
    return source, target, kafka.unique(f"{name}-group")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_document_when_it_kills_the_process_then_it_alone_is_dead_lettered(
    kafka: Kafka, launch: Callable[..., Worker], guarantee: str
) -> None:
    texts = [f"document {n}" for n in range(200)]
    deadly = [60, 61] if guarantee == "at-least-once" else [60]  # two in a row: each is found by itself
    for n in deadly:
        texts[n] = DEADLY
    source, target, group = await topics_with(kafka, "deadly", texts)
    # The next process has the dead one's identities, and need not wait for its session or transaction to end.
    kafka_changes = {"group_instance_id": "the only one"}
    if guarantee == "exactly-once":
        kafka_changes["transactional_id"] = kafka.unique("deadly")
    delivery = {"guarantee": guarantee, "max_crash_attempts": 2}
    tree = settings(kafka.bootstrap, source, target, group, {"delivery": delivery, "kafka": kafka_changes})

    deaths = 0  # for each of them: once after progress, twice without, once alone
    while True:
        worker = launch(tree, module="tests.support.deadly", environ={"DEADLY_TEXTS": DEADLY})
        ended = await until(partial(over, kafka, group, source, worker), 60, "the worker to die or to finish")
        if ended != ABORTED:
            break
        deaths += 1
        assert deaths <= 8, worker.stderr_text()[-2000:]
    worker.terminate()
    assert await worker.ended(30) == 0, worker.stderr_text()[-2000:]

    letters = await kafka.read_all(f"{target}.dead-letters")
    assert sorted(orjson.loads(letter.value)["id"] for letter in letters) == deadly
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["inferstream.error.reason"] == b"process_killed"
        assert letter.value == orjson.dumps({"id": orjson.loads(letter.value)["id"], "text": DEADLY})
    verdict = judge(await kafka.read_all(target), letters)
    assert verdict.missing(await kafka.end_offsets(source)) == []
    if guarantee == "exactly-once":
        assert verdict.repeats == 0 and all(len(runs) == 1 for runs in verdict.runs.values())


async def over(kafka: Kafka, group: str, source: str, worker: Worker) -> Any:
    """The exit code of a worker that has ended, "done" when everything is committed, else None."""
    if worker.returncode is not None:
        return worker.returncode
    return "done" if await caught_up(kafka, group, source) else None


@pytest.mark.timeout(120)
@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_attempts_when_workers_only_drain_are_not_counted(
    kafka: Kafka, launch: Callable[..., Worker], tmp_path: Path, guarantee: str
) -> None:
    texts = [f"document {n}" for n in range(20)]
    source, target, group = await topics_with(kafka, "drained", texts)
    delivery = {"guarantee": guarantee, "max_crash_attempts": 1, "drain_timeout_s": 1}
    tree = settings(kafka.bootstrap, source, target, group, {"delivery": delivery})
    held = tmp_path / "held"
    environ = {"HELD_TEXTS": "\n".join(texts), "HELD": str(held)}

    async def notes() -> set[str]:
        return {metadata for _, metadata in (await kafka.commits(group, source)).values()}

    async def in_work() -> bool:
        return held.exists() and await notes() == {"partitions=2;attempts=1"}

    async def put_back() -> bool:
        return await notes() == {"partitions=2"}

    for _ in range(3):  # each with documents in work, that it does not finish
        worker = launch(tree, module="tests.support.deadly", environ=environ)
        await until(in_work, 30, "documents to be on the device")
        worker.terminate()
        await until(put_back, 30, "what was noted before to be noted again")
        held.unlink()
        assert await worker.ended(30) == 6, worker.stderr_text()[-2000:]
        assert CAUTION not in worker.stderr_text()
    worker = launch(tree)
    await until(partial(caught_up, kafka, group, source), 30, "everything to be committed")
    worker.terminate()
    assert await worker.ended(30) == 0, worker.stderr_text()[-2000:]
    assert CAUTION not in worker.stderr_text()
    assert await put_back()
