"""Starts, stops, rebalances and broker outages of real workers on a real Kafka."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete
from aiokafka.protocol.group import LeaveGroupRequest

from inferstream.app import STOP_TIMEOUT_S
from tests.kafka.test_killed_in_the_middle import (
    SLOW,
    caught_up,
    documents,
    has_results,
    make_topics,
    settled,
    until,
)
from tests.kafka.test_rebalances import GUARANTEES
from tests.support.broker import Broker, free_ports
from tests.support.client import Kafka
from tests.support.judge import judge
from tests.support.worker import ROOT, Worker, merged, settings


def assert_one_line(worker: Worker, *words: str) -> None:
    """The error is one line that names what is wrong, and no traceback."""
    story = worker.stderr_text()
    assert "Traceback" not in story, story
    lines = [line for line in story.splitlines() if line.startswith("inferstream: error: ")]
    assert len(lines) == 1, story
    assert all(word in lines[0] for word in words), lines[0]


# ---- refused at start


async def test_worker_when_a_topic_is_missing_then_exits_3_naming_it(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    target = kafka.unique("never-made")
    worker = launch(settings(kafka.bootstrap, kafka.unique("neither"), target, "g"))
    assert await worker.ended(60) == 3, worker.stderr_text()
    assert_one_line(worker, target)


async def test_worker_when_no_broker_answers_then_exits_3_after_the_connect_timeout(
    launch: Callable[..., Worker],
) -> None:
    tree = settings("127.0.0.1:1", "in", "out", "g", {"kafka": {"connect_timeout_s": 2}})
    worker = launch(tree)
    assert await worker.ended(30) == 3
    assert_one_line(worker, "127.0.0.1:1")


async def test_worker_when_the_host_does_not_exist_then_exits_3(launch: Callable[..., Worker]) -> None:
    tree = settings("no-such-host.invalid:9092", "in", "out", "g", {"kafka": {"connect_timeout_s": 2}})
    worker = launch(tree)
    assert await worker.ended(40) == 3
    assert_one_line(worker, "no-such-host.invalid")


@pytest.mark.model
async def test_worker_when_the_model_is_unknown_then_exits_4(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "unknown-model", 0)
    changes = {"model": {"id": "nobody/has-this-model"}}
    worker = launch(
        settings(kafka.bootstrap, source, target, group, changes), environ={"HF_HUB_OFFLINE": "1"}
    )
    assert await worker.ended(60) == 4, worker.stderr_text()
    assert_one_line(worker, "nobody/has-this-model")


async def test_worker_when_the_folder_is_no_model_then_exits_4(
    kafka: Kafka, launch: Callable[..., Worker], tmp_path: Path
) -> None:
    source, target, group = await make_topics(kafka, "no-model", 0)
    folder = tmp_path / "nothing-here"
    folder.mkdir()
    worker = launch(settings(kafka.bootstrap, source, target, group, {"model": {"id": str(folder)}}))
    assert await worker.ended(60) == 4, worker.stderr_text()
    assert_one_line(worker, "nothing-here")


async def test_worker_when_the_telemetry_port_is_in_use_then_exits_2(launch: Callable[..., Worker]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = launch(settings("127.0.0.1:1", "in", "out", "g", {"telemetry": {"port": port}}))
        assert await worker.ended(30) == 2
    assert_one_line(worker, "telemetry.port", str(port))


# ---- where a group starts


async def process_all(
    kafka: Kafka, launch: Callable[..., Worker], tree: dict[str, object], source: str, group: str
) -> None:
    worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    await drained(worker)


async def drained(worker: Worker) -> None:
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]


@pytest.mark.timeout(120)
async def test_latest_when_killed_before_the_first_result_then_what_arrived_meanwhile_is_not_lost(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "latest", 40)
    tree = settings(kafka.bootstrap, source, target, group, {"input": {"start": "latest"}})
    worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 60, "the start to be committed")
    worker.kill9()
    await worker.ended(60)
    await kafka.produce(source, documents(20))
    await process_all(kafka, launch, tree, source, group)
    assert len(await kafka.read_all(target)) == 20


@pytest.mark.timeout(120)
@pytest.mark.parametrize("running", [False, True], ids=["while no worker runs", "while a worker runs"])
async def test_latest_when_partitions_are_added_then_they_are_read_from_their_beginning(
    kafka: Kafka, launch: Callable[..., Worker], running: bool
) -> None:
    source, target, group = await make_topics(kafka, "born-later", 40)  # some in every partition
    tree = settings(kafka.bootstrap, source, target, group, {"input": {"start": "latest"}})
    worker = launch(
        tree,
        module="tests.support.altered",
        environ={"CONSTANTS": '{"inferstream.kafka.connection:METADATA_MAX_AGE_MS": 500}'},
    )
    await until(lambda: caught_up(kafka, group, source), 60, "the start to be committed")
    if running:
        worker.send_signal(signal.SIGSTOP)  # the record is there before it hears of the partition
    else:
        await drained(worker)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.create_partitions({source: NewPartitions(total_count=6)})
    await admin.close()

    async def there() -> bool:
        return len(await kafka.end_offsets(source)) == 6

    await until(there, 30, "the new partitions")
    await kafka.produce(source, [(None, orjson.dumps({"text": "in a new partition"}), (), 5)])
    if running:
        worker.send_signal(signal.SIGCONT)
    else:
        worker = launch(tree)
    await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
    await drained(worker)
    [result] = await kafka.read_all(target)
    assert orjson.loads(result.value)["source"]["partition"] == 5


async def test_start_error_when_there_is_no_offset_then_exits_1_naming_the_partition(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "start-error", 4)
    worker = launch(settings(kafka.bootstrap, source, target, group, {"input": {"start": "error"}}))
    assert await worker.ended(60) == 1
    assert_one_line(worker, "input.start", f"{source}:0")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("policy", ["stop", "skip"])
async def test_offsets_when_lost_then_stops_or_skips(
    kafka: Kafka, launch: Callable[..., Worker], policy: str
) -> None:
    source, target, group = await make_topics(kafka, "lost", 0)
    tree = settings(kafka.bootstrap, source, target, group, {"input": {"on_lost_range": policy}})
    await kafka.produce(source, [(None, orjson.dumps({"text": f"document {n}"}), (), 0) for n in range(10)])
    await process_all(kafka, launch, tree, source, group)
    await kafka.produce(
        source, [(None, orjson.dumps({"text": f"document {n}"}), (), 0) for n in range(10, 20)]
    )
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.delete_records({TopicPartition(source, 0): RecordsToDelete(before_offset=15)})
    await admin.close()
    if policy == "stop":
        worker = launch(tree)
        assert await worker.ended(60) == 1, worker.stderr_text()
        assert_one_line(worker, f"{source}:0:10", "input.on_lost_range")
    else:
        [port] = free_ports(1)
        worker = launch(merged(tree, {"telemetry": {"port": port}}))
        await until(lambda: caught_up(kafka, group, source), 60, "the worker to catch up")
        metrics = await asyncio.to_thread(scraped, port)
        worker.terminate()
        assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
        answered = [orjson.loads(record.value)["source"]["offset"] for record in await kafka.read_all(target)]
        assert answered == [*range(10), *range(15, 20)]
        assert f'inferstream_records_lost_total{{topic="{source}"}} 5.0\n' in metrics


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


# ---- the group


@pytest.mark.timeout(180)
async def test_second_member_when_it_joins_and_leaves_then_nothing_is_missing(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "rebalance", 30_000)
    tree = settings(kafka.bootstrap, source, target, group, SLOW)
    first = launch(tree)

    await until(lambda: has_results(kafka, target, 501), 60, "the first member's results")
    second = launch(tree)
    await second.says("assigned", 60)
    second.terminate()
    assert await second.ended(40) == 0, second.stderr_text()[-2000:]
    await until(lambda: caught_up(kafka, group, source), 90, "the group to catch up")
    first.terminate()
    assert await first.ended(40) == 0, first.stderr_text()[-2000:]
    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    assert all(run.count == run.last - run.first + 1 for runs in verdict.runs.values() for run in runs)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_static_member_when_it_is_restarted_then_no_partition_moves(
    kafka: Kafka, launch: Callable[..., Worker], guarantee: str
) -> None:
    source, target, group = await make_topics(kafka, "static", 100)
    changes = {
        "kafka": {"session_timeout_ms": 30_000},
        "delivery": {"guarantee": guarantee},
        "telemetry": {"log_format": "json"},
    }
    tree = settings(kafka.bootstrap, source, target, group, changes)
    trees = [merged(tree, {"kafka": {"group_instance_id": f"pod-{n}"}}) for n in range(2)]
    workers = [launch(each) for each in trees]

    async def shared() -> bool:
        return [len(given[-1]) for given in map(assignments, workers) if given] == [2, 2]

    await until(shared, 60, "each to have two partitions")
    await until(lambda: caught_up(kafka, group, source), 60, "both to catch up")
    before = [assignments(worker) for worker in workers]
    await drained(workers[0])
    workers[0] = launch(trees[0])
    await workers[0].says("assigned")
    await kafka.produce(source, documents(100))
    await until(lambda: caught_up(kafka, group, source), 60, "both to catch up")
    assert assignments(workers[0]) == before[0][-1:]
    assert assignments(workers[1]) == before[1]
    for worker in workers:
        await drained(worker)
    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == [] and verdict.repeats == 0


def assignments(worker: Worker) -> list[list[str]]:
    """The partitions that the worker was given, each time."""
    lines = [line for line in worker.stderr_text().splitlines() if line.startswith("{")]
    return [entry["partitions"] for entry in map(json.loads, lines) if entry["message"] == "assigned"]


@pytest.mark.timeout(90)
async def test_worker_when_its_group_refuses_it_while_it_runs_then_exits_3_after_the_refusals_time(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "refused-later", 0)
    worker = launch(
        settings(kafka.bootstrap, source, target, group),
        module="tests.support.altered",
        environ={"CONSTANTS": '{"inferstream.kafka.refusals:REFUSED_FOR_S": 2.0}'},
    )
    await worker.says("assigned")
    worker.send_signal(signal.SIGSTOP)
    await put_out(kafka, group)
    async with kafka.member_of_another_kind(group, source):
        worker.send_signal(signal.SIGCONT)
        assert await worker.ended(60) == 3, worker.stderr_text()[-2000:]
    assert_one_line(worker, "has refused for 2 s", "members of another kind", group)


async def put_out(kafka: Kafka, group: str) -> None:
    """Have the group's members leave, without their knowing."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        node = await admin.find_coordinator(group)
        [answer] = await admin.describe_consumer_groups([group], node)
        for member in answer.groups[0][5]:
            left = await admin._send_request(LeaveGroupRequest(group, member[0]), node)
            assert left.error_code == 0
    finally:
        await admin.close()


