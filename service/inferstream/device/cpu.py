"""The CPU as a device: several compute threads side by side, each running a batch of its own.

One batch on k threads would wait at the end of every operation for the slowest of them, and on a machine
that does anything else one always is; k batches on a thread each do not wait for one another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from inferstream.device import Flight, Runner, Span

STAGED = 1
"""Batches staged beyond those that compute.

A compute thread that ends a batch takes the staged one at once, and the next is formed while it computes.
Two threads ending within one turn of the event loop share it, so one of them waits for about a millisecond
of a batch of a hundred; a second staged batch would cost every document a batch's time in latency.
"""


class CpuDevice:
    """``threads`` compute threads over one runner, behind :class:`inferstream.device.Device`.

    ``Flight.busy_s`` is CPU time of the compute thread: while the system runs something else on its core the
    model does not compute, whatever a clock on the wall says.  A runner that computes elsewhere brings the ``clock`` of
    that, in seconds, read in the compute thread; ``max_tokens`` as a device's.
    """

    def __init__(
        self,
        runner: Runner,
        threads: int,
        name: str = "cpu",
        *,
        clock: Callable[[], float] = time.thread_time,
        max_tokens: int | None = None,
    ) -> None:
        self.name = name
        self.lanes = threads
        self.slots = threads + STAGED
        self.padded = runner.padded
        self.max_tokens = max_tokens
        self._runner = runner
        self._clock = clock
        self._work: SimpleQueue[tuple[int, Sequence[Any]] | None] = SimpleQueue()
        self._flights: SimpleQueue[Flight | None] = SimpleQueue()
        self._closed = threading.Lock()
        self._threads = [
            threading.Thread(target=self._compute, name=f"{name}-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def launch(self, slot: int, items: Sequence[Any]) -> None:
        self._work.put((slot, items))

    def wait(self) -> Flight | None:
        flight = self._flights.get()
        if flight is None:
            self._flights.put(None)  # whoever waits again is told again
        return flight

    def close(self) -> None:
        """Batches launched before this still end, and :meth:`wait` gives them before None."""
        if not self._closed.acquire(blocking=False):
            return
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._flights.put(None)

    def _compute(self) -> None:
        track = threading.current_thread().name
        broken: BaseException | None = None
        ended: float | None = None
        try:
            self._runner.enter_thread()
        except BaseException as error:  # a thread that died here would keep its batches for ever
            broken = error
        while (work := self._work.get()) is not None:
            slot, items = work
            started, before = time.monotonic(), self._clock()
            rows, failure = None, broken
            if failure is None:
                try:
                    rows = self._runner.run(items)
                except BaseException as error:
                    failure = error
            busy_s = self._clock() - before
            idle_s = 0.0 if ended is None else started - ended
            ended = time.monotonic()
            stalled_s = max(0.0, ended - started - busy_s)
            span = Span(track, "compute", started, ended)
            self._flights.put(Flight(slot, rows, failure, busy_s, idle_s, stalled_s, (span,)))
            del work, items, rows, failure  # nothing of a batch outlives it here
