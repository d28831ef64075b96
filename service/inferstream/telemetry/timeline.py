"""The timeline: what every stage did when, as a metric and, on request, as a trace to look at.

Each stage reports the spans of its work here, a call per chunk of records or per batch and never per document.
``run --trace FILE`` and ``bench --trace FILE`` write them in Chrome's trace event format, which Perfetto
(ui.perfetto.dev) and chrome://tracing open: a row per thread or stream, so that overlap is seen as overlap.

Format: "Trace Event Format", JSON array format, whose closing bracket may be missing: the file of a killed
worker opens as well.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import orjson

from inferstream.errors import SettingsError

log = logging.getLogger(__name__)

Stage = Literal["prepare", "wait", "launch", "h2d", "compute", "d2h", "finish", "publish", "commit"]

MAX_SPANS = 1_000_000
"""What a trace holds at most: about 150 MB, some minutes of a fast worker or hours of a slow one."""
FLUSH_EVENTS, FLUSH_S = 256, 1.0


class Timeline:
    """Where the stages report.  ``observe`` is told each span's stage and seconds; ``trace`` gets it whole, from
    when it is set."""

    def __init__(
        self, observe: Callable[[str, float], None] | None = None, trace: TraceFile | None = None
    ) -> None:
        self._observe = observe
        self.trace = trace

    def span(self, track: str, stage: Stage, start: float, end: float, **facts: int) -> None:
        """A piece of work on ``track`` (a thread, a stream) from ``start`` to ``end``, in monotonic seconds.

        Spans of a track do not overlap, but for those of ``wait``.  ``facts`` are shown with it.  May be called
        from any thread.
        """
        if self._observe is not None:
            self._observe(stage, end - start)
        if self.trace is not None:
            self.trace.add(track, stage, start, end, facts)


class TraceFile:
    """A trace on its way to a file; :meth:`close` completes it.  Raises SettingsError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: FileIO | None = path.open("wb", buffering=0)
        except OSError as error:
            raise SettingsError(f"--trace: {path} cannot be written: {error.strerror}") from error
        self._pending = [b"["]  # written in one piece, so that the file ends with a whole event at any time
        self._tracks: dict[str, int] = {}
        self._spans = 0
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    def add(self, track: str, stage: Stage, start: float, end: float, facts: dict[str, int]) -> None:
        """Append a span; past MAX_SPANS, or once the disk is full, the rest is left out."""
        with self._lock:
            if self._file is None:
                return
            number = self._tracks.get(track)
            if number is None:
                number = self._tracks[track] = len(self._tracks) + 1
                self._event(ph="M", name="thread_name", pid=1, tid=number, args={"name": track})
            self._spans += 1
            at = {"name": stage, "cat": stage, "pid": 1, "tid": number, "ts": start * 1e6}
            if stage == "wait":  # an async event, because several batches wait at a time
                self._event(**at, ph="b", id=self._spans, args=facts)
                self._event(**at | {"ts": end * 1e6}, ph="e", id=self._spans)
            else:
                self._event(**at, ph="X", dur=(end - start) * 1e6, args=facts)
            if self._spans >= MAX_SPANS:
                log.warning("the trace is full and was closed", extra={"spans": self._spans})
                self._close()
            elif len(self._pending) >= FLUSH_EVENTS or end - self._flushed >= FLUSH_S:
                self._flushed = end
                self._flush()

    def close(self) -> None:
        with self._lock:
            self._close()

    def _event(self, **event: Any) -> None:
        separator = b",\n" if self._spans or len(self._pending) > 1 else b"\n"
        self._pending.append(separator + orjson.dumps(event))

    def _flush(self) -> None:
        assert self._file is not None
        try:
            self._file.write(b"".join(self._pending))
        except OSError as error:
            log.warning("the trace cannot be written any more", extra={"error": repr(error)})
            self._file.close()
            self._file = None
        self._pending.clear()

    def _close(self) -> None:
        if self._file is None:
            return
        self._pending.append(b"\n]\n")
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None
