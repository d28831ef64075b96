"""What the pipeline meets, moved by hand: a clock, worker threads, a device and a broker without threads or time.

Nothing happens by itself: a test says which piece of work begins or ends, which batch comes back from the device and
how, and what the broker answers.  So any order of events can be had, and the same one again.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiokafka.errors import KafkaConnectionError, KafkaError, OutOfOrderSequenceNumber

from inferstream.batching import Item
from inferstream.device import Flight
from inferstream.device.stage import DeviceStage

TURNS = 12  # of the event loop after each event: what it sets off has happened by then


class _NoWaiting(selectors.SelectSelector):
    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None and not self.loop.stopping:
            raise AssertionError("everything waits, and nothing will ever happen")
        self.loop.now += timeout or 0.0
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when all of its tasks sleep; then at once."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.stopping = False
        selector = _NoWaiting()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def go(self, event: Callable[..., Any] | Awaitable[Any], *arguments: Any) -> Any:
        """Let an event happen on the loop, a call or something to await, and what follows without time passing."""

        async def happen() -> Any:
            value = await event if isinstance(event, Awaitable) else event(*arguments)
            for _ in range(TURNS):
                await asyncio.sleep(0)
            return value

        return self.run_until_complete(happen())


class SimulatedTime:
    """In place of the module ``time``; ``loop`` is that of the present example."""

    loop: SimulatedLoop

    def monotonic(self) -> float:
        return self.loop.now

    def time(self) -> float:
        return 1_764_000_000.0 + self.loop.now


class HandWorkers:
    """Worker threads, behind :class:`inferstream.workers.Workers`: work begins in its order, and ends in any."""

    def __init__(self, *arguments: Any) -> None:
        self.waiting: list[tuple[int, int, Callable[[Any], Any], Any, Callable[[Any], None]]] = []
        self.ended: list[tuple[Callable[[Any], None], Any]] = []
        self._submitted = 0

    def submit(
        self, priority: int, work: Callable[[Any], Any], argument: Any, done: Callable[[Any], None]
    ) -> None:
        self.waiting.append((priority, self._submitted, work, argument, done))
        self._submitted += 1

    def work(self) -> None:
        """Do the next piece; its outcome is not told yet."""
        if self.waiting:
            first = min(self.waiting, key=lambda each: each[:2])
            self.waiting.remove(first)
            _, _, work, argument, done = first
            self.ended.append((done, work(argument)))

    def tell(self, pick: int) -> None:
        """Tell the event loop of one that has ended."""
        if self.ended:
            done, result = self.ended.pop(pick % len(self.ended))
            done(result)


class HandStage(DeviceStage):
    """The device stage without its threads: batches end when and how the test says."""

    def _launcher(self) -> None:
        return

    def _waiter(self) -> None:
        return

    def flying(self) -> list[int]:
        """The staging slots whose batches are on the device."""
        return list(self._running)

    def batch_of(self, slot: int) -> list[Item]:
        return self._running[slot].items

    def end(self, slot: int, rows: np.ndarray | None, error: BaseException | None = None) -> None:
        self._settle(Flight(slot, rows, error, 0.001))


@dataclass
class HandDevice:
    """Only what the stage asks of a device before it launches."""

    slots: int
    padded: bool
    name: str = "hand"
    lanes: int = 1
    max_tokens: int | None = None


@dataclass(eq=False)
class HandBatch:
    """A record batch; ``limit`` is how many records fit."""

    limit: int
    records: list[dict[str, Any]] = field(default_factory=list)

    def append(self, **record: Any) -> dict[str, Any] | None:
        if len(self.records) == self.limit:
            return None
        self.records.append(record)
        return record

    def close(self) -> None:
        return


@dataclass(eq=False)
class Sending:
    """A batch between the producer and the broker's answer."""

    producer: HandProducer
    topic: str
    partition: int
    batch: HandBatch
    answer: asyncio.Future[None]


class HandBroker:
    """Keeps what is appended, by topic and partition; answers when the test says.

    As the real one does, it refuses what follows a hole in a producer's sequence.
    """

    def __init__(self, batch_limit: int, refuses: Callable[[str, dict[str, Any]], KafkaError | None]) -> None:
        self.batch_limit = batch_limit
        self.refuses = refuses
        self.logs: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        self.sendings: list[Sending] = []
        self.away = False
        self.holes: set[tuple[HandProducer, str, int]] = set()

    def producer(self) -> Any:
        return HandProducer(self)

    def answer(self, pick: int, appended: bool, error: KafkaError | None) -> None:
        """Answer one batch as it deserves, or with ``error``; then it may be ``appended`` all the same."""
        if not self.sendings:
            return
        sending = self.sendings.pop(pick % len(self.sendings))
        place = (sending.producer, sending.topic, sending.partition)
        refusals = (self.refuses(sending.topic, record) for record in sending.batch.records)
        if place in self.holes:
            error, appended = OutOfOrderSequenceNumber(), False
        elif (refusal := next(filter(None, refusals), None)) is not None:
            error, appended = refusal, False
        if error is None or appended:
            self.logs[sending.topic, sending.partition] += sending.batch.records
        if sending.answer.done():
            return
        if error is None:
            sending.answer.set_result(None)
        else:
            self.holes.add(place)
            sending.answer.set_exception(error)


class HandProducer:
    """Behind the part of ``AIOKafkaProducer`` that the sink uses."""

    def __init__(self, broker: HandBroker) -> None:
        self._broker = broker
        self._stopped = False

    async def start(self) -> None:
        if self._broker.away:
            raise KafkaConnectionError("away")

    async def stop(self) -> None:
        self._stopped = True

    def create_batch(self) -> HandBatch:
        assert not self._stopped
        return HandBatch(self._broker.batch_limit)

    async def send_batch(self, batch: HandBatch, topic: str, *, partition: int) -> asyncio.Future[None]:
        assert not self._stopped and batch.records
        if self._broker.away:
            raise KafkaConnectionError("away")
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._broker.sendings.append(Sending(self, topic, partition, batch, answer))
        return answer


def first_occurrences(keys: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(keys))
