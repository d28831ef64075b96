"""The last seconds of a worker: what grew in them, and which stage held the others back.

Pure: time comes in as an argument.  What a dashboard shows is not made at the scrape, so that two that scrape do not
see each other's halves.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Final

RECENT_S: Final = 15.0
"""Longer than any batch but those of the slowest machines, and no longer than a usual scrape interval."""

INPUT, POLL = "input", "poll"
LIMITS: Final = (INPUT, POLL, "prepare", "device", "finish", "publish", "commit")
"""What can hold a worker back, in the order of the flow."""


class Growth:
    """How much some totals grew in the last ``RECENT_S`` (or since the first reading, if that is later)."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, tuple[float, ...]]] = deque()

    def read(self, now: float, *totals: float) -> tuple[float, ...]:
        """Take in the totals of ``now``; gives the seconds between the two readings, then the growth of each."""
        readings = self._readings
        readings.append((now, totals))
        while len(readings) > 2 and readings[1][0] <= now - RECENT_S:
            readings.popleft()
        since, before = readings[0]
        return (now - since, *(total - earlier for total, earlier in zip(totals, before, strict=True)))


class Limits:
    """Which stage held the others back, judged at every beat; :meth:`shares` sums that up."""

    def __init__(self) -> None:
        self._verdicts: deque[tuple[float, str]] = deque()

    def judge(self, now: float, behind: Iterable[bool], waiting: Mapping[str, int]) -> str:
        """``behind``: of each lane with records after the reading position, whether it has credit for more.

        ``waiting``: how many documents wait for each stage or are in it.  Queues fill up before what is slow and run
        empty behind it, so while credit is spent, it is the stage with the most.
        """
        lanes = list(behind)
        if not lanes:
            verdict = INPUT  # all that there is was read
        elif all(lanes) or not any(waiting.values()):
            verdict = POLL  # there is more, and room for it
        else:
            verdict = max(waiting, key=waiting.__getitem__)
        self._verdicts.append((now, verdict))
        while self._verdicts[0][0] <= now - RECENT_S:
            self._verdicts.popleft()
        return verdict

    def shares(self) -> dict[str, float]:
        """Of the last ``RECENT_S``, the share of each of ``LIMITS``; they add up to 1 from the first beat on."""
        counts = Counter(verdict for _, verdict in self._verdicts)
        return {stage: counts[stage] / max(1, len(self._verdicts)) for stage in LIMITS}
