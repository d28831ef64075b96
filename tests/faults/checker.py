"""The verdict on a run, from its logs alone: no time is looked at, and nothing that the service says of itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import orjson
from aiokafka import ConsumerRecord
from aiokafka.partitioner import murmur2

from inferstream.documents import Reason
from inferstream.tasks.hash import hash_vectors
from tests.faults.documents import Answer, answer
from tests.support.judge import judge

EXAMPLES = 3  # of one kind of finding, that are named

Place = tuple[int, int]
"""Partition and offset of an input record."""


@dataclass(slots=True)
class Rules:
    """What the faults of a run excuse.

    ``repeats`` is the most answers that may be there again.  ``raised``: the device raised on documents whose
    digest begins with one of these bytes, so they may be dead letters.  ``refused``: the output topic's limit was
    lowered, so large results may be dead letters.  ``unsettled`` lay in a transaction that was open when their topic
    was deleted, so they may be gone with it.
    """

    input_partitions: int
    output_partitions: int
    dead_letter_partitions: int
    repeats: int = 0
    raised: set[int] = field(default_factory=set)
    refused: bool = False
    unsettled: set[Place] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Findings:
    """``problems`` is empty when the run kept every promise; each line names where to look."""

    documents: int
    lost: int
    duplicated: int
    dead_letters: int
    problems: tuple[str, ...]


class _Problems:
    def __init__(self) -> None:
        self._examples: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, where: str) -> None:
        self._counts[kind] += 1
        if len(self._examples[kind]) < EXAMPLES:
            self._examples[kind].append(where)

    def lines(self) -> tuple[str, ...]:
        return tuple(
            f"{count} × {kind}: {'; '.join(self._examples[kind])}" for kind, count in self._counts.items()
        )


def check(
    inputs: Sequence[ConsumerRecord],
    results: Sequence[ConsumerRecord],
    dead_letters: Sequence[ConsumerRecord],
    rules: Rules,
) -> Findings:
    """Judge the records as ``Kafka.read_all`` gives them: by partition, in offset order.

    Every input has an answer; no more answers are there again than ``rules`` allow; for each pair of source and
    output partition the first answers are in the order of the input, and so are the second, the third, …; each answer
    is on its partition and is what the input must become.
    """
    problems = _Problems()
    sources = {(record.partition, record.offset): record for record in inputs}
    answers = {place: answer(record.value) for place, record in sources.items()}
    verdict = judge(results, dead_letters)
    owed = sources.keys() - rules.unsettled
    lost = sorted(place for place in owed if place[1] not in verdict.answered[place[0]])
    for place in lost:
        problems.add("no answer", _named(place))
    if verdict.repeats > rules.repeats:
        problems.add(f"answers there again, where {rules.repeats} were allowed", str(verdict.repeats))

    placed = [(record, source_of_result(record)) for record in results]
    buried = [(record, source_of_dead_letter(record)) for record in dead_letters]
    # A worker that answers a document again may have another answer: the limit of a topic has changed, or its device
    # raises no more.  And that a result is refused is known when later records may be dead letters already.
    unsteady = {place for _, place in placed} & {place for _, place in buried}
    unsteady |= {place for record, place in buried if reason_of(record) == Reason.RECORD_REFUSED}
    for what, answered in (("results", placed), ("dead letters", buried)):
        _check_order([entry for entry in answered if entry[1] not in unsteady], what, problems)
    _check_results(placed, sources, answers, rules, problems)
    _check_dead_letters(buried, sources, answers, rules, problems)
    return Findings(len(sources), len(lost), verdict.repeats, len(dead_letters), problems.lines())


def source_of_result(record: ConsumerRecord) -> Place:
    """Partition and offset of the input that the result answers."""
    source = orjson.loads(record.value)["source"]
    return source["partition"], source["offset"]


def source_of_dead_letter(record: ConsumerRecord) -> Place:
    headers = dict(record.headers)
    return int(headers["inferstream.source.partition"]), int(headers["inferstream.source.offset"])


def reason_of(dead_letter: ConsumerRecord) -> Reason:
    return Reason(dict(dead_letter.headers)["inferstream.error.reason"].decode())


def _check_order(placed: Iterable[tuple[ConsumerRecord, Place]], what: str, problems: _Problems) -> None:
    """The n-th answers come in the order of the input, for every n.

    Owners of a partition come one after the other, each from an offset at or after its predecessor's start and
    leaving out nothing, so this holds also where an owner that was taken for dead still writes beside the next.
    """
    seen: Counter[tuple[int, Place]] = Counter()
    last: dict[tuple[int, int, int], int] = {}
    for record, place in placed:
        partition, offset = place
        seen[record.partition, place] += 1
        nth = (partition, record.partition, seen[record.partition, place])
        if offset < last.get(nth, -1):
            problems.add(
                f"{what} out of order",
                f"{_named(place)} (occurrence {nth[2]}) after {last[nth]}, at "
                f"{record.topic}:{record.partition}:{record.offset}",
            )
        last[nth] = offset


def _check_results(
    placed: Sequence[tuple[ConsumerRecord, Place]],
    sources: Mapping[Place, ConsumerRecord],
    answers: Mapping[Place, Answer],
    rules: Rules,
    problems: _Problems,
) -> None:
    vectors: list[list[float]] = []
    digests: list[bytes] = []
    where: list[Place] = []
    for record, place in placed:
        source, expected = sources.get(place), answers.get(place)
        if source is None or expected is None:
            problems.add("result of no input", _named(place))
            continue
        if expected.digest is None:
            problems.add("result of what is no document", _named(place))
            continue
        value = orjson.loads(record.value)
        told = (value["id"], value["source"]["topic"], value.get("metadata"))
        if told != (expected.id, source.topic, expected.metadata):
            problems.add("wrong id, topic or metadata", _named(place))
        if record.key != source.key or not set(source.headers) <= set(record.headers):
            problems.add("wrong key or headers", _named(place))
        if record.partition != _partition(source, rules.input_partitions, rules.output_partitions):
            problems.add("result on the wrong partition", f"{_named(place)} on {record.partition}")
        vectors.append(value["output"]["embedding"])
        digests.append(expected.digest)
        where.append(place)
    if digests:
        equal = (np.array(vectors, dtype=np.float32) == hash_vectors(digests)).all(axis=1)
        for n in np.flatnonzero(~equal):
            problems.add("wrong vector", _named(where[n]))


def _check_dead_letters(
    buried: Sequence[tuple[ConsumerRecord, Place]],
    sources: Mapping[Place, ConsumerRecord],
    answers: Mapping[Place, Answer],
    rules: Rules,
    problems: _Problems,
) -> None:
    for record, place in buried:
        source, expected = sources.get(place), answers.get(place)
        if source is None or expected is None:
            problems.add("dead letter of no input", _named(place))
            continue
        reason = reason_of(record)
        if reason not in _allowed(expected, rules):
            problems.add(f"dead letter for {reason}, which no fault excuses", _named(place))
        if (record.key, record.value) != (source.key, source.value):
            problems.add("dead letter that is not the input's record", _named(place))
        if not set(source.headers) <= set(record.headers):
            problems.add("wrong headers", _named(place))
        if record.partition != _partition(source, rules.input_partitions, rules.dead_letter_partitions):
            problems.add("dead letter on the wrong partition", f"{_named(place)} on {record.partition}")


def _allowed(expected: Answer, rules: Rules) -> set[Reason]:
    if expected.reason is not None:
        return {expected.reason}
    allowed = set()
    if expected.digest is not None and expected.digest[0] in rules.raised:
        allowed.add(Reason.MODEL_ERROR)
    if expected.large and rules.refused:
        # a worker that starts meanwhile reads the lowered limit and does not even try
        allowed |= {Reason.RECORD_REFUSED, Reason.RESULT_TOO_LARGE}
    return allowed


def _partition(source: ConsumerRecord, inputs: int, outputs: int) -> int:
    if inputs == outputs:
        return int(source.partition)
    return int((murmur2(source.key) & 0x7FFFFFFF) % outputs)


def _named(place: Place) -> str:
    return f"{place[0]}:{place[1]}"