async def test_commit_when_the_topic_ends_in_transaction_markers_then_the_lag_reaches_zero(
    kafka: Kafka, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(kafka, "markers", 0)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, transactional_id=kafka.unique("txn"))
    await producer.start()
    for value, commit in ((b'{"text": "kept"}', True), (b'{"text": "aborted"}', False)):
        await producer.begin_transaction()
        await producer.send_and_wait(source, value, partition=0)
        await (producer.commit_transaction() if commit else producer.abort_transaction())
    await producer.stop()
    await process_all(kafka, launch, settings(kafka.bootstrap, source, target, group), source, group)
    [result] = await kafka.read_all(target)
    assert orjson.loads(result.value)["source"]["offset"] == 0


# ---- the broker goes away


@pytest.mark.timeout(180)
async def test_broker_when_killed_and_restarted_then_the_worker_recovers_by_itself(
    own_broker: Broker, launch: Callable[..., Worker]
) -> None:
    source, target, group = await make_topics(own_broker, "outage", 20_000)
    worker = launch(settings(own_broker.bootstrap, source, target, group, SLOW))

    await until(lambda: has_results(own_broker, target, 501), 60, "the first results")
    own_broker.kill()
    own_broker.restart()
    await until(lambda: caught_up(own_broker, group, source), 120, "the worker to recover")
    assert worker.returncode is None
    worker.terminate()
    assert await worker.ended(40) == 0, worker.stderr_text()[-2000:]
    verdict = judge(await own_broker.read_all(target))
    assert verdict.missing(await own_broker.end_offsets(source)) == []


