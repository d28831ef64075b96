"""The verdict on a run, from its logs alone: nothing is believed that the service says of itself.

What clocks say is used for one thing: which fault a repeated answer belongs to.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import orjson
from aiokafka import ConsumerRecord
from aiokafka.partitioner import murmur2

from inferstream.documents import Reason
from inferstream.tasks.hash import hash_vectors
from tests.faults.documents import Answer, Reading, answer
from tests.support.judge import judge_places

EXAMPLES = 3  # of one kind of finding, that are named

Input = tuple[str, int]
"""Topic and partition that documents come from."""
Place = tuple[Input, int]
"""Input and offset of one record."""
Source = Place | bytes
"""What an answer says it answers: a place, or the number in the header of a tombstone that was passed on."""


@dataclass(slots=True)
class Window:
    """One fault as repeated answers see it: it was done from ``since`` on and over at ``until``, Unix seconds.

    It may repeat ``allowed`` answers, and none of a record before the offset that was ``committed`` when it began.
    """

    name: str
    since: float
    until: float
    allowed: int
    committed: Mapping[Input, int] = field(default_factory=dict)


@dataclass(slots=True)
class Rules:
    """What a run is held to, and what its faults excuse.

    ``input_partitions`` are those of each topic when the run began.  ``raised``: the device raised on documents that
    have a digest beginning with one of these bytes, so they may be dead letters.  ``refused``: the output topic's
    limit was lowered, so large results may be dead letters.  ``unsettled`` lay in a transaction that was open when
    their topic was deleted, so they may be gone with it.  ``widened``: the input has got more partitions, so which ones
    keep their number depends on when a worker started.
    """

    input_partitions: int
    output_partitions: int
    dead_letter_partitions: int
    reading: Reading = field(default_factory=Reading)
    windows: list[Window] = field(default_factory=list)
    raised: set[int] = field(default_factory=set)
    refused: bool = False
    unsettled: set[Source] = field(default_factory=set)
    widened: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """``repeated`` is by window; ``problems``, which say where to look, is empty when every promise was kept."""

    documents: int
    lost: int
    duplicated: int
    dead_letters: int
    repeated: tuple[int, ...]
    times: Mapping[Input, np.ndarray]
    """When the answers to each input were produced, in order, Unix seconds."""
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


Placed = list[tuple[ConsumerRecord, Place]]


def check(
    inputs: Sequence[ConsumerRecord],
    results: Sequence[ConsumerRecord],
    dead_letters: Sequence[ConsumerRecord],
    rules: Rules,
) -> Findings:
    """Judge the records as ``read_all`` gives them: by topic and partition, in offset order.

    Every input has an answer; no more answers are there again than each window of ``rules`` allows; for each pair of
    source and output partition the first answers are in the order of the input, and so are the second, the third, …;
    each answer is on its partition and is what the input must become.
    """
    problems = _Problems()
    sources = {((record.topic, record.partition), record.offset): record for record in inputs}
    answers = {place: answer(record.key, record.value, rules.reading) for place, record in sources.items()}
    numbered = _numbered(sources, answers)
    unsettled = {
        place
        for source in rules.unsettled
        for place in (numbered.get(source, []) if isinstance(source, bytes) else [source])
    }
    placed = _placed(results, numbered, problems)
    buried: Placed = [(record, source_of_dead_letter(record)) for record in dead_letters]
    verdict = judge_places([place for _, place in placed], [place for _, place in buried])
    lost = sorted(
        (source, offset)
        for source, offset in sources.keys() - unsettled
        if offset not in verdict.answered[source]
    )
    for place in lost:
        problems.add("no answer", _named(place))
    repeated = _check_repeats([*placed, *buried], rules.windows, problems)

    # A worker that answers a document again may have another answer: the limit of a topic has changed, or its device
    # raises no more.  And that a result is refused is known when later records may be dead letters already.
    unsteady: set[Hashable] = {place for _, place in placed} & {place for _, place in buried}
    unsteady |= {place for record, place in buried if reason_of(record) == Reason.RECORD_REFUSED}
    for what, answered in (("results", placed), ("dead letters", buried)):
        _check_order([entry for entry in answered if entry[1] not in unsteady], what, problems)
    _check_results(placed, sources, answers, rules, problems)
    _check_dead_letters(buried, sources, answers, rules, problems)
    times: dict[Input, list[float]] = defaultdict(list)
    for record, (source, _) in [*placed, *buried]:
        times[source].append(record.timestamp / 1000)
    return Findings(
        len(sources),
        len(lost),
        verdict.repeats,
        len(dead_letters),
        repeated,
        {source: np.sort(np.array(found)) for source, found in times.items()},
        problems.lines(),
    )


def source_of_result(record: ConsumerRecord) -> Source | None:
    """The input that the result or tombstone answers; None if it does not say."""
    if record.value is None:
        return dict(record.headers).get("number")
    source = orjson.loads(record.value)["source"]
    return (source["topic"], source["partition"]), source["offset"]


def source_of_dead_letter(record: ConsumerRecord) -> Place:
    headers = {name: value for name, value in record.headers if name.startswith("inferstream.source.")}
    topic, partition, offset = (
        headers[f"inferstream.source.{name}"].decode() for name in ("topic", "partition", "offset")
    )
    return (topic, int(partition)), int(offset)


def reason_of(dead_letter: ConsumerRecord) -> Reason:
    return Reason(dict(dead_letter.headers)["inferstream.error.reason"].decode())


def _numbered(
    sources: Mapping[Place, ConsumerRecord], answers: Mapping[Place, Answer]
) -> dict[bytes, list[Place]]:
    """Where the tombstones of each number are: several if the publisher's client has sent one again."""
    found: dict[bytes, list[Place]] = defaultdict(list)
    for place, expected in answers.items():
        if expected.tombstone:
            found[dict(sources[place].headers)["number"]].append(place)
    return found


