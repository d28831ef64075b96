"""The worker threads that prepare and finish documents off the event loop.

Not a ThreadPoolExecutor: finishing must overtake preparing, because it is what gives credit back, and one
call back per chunk of documents is all the event loop should pay.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from queue import PriorityQueue
from typing import Any

from inferstream.telemetry.timeline import Stage, Timeline

FINISH, PREPARE, STOP = 0, 1, 2
STAGES: tuple[Stage, Stage] = ("finish", "prepare")


class Workers:
    """``threads`` daemon threads over one queue; FINISH work first, then PREPARE, each in order.

    The queue is not bounded here: what is in it holds credit, and credit is bounded.
    """

    def __init__(
        self,
        threads: int,
        loop: asyncio.AbstractEventLoop,
        failed: Callable[[BaseException], None],
        timeline: Timeline,
    ) -> None:
        self._loop = loop
        self._failed = failed
        self._timeline = timeline
        self._order = itertools.count()
        self._queue: PriorityQueue[
            tuple[int, int, Callable[[Any], Any] | None, Any, Callable[[Any], None] | None]
        ] = PriorityQueue()
        self.cpu_s = [0.0, 0.0]  # CPU seconds spent in FINISH and in PREPARE
        self._counting = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"worker-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, priority: int, work: Callable[[Any], Any], argument: Any, done: Callable[[Any], None]
    ) -> None:
        """Run ``work(argument)`` in a worker thread, then ``done(result)`` on the event loop.

        ``work`` handles the errors of documents itself; what it or ``done`` raises is a bug and ends the process.
        """
        self._queue.put((priority, next(self._order), work, argument, done))

    def __len__(self) -> int:
        return self._queue.qsize()

    def close(self, timeout_s: float) -> None:
        for _ in self._threads:
            self._queue.put((STOP, next(self._order), None, None, None))
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        track = threading.current_thread().name
        while True:
            priority, _, work, argument, done = self._queue.get()
            if work is None or done is None:
                return
            started, cpu = time.monotonic(), time.thread_time()
            try:
                result = work(argument)
            except Exception as error:
                self._call(self._failed, error)
                continue
            except BaseException as error:  # SystemExit would end the process with its own exit code
                self._call(self._failed, RuntimeError(f"a worker thread was told to exit: {error!r}"))
                continue
            spent_s = time.thread_time() - cpu
            with self._counting:
                self.cpu_s[priority] += spent_s
            self._timeline.span(track, STAGES[priority], started, time.monotonic())
            self._call(self._deliver, (done, result))
            del argument, result  # nothing of a chunk outlives it here

    def _deliver(self, answer: tuple[Callable[[Any], None], Any]) -> None:
        """On the event loop, which would only log what ``done`` raises: its documents would wait for ever."""
        done, result = answer
        try:
            done(result)
        except Exception as error:
            self._failed(error)

    def _call(self, callback: Callable[[Any], None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:  # the loop is closed: the process is ending
            return
