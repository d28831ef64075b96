"""Logs on stderr: one line per record, JSON or for people, and no flood.

    log = logging.getLogger(__name__)
    log.info("the partition is ours", extra={"topic": topic, "partition": 3, "offset": 41})

The message is a constant, so that it can be searched for and counted; what varies goes into ``extra``.
Nothing here can know what a document's text is: nobody logs one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson

OURS = "inferstream"
WINDOW_S = 10.0
OURS_PER_WINDOW = 50  # one line per partition of an assignment is no flood
OTHERS_PER_WINDOW = 5  # aiokafka logs one line per fetch while a leader moves, thousands a second
MAX_TEMPLATES = 1_000  # messages that are not constants must not fill the memory
MAX_FIELD_CHARACTERS = 2_000

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_RESERVED = frozenset({"ts", "level", "logger", "message", "exception"})


def configure(
    format: Literal["text", "json", "auto"] = "auto", level: str = "info", stream: TextIO | None = None
) -> None:
    """Send every log to ``stream`` (stderr), at ``level`` for ours; calling it again replaces the first.

    ``auto`` is text on a terminal, else JSON.  Libraries log from WARNING on, or INFO if ``level`` is debug:
    at DEBUG aiokafka writes keys and values, which are documents.
    """
    stream = stream or sys.stderr
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, LineHandler):
            root.removeHandler(handler)
            handler.close()
    if stream is not None:  # None: the process was started with stderr closed
        as_text = format == "text" or (format == "auto" and _is_terminal(stream))
        handler = LineHandler(stream, text_line if as_text else json_line)
        root.addHandler(handler)
    ours = getattr(logging, level.upper())
    root.setLevel(logging.INFO if ours <= logging.DEBUG else max(ours, logging.WARNING))
    logging.getLogger(OURS).setLevel(ours)
    logging.captureWarnings(True)  # else they go to stderr in lines of their own


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def json_line(record: logging.LogRecord) -> str:
    """One JSON object: ts, level, logger, message, the extra fields, and the traceback if there is one."""
    line: dict[str, Any] = {
        "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": _message(record),
    }
    for name, value in fields(record).items():
        line[f"{name}_" if name in _RESERVED else name] = _short(value)
    if record.exc_info and record.exc_info[1] is not None:
        line["exception"] = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    try:
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # a surrogate, a number beyond 64 bits, a cycle: as text, then
        return orjson.dumps({name: _plain(value) for name, value in line.items()}).decode()


def text_line(record: logging.LogRecord) -> str:
    """``12:34:56.789 INFO    kafka.source  message  key=value``; an error ends with where it was raised."""
    clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
    name = record.name.removeprefix(f"{OURS}.")
    parts = [f"{clock} {record.levelname:<7} {name}", _message(record)]
    parts += [f"{key}={_quoted(_plain(_short(value)))}" for key, value in fields(record).items()]
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        frames = [
            f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
        ]
        parts.append(f"{type(error).__name__}: {error} [{' > '.join(frames)}]")
    return "  ".join(parts).replace("\r", "\\r").replace("\n", "\\n")


@dataclass(slots=True)
class _Seen:
    since: float
    level: int
    passed: int = 0
    suppressed: int = 0


class RateLimit:
    """Lets through the first records per logger and message template in each window, and counts the others.

    CRITICAL always passes.  ``clock`` is in seconds.
    """

    def __init__(
        self,
        ours: int = OURS_PER_WINDOW,
        others: int = OTHERS_PER_WINDOW,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ours = ours
        self._others = others
        self._window_s = window_s
        self._clock = clock
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._next_sweep = clock() + window_s

    def admit(self, record: logging.LogRecord) -> bool:
        """Whether to write the record."""
        if record.levelno >= logging.CRITICAL:
            return True
        key = record.name, str(record.msg)[:200]
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= MAX_TEMPLATES:
                key = record.name, "…"
            seen = self._seen.setdefault(key, _Seen(self._clock(), record.levelno))
        limit = self._ours if record.name.partition(".")[0] == OURS else self._others
        if seen.passed < limit:
            seen.passed += 1
            return True
        seen.suppressed += 1
        return False

    def ended(self, *, at_once: bool = False) -> Iterable[logging.LogRecord]:
        """A record for every window that ended (or, ``at_once``, that is open) and had some suppressed."""
        now = self._clock()
        if not at_once and now < self._next_sweep:
            return
        self._next_sweep = now + self._window_s / 4
        for key, seen in list(self._seen.items()):
            if not at_once and now - seen.since < self._window_s:
                continue
            del self._seen[key]
            if seen.suppressed:
                name, template = key
                yield logging.makeLogRecord(
                    {
                        "name": name,
                        "levelno": seen.level,
                        "levelname": logging.getLevelName(seen.level),
                        "msg": "more of the same was not logged",
                        "suppressed": seen.suppressed,
                        "window_s": round(now - seen.since, 1),
                        "template": template,
                    }
                )


class LineHandler(logging.Handler):
    """Writes lines to a stream; one that is closed, or a reader that has gone, ends nothing but the logs."""

    def __init__(
        self, stream: TextIO, line: Callable[[logging.LogRecord], str], limit: RateLimit | None = None
    ) -> None:
        super().__init__()
        self._stream = stream
        self._line = line
        self._limit = limit or RateLimit()

    def emit(self, record: logging.LogRecord) -> None:
        lines = [self._safe_line(ended) for ended in self._limit.ended()]
        if self._limit.admit(record):
            lines.append(self._safe_line(record))
        self._write(lines)

    def close(self) -> None:
        """Say what was suppressed and is not reported yet; the stream stays open."""
        with self.lock or threading.Lock():
            self._write([self._safe_line(ended) for ended in self._limit.ended(at_once=True)])
        super().close()

    def _safe_line(self, record: logging.LogRecord) -> str:
        try:
            return self._line(record)
        except Exception as error:  # a value that cannot be written must not end who logs it
            return self._line(
                logging.makeLogRecord(
                    {
                        "name": record.name,
                        "levelname": record.levelname,
                        "msg": "a log record could not be written",
                        "template": str(record.msg)[:200],
                        "error": type(error).__name__,
                    }
                )
            )

    def _write(self, lines: list[str]) -> None:
        if not lines:
            return
        try:
            text = "".join(f"{line}\n" for line in lines)
            encoding = (
                self._stream.encoding or "utf-8"
            )  # of a terminal that cannot show every letter, perhaps
            self._stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """What was not written stays in the stream's buffer and would fail the exit: let it go nowhere."""
        try:
            if self._stream.fileno() == 2:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                if nowhere != 2:  # it is, if 2 was closed
                    os.dup2(nowhere, 2)
                    os.close(nowhere)
        except (OSError, ValueError):
            return  # it is closed, or no file: nothing is left in a buffer


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # the arguments do not fit the template
        return f"{record.msg} {record.args}"


def _short(value: Any) -> Any:
    """Values stay what they are; long text is cut."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str) and len(value) > MAX_FIELD_CHARACTERS:
        return value[:MAX_FIELD_CHARACTERS] + "…"
    return value


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text.encode(errors="backslashreplace").decode()


def _quoted(text: str) -> str:
    """In quotes where a reader would not see the end of the value."""
    return (
        text if text and not any(letter.isspace() or letter in '="' for letter in text) else json.dumps(text)
    )


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False