def _placed(
    results: Sequence[ConsumerRecord], numbered: Mapping[bytes, list[Place]], problems: _Problems
) -> Placed:
    """Each result with what it answers: the n-th tombstone of a number is for the n-th input with it."""
    placed: Placed = []
    seen: Counter[bytes] = Counter()
    for record in results:
        source = source_of_result(record)
        if isinstance(source, bytes):
            places = numbered.get(source, [])
            seen[source] += 1
            source = places[min(seen[source], len(places)) - 1] if places else None
        if source is None:
            problems.add("tombstone of no input", f"{record.topic}:{record.partition}:{record.offset}")
        else:
            placed.append((record, source))
    return placed


def _check_repeats(answered: Placed, windows: Sequence[Window], problems: _Problems) -> tuple[int, ...]:
    """Give every repeated answer to the fault that explains it; how many each window has got comes back.

    A fault explains one that is produced after it began, where the answer before it was produced before it was over,
    and the input was not committed when it began.  Of several the first one that has room left does.
    """
    produced: dict[Place, list[float]] = defaultdict(list)
    for record, place in answered:
        produced[place].append(record.timestamp / 1000)
    counts = [0] * len(windows)
    for (source, offset), times in produced.items():
        for before, again in pairwise(sorted(times)):
            explaining = [
                n
                for n, window in enumerate(windows)
                if window.since <= again
                and before <= window.until
                and offset >= window.committed.get(source, 0)
            ]
            if not explaining:
                problems.add("answer there again, which no fault explains", _named((source, offset)))
                continue
            roomy = [n for n in explaining if counts[n] < windows[n].allowed]
            counts[(roomy or explaining[-1:])[0]] += 1
    for n, (window, count) in enumerate(zip(windows, counts, strict=True), 1):
        if count > window.allowed:
            problems.add(
                f"answers there again, where {window.allowed} were allowed",
                f"{count} of fault {n}, {window.name}",
            )
    return tuple(counts)