@pytest.mark.timeout(120)
async def test_sigterm_when_the_broker_is_away_then_exits_6_within_the_deadline(
    own_broker: Broker, launch: Callable[..., Worker], tmp_path: Path
) -> None:
    source, target, group = await make_topics(own_broker, "away", 20_000)
    tree = settings(own_broker.bootstrap, source, target, group, SLOW)
    tree["delivery"] = {**SLOW["delivery"], "drain_timeout_s": 4}
    held = tmp_path / "held"
    environ = {"HELD": str(held), "HELD_TEXTS": orjson.loads(documents(3001)[-1][1])["text"]}
    worker = launch(tree, module="tests.support.deadly", environ=environ)

    async def in_work() -> bool:
        return held.exists()

    await until(in_work, 60, "documents to be on the device")
    offsets = await settled(own_broker, group, source)
    own_broker.kill()
    held.unlink()  # what was in work has its results now, and nobody takes them
    worker.terminate()
    # The deadline of the drain, and then those of the group, the producer and the threads.
    assert await worker.ended(4 + 3 * STOP_TIMEOUT_S) == 6, worker.stderr_text()[-2000:]
    assert_one_line(worker, "delivery.drain_timeout_s")

    own_broker.start()
    answered = judge(await own_broker.read_all(target))
    assert await own_broker.committed(group, source) == offsets and sum(offsets.values()) > 0
    assert answered.missing(offsets) == []


async def test_config_check_when_it_connects_then_it_tells_topics_group_and_model(kafka: Kafka) -> None:
    source, target, group = await make_topics(kafka, "check", 4)
    flags = [
        f"--kafka.bootstrap-servers={kafka.bootstrap}",
        f"--kafka.group-id={group}",
        f"--input.topics={source}",
        f"--output.topic={target}",
        "--model.id=builtin:hash",
    ]
    done = await inferstream("config", "check", "--connect", *flags)
    assert done.returncode == 0, done.stderr
    assert f"input.topics {source}: 4 partitions" in done.stdout
    assert "model.id builtin:hash: revision 1, float32, 8 dimensions" in done.stdout
    assert done.stdout.endswith("ok\n")

    done = await inferstream("config", "check", "--connect", *flags, "--dead-letter.topic=not-there")
    assert done.returncode == 3 and "not-there" in done.stderr and "Traceback" not in done.stderr


async def inferstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    command = [sys.executable, "-m", "inferstream", *arguments]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, cwd=ROOT / "service", timeout=60
    )
