"""Logs: one line each, what stands in it, how floods end, and a reader that has gone."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from inferstream.telemetry.logs import LineHandler, RateLimit, configure, json_line, text_line

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was: it belongs to the whole test process."""
    root, ours = logging.getLogger(), logging.getLogger("inferstream")
    before = root.level, ours.level, list(root.handlers)
    yield
    for handler in list(root.handlers):
        if isinstance(handler, LineHandler):
            root.removeHandler(handler)
    root.setLevel(before[0])
    ours.setLevel(before[1])
    logging.captureWarnings(False)


def logged(format: Any = "json", level: str = "info") -> tuple[io.StringIO, logging.Logger]:
    stream = io.StringIO()
    configure(format, level, stream)
    return stream, logging.getLogger("inferstream.kafka.source")


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().removesuffix("\n").split("\n")]


def test_json_when_something_is_logged_then_every_field_is_there() -> None:
    stream, log = logged()

    log.info("a partition is %s", "ours", extra={"topic": "documents", "partition": 3, "pair": ("a", 1)})

    (line,) = lines(stream)
    assert abs(datetime.fromisoformat(line.pop("ts")).timestamp() - datetime.now().timestamp()) < 60
    assert line == {
        "level": "info",
        "logger": "inferstream.kafka.source",
        "message": "a partition is ours",
        "topic": "documents",
        "partition": 3,
        "pair": ["a", 1],
    }


def test_json_when_an_error_is_logged_then_the_traceback_is_in_its_line() -> None:
    stream, log = logged()

    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")

    (line,) = lines(stream)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    "extra",
    [
        {"level": "mine", "ts": 1},
        {"bytes": b"\xff", "set": {1}, "object": object(), "path": Path("a")},
        {"big": 2**70},
        {"surrogate": "\ud800"},
        {"nested": {1: {"a": 2**70}}},
        {"text": "two\nlines\rand \x85more"},
    ],
)
def test_any_format_when_the_fields_are_odd_then_there_is_one_line(
    format: Any, extra: dict[str, Any]
) -> None:
    stream, log = logged(format)

    log.info("odd\nmessage", extra=extra)

    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("\n")
    if format == "json":
        assert lines(stream)[0]["level"] == "info"


@pytest.mark.parametrize("format", ["json", "text"])
def test_any_format_when_a_value_cannot_be_written_then_the_caller_goes_on(format: Any) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    stream, log = logged(format)

    log.info("a message", extra={"value": Broken()})

    assert stream.getvalue().count("\n") == 1
    assert "a log record could not be written" in stream.getvalue()


@pytest.mark.parametrize("line", [json_line, text_line])
def test_any_format_when_the_arguments_do_not_fit_then_they_are_written_behind(line: Any) -> None:
    misfit = logging.makeLogRecord({"name": "a", "levelname": "INFO", "msg": "%d", "args": ("no number",)})

    assert "%d ('no number',)" in line(misfit)


def test_any_format_when_a_field_is_bytes_then_only_their_number_is_written() -> None:
    stream, log = logged()

    log.info("a record", extra={"value": b"confidential"})

    assert lines(stream)[0]["value"] == "12 bytes"


def test_text_when_something_is_logged_then_a_person_can_read_it() -> None:
    stream, log = logged("text")

    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.warning("it failed", extra={"topic": "documents", "why": "no reason"}, exc_info=True)

    line = stream.getvalue()
    assert line[13:].startswith(
        'WARNING kafka.source  it failed  topic=documents  why="no reason"  ValueError: two\\nlines ['
    )
    assert "test_telemetry_logs.py:" in line


def test_auto_when_the_stream_is_no_terminal_then_it_is_json() -> None:
    stream, log = logged("auto")

    log.info("a message")

    assert lines(stream)[0]["message"] == "a message"


def test_auto_when_the_stream_is_a_terminal_then_it_is_text() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    configure("auto", "info", stream)

    logging.getLogger("inferstream").info("a message")

    assert stream.getvalue()[13:] == "INFO    inferstream  a message\n"


@pytest.mark.parametrize(
    ("level", "ours", "libraries"),
    [
        ("debug", logging.DEBUG, logging.INFO),
        ("info", logging.INFO, logging.WARNING),
        ("warning", logging.WARNING, logging.WARNING),
        ("error", logging.ERROR, logging.ERROR),
    ],
)
def test_level_when_it_is_set_then_libraries_say_less_than_we_do(
    level: str, ours: int, libraries: int
) -> None:
    logged(level=level)

    assert logging.getLogger("inferstream.pipeline").getEffectiveLevel() == ours
    assert logging.getLogger("aiokafka.producer.producer").getEffectiveLevel() == libraries


