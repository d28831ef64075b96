"""Reads a whole run from its topics and says what is missing, out of order or repeated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiokafka import ConsumerRecord


@dataclass(slots=True)
class Run:
    """Consecutive results of one input partition: source offsets ``first`` to ``last``, increasing."""

    first: int
    last: int
    count: int = 1


@dataclass(slots=True)
class Verdict:
    """What the output and dead-letter topics say about one input partition set.

    Partitions are what the places call them: numbers where one topic is read.
    """

    answered: dict[Any, set[int]] = field(default_factory=lambda: defaultdict(set))
    runs: dict[Any, list[Run]] = field(default_factory=lambda: defaultdict(list))
    repeats: int = 0

    def missing(self, inputs: dict[int, int]) -> list[tuple[int, int]]:
        """(partition, offset) of each input without an answer; ``inputs`` is the end offset per partition."""
        return [
            (partition, offset)
            for partition, end in inputs.items()
            for offset in range(end)
            if offset not in self.answered[partition]
        ]


def judge(results: Sequence[ConsumerRecord], dead_letters: Sequence[ConsumerRecord] = ()) -> Verdict:
    """Judge records as ``Kafka.read_all`` gives them: by output partition, in offset order.

    A tombstone that was passed on names no source, so it is left out.
    """
    sources = [orjson.loads(record.value)["source"] for record in results if record.value is not None]
    headers = [dict(record.headers) for record in dead_letters]
    return judge_places(
        [(source["partition"], source["offset"]) for source in sources],
        [
            (int(found["inferstream.source.partition"]), int(found["inferstream.source.offset"]))
            for found in headers
        ],
    )


def judge_places(
    results: Iterable[tuple[Hashable, int]], dead_letters: Iterable[tuple[Hashable, int]] = ()
) -> Verdict:
    """Judge answers by the partition and offset of what they answer, in the order in which they are found.

    A run ends where the source offset of a partition does not increase; so two workers that both write, or a
    result that overtakes another, show as a further run, and a repeat is a result whose source was answered.
    """
    verdict = Verdict()
    for partition, offset in results:
        runs = verdict.runs[partition]
        if runs and offset > runs[-1].last:
            runs[-1].last = offset
            runs[-1].count += 1
        else:
            runs.append(Run(offset, offset))
        if offset in verdict.answered[partition]:
            verdict.repeats += 1
        verdict.answered[partition].add(offset)
    for partition, offset in dead_letters:
        if offset in verdict.answered[partition]:
            verdict.repeats += 1
        verdict.answered[partition].add(offset)
    return verdict
