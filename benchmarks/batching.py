"""Which documents go into the next batch: three rules on a padded engine, simulated.

    python -m benchmarks.batching            # the table of docs/batching.md, about 10 s
    python -m benchmarks.batching --short    # a tenth of the documents

A closed loop around the worker's own ledger, bounds and window (`lanes.py`, `credit.py`, `batching.py`): a
backlog in every lane, documents with log-normal lengths, polls in chunks as a Kafka client hands them over,
tokenised tokens bounded to a number of budgets.  The device is a cost per batch: its padded tokens plus a fixed
part.  Nothing is measured in wall time, so the numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from inferstream.batching import Item, Window, length_class
from inferstream.credit import Credit
from inferstream.documents import Kind, Outgoing
from inferstream.lanes import Lane, Slot

LANES = 8
BUDGET = 8192  # padded tokens per batch
MAX_LENGTH = 512
MEDIAN_LENGTH, SIGMA = 60.0, 1.0  # of the log-normal lengths: mean 99, 2 % cut at MAX_LENGTH
BATCH_COST = 512  # the part of a batch's cost that does not depend on its size, in tokens
DOCUMENT_BYTES = 1024
CHUNK = 200  # records that one partition hands over at a time
DOCUMENTS = 200_000
SEED = 3

_DONE = Outgoing(Kind.RESULT, None, b"", ())


class Fullest(Window):
    """The rule compared with: the length class with the most tokens, oldest first, then its neighbours."""

    __slots__ = ()

    def _anchor(self) -> int | None:
        filled = [(sum(i.length for i in bucket), number) for number, bucket in enumerate(self._buckets) if bucket]
        return max(filled)[1] if filled else None


def arrival(window: Window) -> list[Item]:
    return window.form(arrival=True)


def by_rule(window: Window) -> list[Item]:
    return window.form()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rule did.  Shares are means over all batches; ``longest_wait`` counts batches."""

    documents: int
    batches: int
    cost: int
    padding_efficiency: float
    blocked: float
    longest_wait: int

    @property
    def speed(self) -> float:
        """Documents per unit of device cost."""
        return self.documents / self.cost


class Partitions:
    """A backlog in every lane.  As aiokafka does, one partition's chunk is handed over before the next one's."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._offsets = [0] * LANES
        self._turn: deque[int] = deque(range(LANES))
        self._left = [CHUNK] * LANES

    def poll(self, eligible: set[int], limit: int) -> Iterator[tuple[int, int]]:
        """(lane number, offset) of at most ``limit`` records."""
        for _ in range(LANES):
            number = self._turn[0]
            if number in eligible:
                for _ in range(min(limit, self._left[number])):
                    yield number, self._offsets[number]
                    self._offsets[number] += 1
                    self._left[number] -= 1
                    limit -= 1
            if self._left[number] and number in eligible:
                return
            self._left[number] = CHUNK
            self._turn.rotate(-1)

    def length(self) -> int:
        """The length in tokens of the next document."""
        return max(3, min(MAX_LENGTH, int(self._random.lognormvariate(0.0, SIGMA) * MEDIAN_LENGTH)))


def simulate(
    form: Callable[[Window], list[Item]], window: Window, documents: int, budgets: int, seed: int = SEED
) -> Outcome:
    """Run ``documents`` through one rule; the buffer holds documents for ``budgets`` batches on average."""
    mean = 99
    capacity = budgets * BUDGET // mean
    credit: Credit[Lane] = Credit(capacity, capacity * DOCUMENT_BYTES, capacity * MAX_LENGTH, 0.5)
    partitions = Partitions(seed)
    lanes = [Lane("documents", number, epoch=1, start=0) for number in range(LANES)]
    for lane in lanes:
        credit.open_lane(lane)
    done = batches = cost = tokens = padded = longest_wait = 0
    blocked = 0.0
    while done < documents:
        while True:
            eligible, limit = credit.poll_limit(lanes)
            polled = list(partitions.poll({lane.partition for lane in eligible}, limit)) if limit else []
            for number, offset in polled:
                lane = lanes[number]
                credit.take(lane, DOCUMENT_BYTES)
                slot = lane.admit(SimpleNamespace(offset=offset), DOCUMENT_BYTES)
                window.add(Item(slot, 0, partitions.length(), float(batches), None))
            if not polled:
                break
        batch = form(window)
        batches += 1
        padded += len(batch) * max(item.length for item in batch)
        tokens += sum(item.length for item in batch)
        cost += len(batch) * max(item.length for item in batch) + BATCH_COST
        longest_wait = max(longest_wait, batches - 1 - int(min(item.ready_at for item in batch)))
        for item in batch:
            slot = item.owner
            slot.lane.complete(slot, _DONE)
        for lane in lanes:
            for slot in lane.release():
                lane.acknowledge(slot)
                credit.give(lane, DOCUMENT_BYTES)
                done += 1
        blocked += sum(lane.blocked for lane in lanes) / capacity
    return Outcome(done, batches, cost, tokens / padded, blocked / batches, longest_wait)


def compare(documents: int, budgets: int) -> dict[str, Outcome]:
    """All three rules on the same documents."""
    return {
        "arrival order": simulate(arrival, Window(BUDGET), documents, budgets),
        "fullest class": simulate(by_rule, Fullest(BUDGET), documents, budgets),
        "anchored on the oldest (ours)": simulate(by_rule, Window(BUDGET), documents, budgets),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tenth of the documents")
    documents = DOCUMENTS // 10 if parser.parse_args(arguments).short else DOCUMENTS
    print("| window (budgets) | rule | relative speed | padding efficiency | completed but blocked | longest wait (batches) |")
    print("|---|---|---|---|---|---|")
    for budgets in (4, 16, 64):
        outcomes = compare(documents, budgets)
        base = outcomes["arrival order"].speed
        for name, o in outcomes.items():
            print(
                f"| {budgets} | {name} | {o.speed / base:.2f} | {o.padding_efficiency:.2f} "
                f"| {o.blocked:.0%} | {o.longest_wait} |"
            )


if __name__ == "__main__":
    main()
