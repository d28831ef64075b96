"""`dead-letters list | show | replay` on a real Kafka: which letters go out again, and how often."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from inferstream.codec import Codec
from inferstream.documents import Headers, Reason, Rejected
from tests.kafka.test_killed_in_the_middle import caught_up, until
from tests.support.client import Kafka, Sent
from tests.support.worker import ROOT, Worker, settings

PARTITIONS = 2
SESSION_MS = 6000


@dataclass(frozen=True)
class Read:
    """A record as a worker had read it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = b"{}"
    headers: Headers = ()
    timestamp: int = 1_764_000_000_000


@dataclass
class Done:
    """How a call of the command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass
class Service:
    """The topics of a service, and its settings for the command line."""

    kafka: Kafka
    source: str
    letters: str
    group: str
    config: Path

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("INFERSTREAM_")}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "inferstream", "dead-letters", *arguments, "--config", str(self.config)),
            env={**environ, "PYTHONPATH": str(ROOT / "service")},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def ended(self, process: asyncio.subprocess.Process) -> Done:
        try:
            async with asyncio.timeout(60):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert b"Traceback" not in err, err.decode()
        return Done(process.returncode or 0, out.decode(), err.decode())

    async def call(self, *arguments: str) -> Done:
        return await self.ended(await self.start(*arguments))

    async def write(self, letters: Sequence[tuple[Read, Reason]], partition: int | None = None) -> None:
        """Dead letters as a worker writes them, each to the partition of its source unless one is given."""
        codec = Codec(group_id=self.group)
        await self.kafka.produce(
            self.letters,
            [
                Sent(
                    letter.key,
                    letter.value,
                    letter.headers,
                    read.partition if partition is None else partition,
                )
                for read, reason in letters
                for letter in [codec.dead_letter(read, Rejected(reason, "why"))]
            ],
            linger_ms=5,
        )

    async def replayed(self) -> list[ConsumerRecord]:
        return await self.kafka.read_all(self.source)

    async def times(self) -> Counter[str]:
        """How often each document was replayed, by its first id."""
        return Counter(dict(r.headers)["inferstream.id"].decode() for r in await self.replayed())


@pytest.fixture
async def service(kafka: Kafka, tmp_path: Path) -> Service:
    return await make_service(kafka, tmp_path)


async def make_service(kafka: Kafka, folder: Path, partitions: int = PARTITIONS) -> Service:
    source = await kafka.create_topic(kafka.unique("dl-in"), partitions)
    target = await kafka.create_topic(kafka.unique("dl-out"), partitions)
    letters = await kafka.create_topic(
        f"{target}.dead-letters", partitions, {"max.message.bytes": str(2 << 20)}
    )
    group = kafka.unique("dl-group")
    config = folder / "service.yaml"
    tree = settings(kafka.bootstrap, source, target, group, {"kafka": {"session_timeout_ms": SESSION_MS}})
    config.write_text(json.dumps(tree))
    return Service(kafka, source, letters, group, config)


def letters_of(
    service: Service, count: int, reason: Reason = Reason.MISSING_TEXT
) -> list[tuple[Read, Reason]]:
    return [
        (Read(service.source, n % PARTITIONS, n // PARTITIONS, b"k%d" % n, b"%d" % n), reason)
        for n in range(count)
    ]


@pytest.mark.timeout(180)
async def test_document_when_replayed_then_it_keeps_its_id_and_is_left_after_so_many_replays(
    service: Service, launch: Callable[..., Worker]
) -> None:
    kafka, source = service.kafka, service.source
    body = orjson.dumps({"body": "the text is elsewhere"})
    await kafka.produce(
        source,
        [
            Sent(b"good", orjson.dumps({"id": "good", "text": "a good one"}), (), 0),
            Sent(b"\x00\xff", body, (("trace", b"1"), ("inferstream.schema", b"x")), 1),
            Sent(b"k", b"{'not': json}", (), 1),
        ],
    )
    target = service.letters.removesuffix(".dead-letters")
    worker = launch(service.config)
    await until(lambda: caught_up(kafka, service.group, source), 60, "the first pass")

    listed = await service.call("list")
    assert listed.code == 0
    assert Counter(letter["reason"] for letter in listed.lines) == {"missing_text": 1, "invalid_json": 1}
    assert "2 dead letters" in listed.stderr
    shown = await service.call("show", f"{source}:1:0")
    [letter] = shown.lines
    assert letter["value"] == body.decode() and letter["key"] == {"base64": "AP8="}
    assert letter["headers"]["trace"] == "1" and letter["replays"] == 0
    [same] = (await service.call("show", f"{letter['partition']}:{letter['offset']}")).lines
    assert same == letter

    for count in (1, 2):
        done = await service.call("replay", "--reason", "missing_text", "--max-replays", "2")
        assert done.code == 0 and "1 replayed (missing_text 1)" in done.stderr, done.stderr
        await until(lambda: caught_up(kafka, service.group, source), 30, "the replayed document")
        newest = (await service.call("list", "--reason", "missing_text")).lines[-1]
        assert newest["replays"] == count
        assert newest["source"]["offset"] == 1 + count
    done = await service.call("replay", "--reason", "missing_text", "--max-replays", "2")
    assert done.code == 0 and "0 replayed" in done.stderr and "1 left (replayed too often 1)" in done.stderr

    worker.terminate()
    assert await worker.ended(30) == 0
    repair = await kafka.create_topic(kafka.unique("dl-repair"), 1)
    done = await service.call("replay", "--reason", "missing_text", "--to", repair)
    assert done.code == 0 and "1 replayed" in done.stderr, done.stderr
    [record] = await kafka.read_all(repair)
    assert (record.key, record.value) == (b"\x00\xff", body)
    assert record.headers == (
        ("trace", b"1"),
        ("inferstream.id", f"{source}:1:0".encode()),
        ("inferstream.replays", b"3"),
    )
    tree = json.loads(service.config.read_text())
    tree["input"] = {"topics": [repair], "text_field": "/body"}
    fixed = launch(tree)
    await until(lambda: caught_up(kafka, service.group, repair), 60, "the repaired document")
    fixed.terminate()
    assert await fixed.ended(30) == 0
    results = [r for r in await kafka.read_all(target) if r.key == b"\x00\xff"]
    assert [orjson.loads(r.value)["id"] for r in results] == [f"{source}:1:0"]
    assert results[0].headers == (("trace", b"1"), ("inferstream.schema", b"result/1"))


async def test_replay_when_called_with_filters_and_then_without_then_every_letter_goes_out_once(
    service: Service,
) -> None:
    letters = letters_of(service, 40)
    letters = [(read, Reason.TOO_LONG if read.offset % 3 == 1 else reason) for read, reason in letters]
    letters.append((Read(service.source, 0, 900, None, None), Reason.TOMBSTONE_WITHOUT_KEY))
    letters.append((Read(service.source, 1, 901, b"\xff\x00", b"\x80"), Reason.INVALID_UTF8))
    await service.write(letters)
    chosen = ["--reason", "too_long", "--source", f"{service.source}:1"]
    planned = await service.call("replay", *chosen, "--dry-run")
    assert await service.replayed() == []

    first = await service.call("replay", *chosen)
    again = await service.call("replay", *chosen)
    assert (first.code, again.code) == (0, 0)
    assert "0 replayed" in again.stderr
    sent = await service.replayed()
    expected = [n for n in range(20) if n % 3 == 1]
    assert [line["source"]["offset"] for line in planned.lines] == expected
    assert [(r.partition, r.value) for r in sent] == [(1, b"%d" % (2 * n + 1)) for n in expected]

    part = await service.call("replay", "--max", "5")
    assert "5 replayed" in part.stderr
    rest = await service.call("replay")
    assert rest.code == 0 and f"{42 - len(expected) - 5} replayed" in rest.stderr, rest.stderr
    assert "0 replayed" in (await service.call("replay")).stderr
    assert set((await service.times()).values()) == {1}
    assert len(await service.replayed()) == 42
    tombstone = next(r for r in await service.replayed() if r.value is None)
    assert (tombstone.partition, tombstone.key) == (0, None)
    binary = next(r for r in await service.replayed() if r.value == b"\x80")
    assert (binary.partition, binary.key) == (1, b"\xff\x00")
    ends = await service.kafka.end_offsets(service.letters)
    commits = await service.kafka.commits(f"{service.group}.replay", service.letters)
    assert commits == {partition: (end, "") for partition, end in ends.items()}


async def test_replay_when_everything_goes_out_then_each_partition_is_in_order(service: Service) -> None:
    await service.write(letters_of(service, 3000))
    done = await service.call("replay")
    assert done.code == 0 and "3,000 replayed" in done.stderr
    for partition in range(PARTITIONS):
        sent = [int(r.value) for r in await service.replayed() if r.partition == partition]
        assert sent == list(range(partition, 3000, PARTITIONS))


@pytest.mark.timeout(120)
async def test_replay_when_killed_in_the_middle_then_the_next_repeats_at_most_what_was_on_its_way(
    service: Service,
) -> None:
    await service.write(letters_of(service, 600))
    process = await service.start("replay", "--rate", "60")

    async def begun() -> bool:
        return sum((await service.kafka.end_offsets(service.source)).values()) >= 150

    await until(begun, 40, "the first letters")
    process.kill()
    await process.communicate()
    done = await service.call("replay")
    assert done.code == 0, done.stderr
    times = await service.times()
    assert len(times) == 600
    assert sum(times.values()) - 600 <= 60
    assert max(times.values()) <= 2
    assert "0 replayed" in (await service.call("replay")).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_replay_when_interrupted_then_the_next_goes_on_and_nothing_is_sent_twice(
    service: Service, number: signal.Signals
) -> None:
    await service.write(letters_of(service, 400))
    process = await service.start("replay", "--rate", "100")

    async def begun() -> bool:
        return sum((await service.kafka.end_offsets(service.source)).values()) >= 100

    await until(begun, 40, "the first letters")
    process.send_signal(number)
    stopped = await service.ended(process)
    assert stopped.code == 130
    sent = sum((await service.times()).values())
    assert sent < 400 and f"{sent} replayed" in stopped.stderr
    assert (await service.call("replay")).code == 0
    assert set((await service.times()).values()) == {1} and len(await service.times()) == 400


@pytest.mark.timeout(120)
async def test_replay_when_another_of_the_group_is_running_then_it_is_refused_and_the_first_goes_on(
    service: Service,
) -> None:
    await service.write(letters_of(service, 600))
    first = await service.start("replay", "--rate", "60")

    async def begun() -> bool:
        return sum((await service.kafka.end_offsets(service.source)).values()) >= 60

    await until(begun, 40, "the first letters")
    second = await service.call("replay")
    assert second.code == 9 and "another `dead-letters replay`" in second.stderr, second.stderr
    done = await service.ended(first)
    assert done.code == 0 and "600 replayed" in done.stderr, done.stderr
    assert set((await service.times()).values()) == {1}


async def test_replays_when_started_together_then_each_letter_goes_out_once(service: Service) -> None:
    await service.write(letters_of(service, 300))
    calls = [await service.start("replay", "--rate", "200") for _ in range(3)]
    codes = [(await service.ended(call)).code for call in calls]
    assert set(codes) <= {0, 9} and 0 in codes  # one that joins when the first is done finds nothing left
    assert set((await service.times()).values()) == {1} and len(await service.times()) == 300


async def test_times_when_given_then_only_letters_between_them_are_listed(
    service: Service,
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=service.kafka.bootstrap)
    await producer.start()
    codec, start = Codec(), 1_764_000_000_000
    for n in range(50):
        letter = codec.dead_letter(Read(service.source, 0, n), Rejected(Reason.MODEL_ERROR, "why"))
        await producer.send_and_wait(
            service.letters,
            letter.value,
            partition=0,
            headers=list(letter.headers),
            timestamp_ms=start + n * 3_600_000,
        )
    await producer.stop()

    def offsets(done: Done) -> list[int]:
        return [line["offset"] for line in done.lines]

    # 2025-11-24T16:00:00Z is the start.
    some = await service.call("list", "--since", "2025-11-24T18:00Z", "--until", "2025-11-24T23:00:00Z")
    assert offsets(some) == [2, 3, 4, 5, 6]
    assert offsets(await service.call("list", "--until", "2025-11-24T17:00:01Z")) == [0, 1]
    assert offsets(await service.call("list", "--since", "1h")) == []
    assert "1 replayed" in (await service.call("replay", "--since", "2025-11-26T16:30Z")).stderr
    assert "49 replayed" in (await service.call("replay")).stderr


async def test_replay_when_letters_cannot_go_back_then_they_are_named_and_the_others_go(
    service: Service,
) -> None:
    kafka = service.kafka
    small = await kafka.create_topic(kafka.unique("dl-small"), 1, {"max.message.bytes": "2000"})
    noise = bytes(random.Random(3).randbytes(5000))
    gone = f"{service.source}.gone"
    codec = Codec()
    stripped = codec.stripped(codec.dead_letter(Read(service.source, 0, 4), Rejected(Reason.TOO_LONG, "why")))
    plain = Reason.MODEL_ERROR
    await service.write([(Read(small, 0, 0, None, b"a"), plain), (Read(small, 0, 1, None, noise), plain)], 0)
    await service.write([(Read(small, 0, 2, None, b"c"), plain), (Read(gone, 0, 3), plain)], 0)
    await service.write([(Read("no topic's name", 0, 3), plain)], 0)
    await kafka.produce(service.letters, [Sent(b"f", b"foreign", (("a", b"1"),), 0)])
    await kafka.produce(service.letters, [Sent(None, b"", (*stripped.headers,), 0)])
    await service.write([(Read(service.source, 0, 5, None, b"last"), plain)], 0)

    done = await service.call("replay")
    assert done.code == 9
    assert "3 replayed (model_error 3), 3 failed, 2 left" in done.stderr, done.stderr
    assert f"topic {gone} does not exist" in done.stderr
    assert f"(from {small}:0:1): refused by {small}:0: " in done.stderr
    assert [r.value for r in await kafka.read_all(small)] == [b"a", b"c"]
    assert [r.value for r in await service.replayed()] == [b"last"]
    assert gone not in (await service.call("list", "--source", small)).stdout

    await kafka.create_topic(gone, 1)
    done = await service.call("replay", "--source", gone)
    assert done.code == 0 and "1 replayed" in done.stderr
    dismissed = await service.call("replay", "--dismiss")
    assert dismissed.code == 0 and "4 dismissed" in dismissed.stderr, dismissed.stderr
    done = await service.call("replay")
    assert done.code == 0 and "0 replayed (" not in done.stderr and " left" not in done.stderr


@pytest.mark.timeout(120)
async def test_replay_when_its_record_is_full_then_it_says_so_and_the_rest_goes_out_once_it_is_not(
    kafka: Kafka, tmp_path: Path
) -> None:
    service, count, chance = await make_service(kafka, tmp_path, 1), 28_000, random.Random(5)
    reasons = chance.choices([Reason.TOO_LONG, Reason.MODEL_ERROR], k=count)
    await service.write([(Read(service.source, 0, n), reason) for n, reason in enumerate(reasons)])
    done = await service.call("replay", "--reason", "too_long")
    assert done.code == 9 and "--dismiss those from offset" in done.stderr, done.stderr
    sent = sum((await service.times()).values())
    assert 8_000 < sent < sum(reason == Reason.TOO_LONG for reason in reasons)
    _, metadata = (await kafka.commits(f"{service.group}.replay", service.letters))[0]
    assert 3500 < len(metadata) <= 4096
    done = await service.call("replay")
    assert done.code == 0 and f"{count - sent:,} replayed" in done.stderr, done.stderr
    times = await service.times()
    assert len(times) == count and set(times.values()) == {1}


async def test_commit_when_made_then_it_outlives_the_groups_own_retention(service: Service) -> None:
    """The value of an offset in the brokers' own topic has a time of expiry (its version 1) only if one was set."""
    await service.write(letters_of(service, 4))
    await service.call("replay")
    group = f"{service.group}.replay".encode()
    kept = [
        record.value
        for record in await service.kafka.read_all("__consumer_offsets")
        if record.value is not None
        and struct.unpack(">h", record.key[:2])[0] in (0, 1)
        and record.key[4:].startswith(group)
    ]
    assert len(kept) >= PARTITIONS
    for value in kept:
        [version] = struct.unpack(">h", value[:2])
        committed_at, expires_at = struct.unpack(">qq", value[-16:])
        assert version == 1
        assert expires_at - committed_at == 3650 * 86_400_000


async def test_letters_when_written_in_transactions_then_the_commit_passes_the_markers(
    service: Service,
) -> None:
    codec = Codec()
    producer = AIOKafkaProducer(
        bootstrap_servers=service.kafka.bootstrap, transactional_id=service.kafka.unique("dl-tx")
    )
    await producer.start()
    for n in range(6):
        letter = codec.dead_letter(Read(service.source, 0, n), Rejected(Reason.MODEL_ERROR, "why"))
        await producer.begin_transaction()
        await producer.send_and_wait(service.letters, letter.value, partition=0, headers=list(letter.headers))
        await (producer.abort_transaction() if n == 3 else producer.commit_transaction())
    await producer.stop()
    one = await service.call("replay", "--source", f"{service.source}:0:2")
    assert "1 replayed" in one.stderr, one.stderr
    assert "4 replayed" in (await service.call("replay")).stderr
    assert [int(dict(r.headers)["inferstream.id"].split(b":")[2]) for r in await service.replayed()] == [
        2,
        0,
        1,
        4,
        5,
    ]
    end = (await service.kafka.end_offsets(service.letters))[0]
    commits = await service.kafka.commits(f"{service.group}.replay", service.letters)
    assert commits[0] == (end, "")
