"""What a piece of work leaves behind in this process."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


class Growth:
    """Between ``with`` and its end: ``python_bytes`` allocated there and still held, by Python and NumPy, by
    tracemalloc (objects that the collector does not track, as arrays and floats, included); ``resident_bytes`` more
    of the process in memory, torch's included, and what tracemalloc keeps of its own.
    """

    python_bytes = 0
    resident_bytes = 0

    def __enter__(self) -> Growth:
        gc.collect()
        self._resident = _resident()
        tracemalloc.start(1)
        self._traced, _ = tracemalloc.get_traced_memory()
        return self

    def __exit__(self, *_: object) -> None:
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.python_bytes = traced - self._traced
        self.resident_bytes = _resident() - self._resident


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
