"""A dead letter as its headers tell it, which of them are meant, and what one is replayed as; no I/O here.

The headers are those of ``schemas/dead-letter-headers.v1.json``.  A record that is not one of ours, or not
quite, is still a letter: what it does not say is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from aiokafka.partitioner import murmur2

from inferstream.codec import HEADER_PREFIX, ID_HEADER, REPLAYS_HEADER, STRIPPED_HEADER
from inferstream.documents import Headers, Reason, Record
from inferstream.errors import SettingsError

SKEW_MS = (
    600_000  # how far apart the clocks of workers may be: letters are not quite in the order of their times
)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGO = re.compile(r"(?:\d{1,9}[smhdw])+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is: a topic, one of its partitions, or one record of it."""

    topic: str
    partition: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.topic, self.partition, self.offset) if part is not None)

    def holds(self, other: Place) -> bool:
        """Whether ``other``, the place of one record, lies here."""
        return (
            self.topic == other.topic
            and self.partition in (None, other.partition)
            and self.offset in (None, other.offset)
        )


@dataclass(frozen=True, slots=True)
class Letter:
    """A record of the dead-letter topic.  ``record.timestamp`` is when it became one, in ms since 1970."""

    record: Record
    reason: str | None
    message: str | None
    stage: str | None
    attempts: int | None
    source: Place | None
    source_timestamp_ms: int | None
    replays: int
    first_id: str | None
    group_id: str | None
    stripped_bytes: int | None

    @property
    def place(self) -> Place:
        return Place(self.record.topic, self.record.partition, self.record.offset)


def letter_of(record: Record) -> Letter:
    """Read the headers of a record of the dead-letter topic; of a name that is there twice, the last counts."""
    headers = {name: value for name, value in record.headers if name.startswith(HEADER_PREFIX)}

    def text(name: str) -> str | None:
        value = headers.get(name)
        return None if value is None else value.decode(errors="replace")

    def number(name: str) -> int | None:
        value = text(name)
        if value is None or not re.fullmatch(r"-?[0-9]{1,19}", value):
            return None
        return int(value)

    topic = text("inferstream.source.topic")
    partition, offset = number("inferstream.source.partition"), number("inferstream.source.offset")
    known = topic and partition is not None and partition >= 0 and offset is not None and offset >= 0
    return Letter(
        record,
        reason=text("inferstream.error.reason"),
        message=text("inferstream.error.message"),
        stage=text("inferstream.error.stage"),
        attempts=number("inferstream.error.attempts"),
        source=Place(topic, partition, offset) if known and topic else None,
        source_timestamp_ms=number("inferstream.source.timestamp_ms"),
        replays=max(0, number(REPLAYS_HEADER) or 0),
        first_id=text(ID_HEADER),
        group_id=text("inferstream.group_id"),
        stripped_bytes=number(STRIPPED_HEADER),
    )


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant; what is empty or None leaves none out.

    ``since_ms`` is included, ``until_ms`` is not; both are about the time at which a document became a letter.
    """

    reasons: frozenset[str] = frozenset()
    sources: tuple[Place, ...] = ()
    since_ms: int | None = None
    until_ms: int | None = None

    def wants(self, letter: Letter) -> bool:
        if self.reasons and letter.reason not in self.reasons:
            return False
        if self.since_ms is not None and letter.record.timestamp < self.since_ms:
            return False
        if self.until_ms is not None and letter.record.timestamp >= self.until_ms:
            return False
        if not self.sources:
            return True
        source = letter.source
        return source is not None and any(place.holds(source) for place in self.sources)


def reason_of(option: str, text: str) -> str:
    """A reason of the closed list; SettingsError names the list for any other."""
    if text not in list(Reason):
        raise SettingsError(f"{option}: {text!r} is no reason; there are: {', '.join(Reason)}")
    return text


def place_of(option: str, text: str) -> Place:
    """``topic``, ``topic:partition`` or ``topic:partition:offset``; SettingsError for anything else."""
    topic, *numbers = text.split(":")
    if not topic or len(numbers) > 2 or not all(re.fullmatch(r"[0-9]{1,18}", part) for part in numbers):
        raise SettingsError(
            f"{option}: {text!r} is no TOPIC, TOPIC:PARTITION or TOPIC:PARTITION:OFFSET, as in documents:3:17"
        )
    return Place(topic, *(int(part) for part in numbers))


def moment_of(option: str, text: str, now: datetime) -> int:
    """A moment in ms since 1970: ISO 8601 (in local time if it names no zone), or so long before ``now``.

    ``now`` has a time zone.  Raises SettingsError for what is neither.
    """
    wanted = text.strip()
    try:
        if _AGO.fullmatch(wanted):
            moment = now
            for amount, unit in re.findall(r"(\d+)([smhdw])", wanted):
                moment -= timedelta(**{_UNITS[unit]: int(amount)})
        else:
            moment = datetime.fromisoformat(wanted)
            if moment.tzinfo is None:
                moment = moment.astimezone()
        return max(0, round(moment.timestamp() * 1000))
    except (ValueError, OverflowError, OSError):
        raise SettingsError(
            f"{option}: {text!r} is no time: write 2h, 1d12h or 45m for so long ago, or a date and time as in "
            "2026-01-31T08:00 (local) or 2026-01-31T08:00:00Z"
        ) from None


def replayed_headers(letter: Letter) -> Headers:
    """The headers that the letter is replayed with: ours taken off but for the first id and the count.

    ``inferstream.id`` is ``topic:partition:offset`` of where the document was first read, which stays the id of
    a document that has none.  Raises ValueError for a letter without a source.
    """
    if letter.source is None:
        raise ValueError("a letter without a source is not replayed")
    kept = tuple(header for header in letter.record.headers if not header[0].startswith(HEADER_PREFIX))
    first_id = letter.first_id or str(letter.source)
    return (*kept, (ID_HEADER, first_id.encode()), (REPLAYS_HEADER, b"%d" % (letter.replays + 1)))


def replayed_partition(
    letter: Letter, partitions: int, source_partitions: int | None, elsewhere: bool
) -> int:
    """The partition of a topic with so many that the letter is replayed to.

    Its own number, so that what shares a key stays in order; ``elsewhere`` (another topic than the source) only
    if both have equally many, as the sink does.  Otherwise by key, and without one by its own number modulo.
    """
    source = letter.source
    if source is None or source.partition is None:
        raise ValueError("a letter without a source is not replayed")
    aligned = source_partitions == partitions if elsewhere else True
    if aligned and source.partition < partitions:
        return source.partition
    key = letter.record.key
    if key is not None:
        return int((murmur2(key) & 0x7FFFFFFF) % partitions)
    return source.partition % partitions