def test_configure_when_called_again_then_a_record_is_written_once() -> None:
    first, _ = logged()
    second, log = logged()

    log.info("a message")

    assert first.getvalue() == ""
    assert len(lines(second)) == 1


def test_warnings_then_they_are_logged_in_one_line() -> None:
    stream, _ = logged()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("look\nout", UserWarning, stacklevel=1)

    (line,) = lines(stream)
    assert line["logger"] == "py.warnings"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(name: str, message: str, level: int = logging.ERROR) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": name, "msg": message, "levelno": level, "levelname": logging.getLevelName(level)}
    )


def test_rate_limit_when_a_library_floods_then_the_first_pass_and_the_rest_is_counted() -> None:
    clock = Clock()
    limit = RateLimit(others=5, window_s=10, clock=clock)
    flood = record("aiokafka.producer.sender", "Got error produce response: %s, retrying")

    admitted = [limit.admit(flood) for _ in range(1_000)]
    assert admitted == [True] * 5 + [False] * 995
    assert not list(limit.ended())
    clock.now = 10.0

    (summary,) = limit.ended()
    line = json.loads(json_line(summary))
    assert (line["logger"], line["level"]) == ("aiokafka.producer.sender", "error")
    assert (line["suppressed"], line["window_s"]) == (995, 10.0)
    assert line["template"] == "Got error produce response: %s, retrying"
    assert "suppressed=995" in text_line(summary)
    assert limit.admit(flood), "a new window begins"


def test_rate_limit_when_one_message_floods_then_others_pass() -> None:
    limit = RateLimit(others=1, clock=Clock())
    assert limit.admit(record("aiokafka.consumer.fetcher", "one"))
    assert not limit.admit(record("aiokafka.consumer.fetcher", "one"))

    assert limit.admit(record("aiokafka.consumer.fetcher", "two"))
    assert limit.admit(record("aiokafka.conn", "one"))
    assert limit.admit(record("aiokafka.consumer.fetcher", "one", logging.CRITICAL))


def test_rate_limit_when_messages_are_not_constants_then_memory_is_bounded() -> None:
    limit = RateLimit(others=5, clock=Clock())

    admitted = sum(limit.admit(record("a.library", f"message {n}")) for n in range(10_000))

    assert admitted == 1_000 + 5


def test_rate_limit_when_we_log_a_line_per_partition_then_all_pass() -> None:
    limit = RateLimit(clock=Clock())

    assert all(limit.admit(record("inferstream.kafka.source", "a partition is ours")) for _ in range(50))


def test_handler_when_it_is_closed_then_it_says_what_was_suppressed() -> None:
    stream, _ = logged()
    for _ in range(7):
        logging.getLogger("aiokafka.conn").error("no connection")

    configure("json", "info", io.StringIO())

    assert [line.get("suppressed") for line in lines(stream)] == [None] * 5 + [2]


def run(script: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT / "service",
        timeout=30,
        check=False,
        **options,
    )


def test_stderr_when_its_reader_has_gone_then_the_process_ends_well() -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()

    done = run(
        """
        import logging
        from inferstream.telemetry.logs import configure
        configure("json")
        for n in range(3):
            logging.getLogger("inferstream").info("a message")
        print("went on", flush=True)
        """,
        stdout=subprocess.PIPE,
        stderr=reader.stdin,
    )

    assert (done.returncode, done.stdout) == (0, b"went on\n")


@pytest.mark.parametrize("how", ["sys.stderr = None", "sys.stderr.close()", "os.close(2)"])
def test_stderr_when_it_is_closed_then_the_process_ends_well(how: str) -> None:
    done = run(
        f"""
        import logging, os, sys
        from inferstream.telemetry.logs import configure
        {how}
        configure("auto")
        logging.getLogger("inferstream").info("a message")
        print("went on", flush=True)
        """,
        stdout=subprocess.PIPE,
    )

    assert (done.returncode, done.stdout) == (0, b"went on\n")


def test_stderr_when_it_closes_later_then_the_process_ends_well() -> None:
    done = run(
        """
        import logging, os
        from inferstream.telemetry.logs import configure
        configure("json")
        os.close(2)
        logging.getLogger("inferstream").info("a message")
        print("went on", flush=True)
        """,
        stdout=subprocess.PIPE,
    )

    assert (done.returncode, done.stdout) == (0, b"went on\n")
