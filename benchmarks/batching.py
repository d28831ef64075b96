"""Which documents go into the next batch: the rules, simulated.

    python -m benchmarks.batching            # the table of docs/batching.md, in a few seconds
    python -m benchmarks.batching --short    # a tenth of the documents

A closed loop around the worker's own ledger, bounds and window (`lanes.py`, `credit.py`, `batching.py`): a
backlog in every lane, documents of log-normal length, polled in chunks as a Kafka client hands them over.
The tokens that wait for the device are bounded to a number of budgets, the documents held to 8,192.  The
device is a cost per batch: its tokens, padding included, plus a fixed part.  No clock is read, so the numbers
are the same on every machine.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from inferstream.batching import Item, Window
from inferstream.credit import Credit
from inferstream.documents import Kind, Outgoing
from inferstream.lanes import Lane

LANES = 8
BUDGET = 8192  # tokens per batch
MAX_DOCUMENTS = 8192  # held at most, those blocked behind a lane's head included
MAX_LANE_SHARE = 0.5
MAX_LENGTH = 512
MEDIAN_LENGTH, SIGMA = 60, 1.0  # of the log-normal lengths: 96 on average
BATCH_COST = 512  # what a batch costs whatever its size, in tokens
DOCUMENT_BYTES = 1024
CHUNK = 200  # records that one partition hands over before the next one's turn
BATCHES = 2000
SEED = 3

_DONE = Outgoing(Kind.RESULT, None, b"", ())


class FullestClass(Window):
    """The length class with the most tokens first, oldest piece first, then its neighbours."""

    __slots__ = ()

    def _anchor(self) -> int | None:
        filled = [
            (sum(i.length for i in bucket), number) for number, bucket in enumerate(self._buckets) if bucket
        ]
        return max(filled)[1] if filled else None


class ArrivalOrder(Window):
    """Strictly in arrival order."""

    __slots__ = ()

    def form(self, *, arrival: bool = True) -> list[Item]:
        return super().form(arrival=arrival)


def _wide_class(length: int) -> int:
    """Two classes per octave instead of four."""
    shift = max(length.bit_length() - 2, 0)
    return (shift << 1) + (length >> shift)


class WideClasses(Window):
    """Anchored on the oldest, with length classes twice as wide."""

    __slots__ = ()

    class_of = staticmethod(_wide_class)


RULES: dict[str, tuple[type[Window], bool]] = {
    "arrival order": (ArrivalOrder, True),
    "fullest length class": (FullestClass, True),
    "**anchored on the oldest**": (Window, True),
    "anchored, classes twice as wide": (WideClasses, True),
    "padding-free engine, arrival order": (Window, False),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rule did.  ``held`` and ``blocked`` are means over batches, ``longest_wait`` is in batches."""

    tokens: int
    padded: int
    cost: int
    held: float
    blocked: float
    longest_wait: int

    @property
    def efficiency(self) -> float:
        """The share of the device's tokens that is not padding."""
        return self.tokens / self.padded

    @property
    def speed(self) -> float:
        """Real tokens per cost."""
        return self.tokens / self.cost


class Backlog:
    """Records without end, handed over as aiokafka does: one partition's chunk, then the next one's."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._offsets = [0] * LANES
        self._left = [CHUNK] * LANES
        self._next = 0

    def poll(self, eligible: set[int], limit: int) -> Iterator[tuple[int, int, int]]:
        """(partition, offset, length in tokens) of ``limit`` records of the eligible partitions."""
        while limit and eligible:
            number = self._next
            if number in eligible and self._left[number]:
                yield number, self._offsets[number], self._length()
                self._offsets[number] += 1
                self._left[number] -= 1
                limit -= 1
            else:
                self._left[number] = CHUNK
                self._next = (number + 1) % LANES

    def _length(self) -> int:
        return max(3, min(MAX_LENGTH, round(self._random.lognormvariate(0.0, SIGMA) * MEDIAN_LENGTH)))


def simulate(rule: type[Window], padded: bool, budgets: int, batches: int, seed: int = SEED) -> Outcome:
    """Form ``batches`` batches by one rule from a window of ``budgets`` token budgets."""
    window = rule(BUDGET, padded=padded)
    credit: Credit[Lane] = Credit(
        MAX_DOCUMENTS, MAX_DOCUMENTS * DOCUMENT_BYTES, budgets * BUDGET, MAX_LANE_SHARE
    )
    backlog = Backlog(seed)
    lanes = [Lane("documents", number, epoch=1, start=0) for number in range(LANES)]
    for lane in lanes:
        credit.open_lane(lane)
    tokens = on_device = cost = held = blocked = longest_wait = 0
    for now in range(batches):
        while True:
            eligible, limit = credit.poll_limit(lanes)
            if not eligible:
                break
            for number, offset, length in backlog.poll(
                {lane.partition for lane in eligible}, min(limit, CHUNK)
            ):
                lane = lanes[number]
                record: Any = SimpleNamespace(offset=offset)
                credit.take(lane, DOCUMENT_BYTES)
                slot = lane.admit(record, DOCUMENT_BYTES)
                credit.reweigh(lane, DOCUMENT_BYTES, DOCUMENT_BYTES, length)
                window.add(Item(slot, 0, length, float(now), None))
        batch = window.form()
        real = sum(item.length for item in batch)
        size = len(batch) * max(item.length for item in batch) if padded else real
        tokens += real
        on_device += size
        cost += size + BATCH_COST
        longest_wait = max(longest_wait, now - int(min(item.ready_at for item in batch)))
        for item in batch:
            slot = item.owner
            credit.reweigh(slot.lane, DOCUMENT_BYTES, DOCUMENT_BYTES, -item.length)
            slot.lane.complete(slot, _DONE)
        for lane in lanes:
            for slot in lane.release():
                lane.acknowledge(slot)
                credit.give(lane, DOCUMENT_BYTES)
        held += credit.documents
        blocked += sum(lane.blocked for lane in lanes)
    return Outcome(tokens, on_device, cost, held / batches, blocked / batches, longest_wait)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a tenth of the batches")
    batches = BATCHES // 10 if parser.parse_args(arguments).short else BATCHES
    print("| window | rule | speed | padding efficiency | documents held | of these blocked | longest wait |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for budgets in (4, 16, 64):
        base = None
        for name, (rule, padded) in RULES.items():
            o = simulate(rule, padded, budgets, batches)
            base = base or o.speed
            print(
                f"| {budgets} | {name} | {o.speed / base:.2f} | {o.efficiency:.2f} "
                f"| {o.held:.0f} | {o.blocked / o.held:.0%} | {o.longest_wait} |"
            )


if __name__ == "__main__":
    main()
