"""How a dead letter is written: a line of JSON, a row of a table, or all of it for a reader."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import orjson
from rich.table import Table
from rich.text import Text

from inferstream.tools.consume import headers_object, text_or_base64
from inferstream.tools.dead_letters import Letter


def line(letter: Letter) -> bytes:
    """What the headers say, as one line of JSON without its end."""
    return orjson.dumps(_summary(letter))


def whole(letter: Letter) -> bytes:
    """The letter with key, headers and value, as one line of JSON without its end.

    Key and value are text, or ``{"base64": …}`` where their bytes are no UTF-8.  A header that stands there several
    times has the list of its values.
    """
    record = letter.record
    return orjson.dumps(
        {
            **_summary(letter),
            "key": text_or_base64(record.key),
            "headers": headers_object(record.headers),
            "value": text_or_base64(record.value),
        }
    )


def table(letters: Iterable[Letter]) -> Table:
    """A row per letter, for a terminal."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("offset", "time", "reason", "stage"):
        rows.add_column(name, no_wrap=True)
    for name in ("attempts", "replays"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("source", no_wrap=True)
    rows.add_column("message", ratio=1)
    for letter in letters:
        rows.add_row(
            f"{letter.record.partition}:{letter.record.offset}",
            _local(letter.record.timestamp),
            _shown(letter.reason),
            _shown(letter.stage),
            _shown(letter.attempts),
            str(letter.replays),
            _shown(letter.source),
            _shown(letter.message),
        )
    return rows


def details(letter: Letter) -> Iterable[Text]:
    """All of a letter, a line each, for a terminal; the value last."""
    record = letter.record
    source = str(letter.source) if letter.source is not None else None
    if source is not None and letter.source_timestamp_ms is not None:
        source += f", written {_local(letter.source_timestamp_ms)}"
    facts = {
        "letter": letter.place,
        "time": _local(record.timestamp),
        "reason": letter.reason,
        "message": letter.message,
        "stage": letter.stage,
        "attempts": letter.attempts,
        "replays": letter.replays,
        "source": source,
        "group": letter.group_id,
        "key": _printed(record.key),
    }
    for name, value in facts.items():
        yield Text.assemble((f"{name:<9}", "bold"), _shown(value))
    yield Text("headers", "bold")
    for name, content in record.headers:
        yield Text.assemble("  ", _shown(name), ": ", _shown(_printed(content)))
    size = "null" if record.value is None else f"{len(record.value):,} bytes"
    yield Text(f"value, {size}", "bold")
    if record.value is not None:
        yield _shown(_printed(record.value), "\n\t")


def _summary(letter: Letter) -> dict[str, Any]:
    record, source = letter.record, letter.source
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp_ms": record.timestamp,
        "time": _utc(record.timestamp),
        "reason": letter.reason,
        "stage": letter.stage,
        "message": letter.message,
        "attempts": letter.attempts,
        "replays": letter.replays,
        "source": None
        if source is None
        else {
            "topic": source.topic,
            "partition": source.partition,
            "offset": source.offset,
            "timestamp_ms": letter.source_timestamp_ms,
        },
    }


def _shown(value: object, kept: str = "") -> Text:
    """A value for a terminal: control characters, which it would obey, are shown as what they are."""
    if value is None:
        return Text("-", "dim")
    return Text(
        "".join(
            c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in str(value)
        )
    )


def _printed(value: bytes | None) -> str | None:
    if value is None:
        return None
    found = text_or_base64(value)
    return found if isinstance(found, str) else f"base64 {(found or {})['base64']}"


def _utc(timestamp_ms: int) -> str | None:
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


def _local(timestamp_ms: int) -> str:
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000).isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return str(timestamp_ms)