def _check_order(placed: Iterable[tuple[ConsumerRecord, Place]], what: str, problems: _Problems) -> None:
    """The n-th answers come in the order of the input, for every n.

    Owners of a partition come one after the other, each from an offset at or after its predecessor's start and
    leaving out nothing, so this holds also where an owner that was taken for dead still writes beside the next.
    """
    seen: Counter[tuple[int, Place]] = Counter()
    last: dict[tuple[Input, int, int], int] = {}
    for record, place in placed:
        source, offset = place
        seen[record.partition, place] += 1
        nth = (source, record.partition, seen[record.partition, place])
        if offset < last.get(nth, -1):
            problems.add(
                f"{what} out of order",
                f"{_named(place)} (occurrence {nth[2]}) after {last[nth]}, at "
                f"{record.topic}:{record.partition}:{record.offset}",
            )
        last[nth] = offset


def _check_results(
    placed: Placed,
    sources: Mapping[Place, ConsumerRecord],
    answers: Mapping[Place, Answer],
    rules: Rules,
    problems: _Problems,
) -> None:
    vectors: list[list[float]] = []
    where: list[tuple[Place, Answer]] = []
    for record, place in placed:
        source, expected = sources.get(place), answers.get(place)
        if source is None or expected is None:
            problems.add("result of no input", _named(place))
            continue
        if record.key != source.key or not set(source.headers) <= set(record.headers):
            problems.add("wrong key or headers", _named(place))
        if record.partition not in _partitions(source, rules, rules.output_partitions):
            problems.add("result on the wrong partition", f"{_named(place)} on {record.partition}")
        if expected.tombstone and record.value is None:
            continue
        if not expected.digests or record.value is None:
            problems.add("result that its input must not have", _named(place))
            continue
        value = orjson.loads(record.value)
        if (value["id"], value.get("metadata")) != (expected.id, expected.metadata):
            problems.add("wrong id or metadata", _named(place))
        if (value["usage"]["truncated"], value["usage"]["chunks"]) != (
            expected.truncated,
            len(expected.digests),
        ):
            problems.add("wrong chunks", _named(place))
        vectors.append(value["output"]["embedding"])
        where.append((place, expected))
    if vectors:
        wrong = np.abs(
            np.array(vectors, dtype=np.float32) - _expected_vectors([expected for _, expected in where])
        ).max(axis=1)
        for n in np.flatnonzero(wrong > [0 if len(entry.digests) == 1 else 1e-6 for _, entry in where]):
            problems.add("wrong vector", _named(where[n][0]))


def _expected_vectors(answers: Sequence[Answer]) -> np.ndarray:
    """[answers, width], float32: a chunked document has the mean of its chunks by their tokens, of unit length."""
    rows = hash_vectors([digest for entry in answers for digest in entry.digests])
    starts = np.cumsum([0, *(len(entry.digests) for entry in answers)])
    vectors = rows[starts[:-1]].copy()
    for n, entry in enumerate(answers):
        if len(entry.digests) > 1:
            weights = np.array(entry.tokens, dtype=np.float64)
            mean = weights @ rows[starts[n] : starts[n + 1]].astype(np.float64)
            vectors[n] = mean / np.linalg.norm(mean)
    return vectors


def _check_dead_letters(
    buried: Placed,
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
        if record.partition not in _partitions(source, rules, rules.dead_letter_partitions):
            problems.add("dead letter on the wrong partition", f"{_named(place)} on {record.partition}")


def _allowed(expected: Answer, rules: Rules) -> set[Reason]:
    if expected.reason is not None:
        return {expected.reason}
    allowed = set()
    if any(digest[0] in rules.raised for digest in expected.digests):
        allowed.add(Reason.MODEL_ERROR)
    if expected.large and rules.refused:
        # a worker that starts meanwhile reads the lowered limit and does not even try
        allowed |= {Reason.RECORD_REFUSED, Reason.RESULT_TOO_LARGE}
    return allowed


def _partitions(source: ConsumerRecord, rules: Rules, outputs: int) -> set[int]:
    """Where the answer may be: on the partition of the input's number, or on that of its key."""
    number = int(source.partition)
    by_key = number % outputs if source.key is None else int((murmur2(source.key) & 0x7FFFFFFF) % outputs)
    if rules.widened:
        return {by_key, *([number] if number < outputs else [])}
    return {number if rules.input_partitions == outputs and number < outputs else by_key}


def _named(place: Place) -> str:
    (topic, partition), offset = place
    return f"{topic}:{partition}:{offset}"
