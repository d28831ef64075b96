"""One run: a scene, a sequence of faults on it, and the verdict."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from aiokafka import ConsumerRecord

from inferstream.errors import SettingsError
from inferstream.settings import load_settings
from tests.faults.catalogue import Fault
from tests.faults.checker import Input, Window, check
from tests.faults.scene import MAX_UNCOMMITTED, Scene, Stuck
from tests.support.client import Kafka
from tests.support.cluster import Cluster
from tests.support.reader import read_all

FEWEST, MOST = 200, 1500  # results before a fault
BACK_S = 90.0
"""Within that long of a fault's end every input has a new answer.  A session (6 s), a revoke (4 s), two requests that
time out one after the other (12 s each) and a transaction with the brokers' sweep (11 s) make 45 s: this is twice that.
"""


@dataclass(slots=True)
class Injection:
    """``since``, ``undone`` and ``until`` are when it was injected, when what it did was undone and when every
    partition was worked on again, Unix seconds.

    ``results_before``: visible ones since the fault before.  ``left``: published and not committed at the partition
    that had fewest; a worker holds at most MAX_UNCOMMITTED of them.  ``allowed`` and ``repeated``: answers that may be
    there again by this fault, and that are.  ``pause_s``: the longest time without a new answer of some input;
    ``back_s``: from ``undone`` until each had a new one.  ``readers_s``: the longest time for which a reader with
    read_committed was given nothing of some output partition.
    """

    fault: str
    results_before: int
    left: int
    since: float
    undone: float
    until: float
    allowed: int = 0
    repeated: int = 0
    pause_s: float = 0.0
    back_s: float = 0.0
    readers_s: float = 0.0

    @property
    def counted(self) -> bool:
        return self.results_before > 0 and self.left > MAX_UNCOMMITTED


@dataclass(slots=True)
class Report:
    """``problems`` is empty when every promise was kept."""

    name: str
    guarantee: str
    seed: int
    faults: int
    injections: list[Injection] = field(default_factory=list)
    documents: int = 0
    lost: int = 0
    duplicated: int = 0
    dead_letters: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    folder: str = ""

    @property
    def counted(self) -> list[Injection]:
        return [injection for injection in self.injections if injection.counted]

    @property
    def replay(self) -> str:
        return (
            f"python -m tests.faults --only {self.name} --guarantee {self.guarantee} "
            f"--faults {self.faults} --seed {self.seed}"
        )


def refusal(guarantee: str) -> str | None:
    """Why this version of the service cannot be run with the guarantee; None if it can."""
    flags = {
        "kafka.bootstrap_servers": ["localhost:9092"],
        "input.topics": ["in"],
        "output.topic": "out",
        "model.id": "builtin:hash",
        "delivery.guarantee": guarantee,
    }
    try:
        load_settings((), {}, flags)
    except SettingsError as error:
        return str(error).splitlines()[0]
    return None


async def run(
    kafka: Kafka, name: str, faults: Sequence[Fault], guarantee: str, seed: int, folder: Path
) -> Report:
    """Inject the faults one after the other, each after a seeded number of results; never raises for a finding."""
    report = Report(name, guarantee, seed, len(faults), folder=str(folder))
    began = time.monotonic()
    proxied = kafka.proxied if isinstance(kafka, Cluster) and any(f.proxied for f in faults) else None
    scene = Scene(
        kafka,
        folder,
        guarantee,
        seed,
        under_orders=any(entry.under_orders for entry in faults),
        identified=all(entry.identified for entry in faults),
        static=any(entry.static for entry in faults),
        proxied=proxied,
    )
    try:
        await scene.open(max(entry.workers for entry in faults))
        for entry in faults:
            report.injections.append(await _inject(scene, entry))
        if not faults[-1].recovers:
            await scene.recovered()
        over = time.time()
        for injection, entry, window in zip(report.injections, faults, scene.rules.windows, strict=True):
            if not entry.recovers:  # those overlap
                injection.until = window.until = over
        await scene.finish()
        await _judge(scene, report)
    except Stuck as error:
        report.problems.append(
            f"stuck: {error}; {scene.observer.count} results, left {list(scene.feeder.left.values())}, "
            f"the last events: {scene.events[-3:]}"
        )
    except Exception as error:
        report.problems.append(f"the harness itself failed: {error!r}")
        scene.note(traceback.format_exc())
    finally:
        await scene.close()
        report.problems += scene.fleet.problems
        report.seconds = time.monotonic() - began
        scene.note(f"problems: {report.problems}")
    if not report.problems:
        await scene.remove_topics()
    return report


async def _inject(scene: Scene, entry: Fault) -> Injection:
    start = scene.observer.count
    await scene.results(FEWEST, MOST)
    await scene.until(lambda: scene.feeder.enough(MAX_UNCOMMITTED), "more input to be published")
    before, left = scene.observer.count - start, min(scene.feeder.left.values())
    committed = {source: scene.feeder.committed.get(source, 0) for source in scene.inputs}
    allowed = scene.allowed
    scene.excuse(repeats=entry.repeats)
    scene.note(f"{entry.name} after {scene.observer.count} results, {left} documents left")
    since = time.time()
    await entry.inject(scene)
    undone = time.time()
    if entry.recovers:
        await scene.recovered()
    scene.note(f"{entry.name} is over: {scene.observer.count} results")
    until, allowed = time.time(), scene.allowed - allowed
    scene.rules.windows.append(Window(entry.name, since, until, allowed, committed))
    return Injection(entry.name, before, left, since, undone, until, allowed)


async def _judge(scene: Scene, report: Report) -> None:
    results = [*scene.deleted, *await _read(scene, scene.target, report)]
    dead_letters = await _read(scene, scene.dead_letters, report)
    inputs = [
        record
        for topic in scene.sources
        for record in await asyncio.to_thread(read_all, scene.kafka.bootstrap, topic)
    ]
    # in a thread: another run may be under way on this event loop
    findings = await asyncio.to_thread(check, inputs, results, dead_letters, scene.rules)
    given = {
        place: np.array(times) for place, times in scene.observer.arrivals.items() if place[0] == scene.target
    }
    for n, injection in enumerate(report.injections):
        injection.readers_s = longest_pause(given, injection.since, injection.until)
        injection.repeated = findings.repeated[n]
        injection.pause_s = longest_pause(findings.times, injection.since, injection.until)
        injection.back_s = first_of_each_after(findings.times, injection.undone)
        there = scene.rules.windows[n].committed  # an input that came later has answers of later
        late = [source for source in there if not answered(findings.times, source, injection.undone)]
        if late:
            report.problems.append(
                f"no answer within {BACK_S:.0f} s of the end of fault {n + 1}, {injection.fault}: {late}"
            )
    report.documents, report.lost = findings.documents, findings.lost
    report.duplicated, report.dead_letters = findings.duplicated, findings.dead_letters
    report.problems += findings.problems


async def _read(scene: Scene, topic: str, report: Report) -> list[ConsumerRecord]:
    """What a reader with read_committed sees: by librdkafka, and by the client that the service is built on."""
    records = await asyncio.to_thread(read_all, scene.kafka.bootstrap, topic)
    there = {(record.partition, record.offset) for record in records}
    differ = there ^ {(record.partition, record.offset) for record in await scene.kafka.read_all(topic)}
    if differ:
        report.problems.append(
            f"{len(differ)} records of {topic} that only one of two clients sees: {min(differ)}"
        )
    return records


def answered(times: Mapping[Input, np.ndarray], source: Input, moment: float) -> bool:
    """Whether the input has an answer within BACK_S of the moment."""
    found = times.get(source, np.empty(0))
    return bool(((found >= moment) & (found <= moment + BACK_S)).any())


def longest_pause(times: Mapping[Input, np.ndarray], since: float, until: float) -> float:
    """The longest time between two answers of one partition that touches the time from ``since`` to ``until``."""
    longest = 0.0
    for found in times.values():
        gaps = np.diff(found)
        touching = (found[:-1] <= until) & (found[1:] >= since)
        longest = max(longest, float(gaps[touching].max(initial=0.0)))
    return longest


def first_of_each_after(times: Mapping[Input, np.ndarray], moment: float) -> float:
    """How long after ``moment`` every partition had an answer, in seconds."""
    later = [found[found >= moment] for found in times.values()]
    return max((float(found[0] - moment) for found in later if len(found)), default=0.0)
