"""One run: a scene, a sequence of faults on it, and the verdict."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from aiokafka import ConsumerRecord

from inferstream.errors import SettingsError
from inferstream.settings import load_settings
from tests.faults.catalogue import EXACTLY_ONCE, Fault
from tests.faults.checker import check, source_of_dead_letter, source_of_result
from tests.faults.scene import MAX_UNCOMMITTED, Scene, Stuck
from tests.support.client import Kafka
from tests.support.cluster import Cluster

FEWEST, MOST = 200, 1500  # results before a fault


@dataclass(slots=True)
class Injection:
    """``since``, ``undone`` and ``until`` are when it was injected, when what it did was undone and when every
    partition was worked on again, Unix seconds.

    ``results_before``: since the fault before.  ``left``: documents published and not committed at the partition
    that had fewest; a worker holds at most MAX_UNCOMMITTED of them.  ``pause_s``: the longest time without a new
    answer of some input partition; ``back_s``: from ``undone`` until each had a new one.
    """

    fault: str
    results_before: int
    left: int
    since: float
    undone: float
    until: float
    pause_s: float = 0.0
    back_s: float = 0.0

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
    duplicates_allowed: int = 0
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
        proxied=proxied,
        excused=frozenset().union(*(entry.exits for entry in faults)),
    )
    try:
        await scene.open(max(entry.workers for entry in faults))
        for entry in faults:
            report.injections.append(await _inject(scene, entry))
        await scene.finish()
        results = [*scene.deleted, *await kafka.read_all(scene.target)]
        dead_letters = await kafka.read_all(scene.dead_letters)
        inputs = await kafka.read_all(scene.source)
        # in a thread: another run may be under way on this event loop
        findings = await asyncio.to_thread(check, inputs, results, dead_letters, scene.rules)
        times = answer_times(results, dead_letters)
        for injection in report.injections:
            injection.pause_s = longest_pause(times, injection.since, injection.until)
            injection.back_s = first_of_each_after(times, injection.undone)
        report.documents, report.lost = findings.documents, findings.lost
        report.duplicated, report.dead_letters = findings.duplicated, findings.dead_letters
        report.problems += findings.problems
    except Stuck as error:
        report.problems.append(
            f"stuck: {error}; {scene.observer.count} results, left {scene.feeder.left}, "
            f"the last events: {scene.events[-3:]}"
        )
    except Exception as error:
        report.problems.append(f"the harness itself failed: {error!r}")
        scene.note(traceback.format_exc())
    finally:
        await scene.close()
        report.problems += scene.fleet.problems
        report.duplicates_allowed = scene.rules.repeats
        report.seconds = time.monotonic() - began
        scene.note(f"problems: {report.problems}")
    if not report.problems:
        await scene.remove_topics()
    return report


async def _inject(scene: Scene, entry: Fault) -> Injection:
    start = scene.observer.count
    await scene.results(FEWEST, MOST)
    await scene.until(scene.feeder.enough, "more input to be published")
    before, left = scene.observer.count - start, min(scene.feeder.left)
    if scene.guarantee != EXACTLY_ONCE:
        scene.rules.repeats += entry.repeats * MAX_UNCOMMITTED
    scene.note(f"{entry.name} after {scene.observer.count} results, {left} documents left")
    since = time.time()
    await entry.inject(scene)
    undone = time.time()
    if entry.recovers:
        await scene.recovered()
    scene.note(f"{entry.name} is over: {scene.observer.count} results")
    return Injection(entry.name, before, left, since, undone, time.time())


def answer_times(
    results: Iterable[ConsumerRecord], dead_letters: Iterable[ConsumerRecord]
) -> dict[int, np.ndarray]:
    """Input partition → when its answers were produced, in order, Unix seconds."""
    times: dict[int, list[float]] = defaultdict(list)
    for place in (source_of_result, source_of_dead_letter):
        for record in results if place is source_of_result else dead_letters:
            times[place(record)[0]].append(record.timestamp / 1000)
    return {partition: np.sort(np.array(found)) for partition, found in times.items()}


def longest_pause(times: Mapping[int, np.ndarray], since: float, until: float) -> float:
    """The longest time between two answers of one partition that touches the time from ``since`` to ``until``."""
    longest = 0.0
    for found in times.values():
        gaps = np.diff(found)
        touching = (found[:-1] <= until) & (found[1:] >= since)
        longest = max(longest, float(gaps[touching].max(initial=0.0)))
    return longest


def first_of_each_after(times: Mapping[int, np.ndarray], moment: float) -> float:
    """How long after ``moment`` every partition had an answer, in seconds."""
    later = [found[found >= moment] for found in times.values()]
    return max((float(found[0] - moment) for found in later if len(found)), default=0.0)
