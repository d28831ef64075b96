"""The watchdog's judgement, without Kafka and with a clock that the test moves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, SaslAuthenticationFailed
from pydantic import SecretStr

from inferstream import watchdog as module
from inferstream.errors import KafkaRefused, NoProgress
from inferstream.kafka import security as security_module
from inferstream.kafka.security import credentials_of
from inferstream.lanes import Lane
from inferstream.settings.tree import Kafka, Security
from inferstream.watchdog import Watchdog

HANG_S = 120.0


@dataclass
class World:
    """A worker at rest: one partition, nothing to read, credit free, the broker answers."""

    now: float = 1000.0
    lane: Lane = field(default_factory=lambda: Lane("in", 0, 1, 0))
    end: int = 0
    credit: int = 10
    last_admitted: float = 1000.0
    rebalancing: bool = False
    cautious: bool = False
    broker_answers: bool = True
    busy_since: float | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    producing: asyncio.Event = field(default_factory=asyncio.Event)
    security: Security = field(default_factory=Security)

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        if not self.broker_answers:
            raise KafkaConnectionError
        return dict.fromkeys(partitions, self.end)

    def watchdog(self) -> Watchdog:
        def owner(name: str) -> Any:
            return SimpleNamespace(**({name: self.tasks[name]} if name in self.tasks else {}))

        consumer = SimpleNamespace(
            _fetcher=owner("_fetch_task"),
            _coordinator=owner("_coordination_task"),
            _client=owner("_sync_task"),
            end_offsets=self.end_offsets,
        )
        source: Any = self
        self.consumer = consumer
        self.lanes = [self.lane]
        sink: Any = SimpleNamespace(
            producing=self.producing,
            producer=SimpleNamespace(_sender=owner("_sender_task"), client=SimpleNamespace()),
        )
        pipeline: Any = SimpleNamespace(
            stage=SimpleNamespace(busy_since=lambda: self.busy_since),
            credit=SimpleNamespace(poll_limit=lambda lanes: (lanes if self.credit else [], self.credit)),
        )
        settings: Any = SimpleNamespace(
            device=SimpleNamespace(hang_timeout_s=HANG_S), kafka=Kafka(security=self.security)
        )
        return Watchdog(settings, source, sink, pipeline)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: world.now))
    return world


async def after(world: World, watchdog: Watchdog, seconds: float) -> None:
    """Check as the watchdog does, every 5 s for so long."""
    for _ in range(int(seconds / module.CHECK_S)):
        world.now += module.CHECK_S
        watchdog._device_moves()
        await watchdog._records_move()


async def test_watchdog_when_records_wait_and_nothing_is_read_then_no_progress(world: World) -> None:
    world.end = 5
    with pytest.raises(NoProgress, match="in:0 has records after offset 0"):
        await after(world, world.watchdog(), 200)


def nothing_to_read(world: World) -> None:
    world.end = 0


def no_credit(world: World) -> None:
    world.credit = 0


def rebalance(world: World) -> None:
    world.rebalancing = True


def broker_away(world: World) -> None:
    world.broker_answers = False


def one_at_a_time(world: World) -> None:
    world.cautious = True


@pytest.mark.parametrize("excuse", [nothing_to_read, no_credit, rebalance, broker_away, one_at_a_time])
async def test_watchdog_when_there_is_an_excuse_then_it_waits(
    world: World, excuse: Callable[[World], None]
) -> None:
    world.end = 5
    excuse(world)
    await after(world, world.watchdog(), 1000)


async def test_watchdog_when_records_come_after_a_long_silence_then_it_waits_anew(world: World) -> None:
    watchdog = world.watchdog()
    await after(world, watchdog, 1000)
    world.end = 5
    await after(world, watchdog, 50)
    world.last_admitted = world.now
    world.lane.advance(5)
    await after(world, watchdog, 1000)


async def test_watchdog_when_a_batch_hangs_then_no_progress(world: World) -> None:
    world.busy_since = world.now
    watchdog = world.watchdog()
    await after(world, watchdog, HANG_S - 10)
    with pytest.raises(NoProgress, match="hang_timeout_s"):
        await after(world, watchdog, 30)


async def test_watchdog_when_the_process_was_stopped_then_batches_have_time_to_end(world: World) -> None:
    world.busy_since = world.now
    watchdog = world.watchdog()
    world.now += 1000
    await after(world, watchdog, 5)
    world.busy_since = world.now  # the next batch
    await after(world, watchdog, HANG_S - 10)


@pytest.mark.parametrize("name", ["_fetch_task", "_coordination_task", "_sync_task", "_sender_task"])
async def test_watchdog_when_a_task_of_the_client_has_died_then_no_progress(world: World, name: str) -> None:
    async def die() -> None:
        raise KeyError("a bug of the client")

    world.tasks[name] = asyncio.create_task(die())
    await asyncio.wait([world.tasks[name]])
    world.producing.set()
    async with asyncio.timeout(5):
        with pytest.raises(NoProgress, match="has died"):
            await world.watchdog().run()


async def test_watchdog_when_brokers_have_refused_our_login_for_a_minute_then_kafka_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.security = Security(
        protocol="SASL_SSL", mechanism="PLAIN", username="alice", password=SecretStr("hunter2")
    )
    monkeypatch.setattr(security_module, "time", SimpleNamespace(monotonic=lambda: world.now))
    credentials = credentials_of(world.security)
    watchdog = world.watchdog()
    for _ in range(13):
        watchdog._brokers_take_us()
        credentials.refused("broker:9093", SaslAuthenticationFailed("Invalid username or password"))
        world.now += 5
    with pytest.raises(KafkaRefused, match=r"broker:9093.*alice.*wrong user or password") as caught:
        watchdog._brokers_take_us()
    assert "hunter2" not in str(caught.value)
    credentials.accepted("broker:9093")
    watchdog._brokers_take_us()


async def test_watchdog_when_a_broker_refused_once_and_is_not_asked_again_then_it_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.security = Security(protocol="SSL")
    monkeypatch.setattr(security_module, "time", SimpleNamespace(monotonic=lambda: world.now))
    watchdog = world.watchdog()
    for _ in range(20):
        credentials_of(world.security).refused("broker:9093", SaslAuthenticationFailed("no"))
        world.now += 30
        watchdog._brokers_take_us()


async def test_watchdog_when_a_producer_is_being_replaced_then_its_dead_tasks_do_not_count(
    world: World,
) -> None:
    world.tasks["_sender_task"] = asyncio.create_task(asyncio.sleep(0))
    await asyncio.wait([world.tasks["_sender_task"]])
    running = asyncio.create_task(world.watchdog().run())
    done, _ = await asyncio.wait([running], timeout=0.1)
    running.cancel()
    assert not done


def exits(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch, checks: int, beats: bool) -> list[int]:
    """The exit codes of the watching thread over so many checks."""
    codes: list[int] = []

    class Ended(threading.Event):
        left = checks

        def wait(self, timeout: float | None = None) -> bool:
            self.left -= 1
            if beats:
                watchdog._beat += 1
            return self.left < 0 or bool(codes)

    monkeypatch.setattr(module, "os", SimpleNamespace(_exit=codes.append))
    watchdog._ended = Ended()
    watchdog._watch_loop()
    return codes


async def test_watchdog_when_the_loop_is_blocked_then_the_process_exits_8(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits(world.watchdog(), monkeypatch, 30, beats=False) == [8]
    assert "the event loop has been blocked" in capsys.readouterr().err


async def test_watchdog_when_the_process_was_stopped_as_a_whole_then_it_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = world.watchdog()
    world.now += 1000
    assert exits(watchdog, monkeypatch, 3, beats=False) == []
    assert exits(watchdog, monkeypatch, 30, beats=True) == []
