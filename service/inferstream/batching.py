"""Batches: the window of prepared pieces, and the rule that picks the next batch from it.

Under backlog every piece has waited longer than any linger, so a rule that closes batches by time decides
nothing.  What decides here is the moment a staging slot is free: only then is a batch formed (late binding),
from everything that is ready by then.

*Padded engines* (every row as long as the longest): the batch is anchored on the oldest piece, filled from
its length class, oldest first, and then from the classes next to it until the token budget is reached.
Lengths within a class differ by at most a quarter, so little is padding; and because the oldest piece always
goes, nobody waits longer than the pieces that were there before, and lane heads do not keep what is completed
behind them from being sent.  *Padding-free engines* take arrival order: there is nothing to gain by choosing.

Pure and synchronous: time comes in as an argument.  ``benchmarks/batching.py`` measures the rule against
arrival order and against the fullest length class; docs/batching.md shows the table.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# Far above what pays off on any device (a batch of the shortest texts fills it), so that staging arrays
# sized by it stay small.
DEFAULT_MAX_ITEMS: Final = 4096

SMALLEST_SHARE: Final = 8
"""What waits is shared among the device's lanes in parts of at least a budget divided by this.

256 tokens of a CPU's 2,048: MiniLM takes about 50 ms for them, of which 2 or 3 ms are the forward's own.
"""


@dataclass(slots=True, eq=False)
class Item:
    """One piece that can go into a batch: a document, or chunk ``index`` of a long one.

    ``length`` is in tokens; ``ready_at``, when it was prepared, and ``admitted_at``, when its record was read (None:
    nobody knows), in seconds on the caller's clock.  ``order`` is the window's.
    """

    owner: Any
    index: int
    length: int
    ready_at: float
    payload: Any
    admitted_at: float | None = None
    order: int = field(default=0, init=False, repr=False)


def length_class(length: int) -> int:
    """The number of the length class of ``length`` tokens: four per octave, each 14 to 25 % wide.

    Grows with the length, without holes from 4 tokens on; lengths up to 7 have a class each.
    """
    shift = max(length.bit_length() - 3, 0)
    return (shift << 2) + (length >> shift)


class Window:
    """Prepared pieces waiting for the device, and the policy that forms batches of them.

    ``max_tokens`` is the token budget of a batch: count x longest length if ``padded``, else the sum of the
    lengths.  ``limit`` may give a smaller one for a batch whose longest piece has so many tokens, as long as the
    device is short of memory.  A piece longer than the budget goes alone.  ``max_items`` bounds the count of
    a batch.  While less than a budget for each of the device's ``lanes`` waits, a batch takes one lane's share of
    it, so that none computes alone what several could.  What bounds the window itself is the credit of what is in
    it.  Forming costs a step per piece taken and per class, however many wait.
    """

    __slots__ = (
        "_buckets",
        "_count",
        "_order",
        "_share",
        "lanes",
        "limit",
        "max_items",
        "max_tokens",
        "padded",
        "tokens",
    )

    class_of = staticmethod(length_class)

    def __init__(
        self, max_tokens: int, *, padded: bool = True, max_items: int = DEFAULT_MAX_ITEMS, lanes: int = 1
    ) -> None:
        if max_tokens < 1 or max_items < 1 or lanes < 1:
            raise ValueError("max_tokens, max_items and lanes must be at least 1")
        self.max_tokens = max_tokens
        self.max_items = max_items
        self.lanes = lanes
        self._share = max_tokens  # of the batch that is being formed
        self.limit: Callable[[int], int] | None = None
        self.padded = padded
        self.tokens = 0
        """The sum of the lengths waiting."""
        self._count = 0
        self._order = 0
        # One deque per length class, each in arrival order; a padding-free window needs only one.
        self._buckets: list[deque[Item]] = [deque()]

    def add(self, *items: Item) -> None:
        """Let pieces wait for their batch; they are the youngest from now on, in the order given."""
        order, buckets, class_of, padded = self._order, self._buckets, self.class_of, self.padded
        first, tokens = order, 0
        for item in items:
            item.order = order
            order += 1
            length = item.length
            tokens += length
            number = class_of(length) if padded else 0
            while number >= len(buckets):
                buckets.append(deque())
            buckets[number].append(item)
        self._order = order
        self._count += order - first
        self.tokens += tokens

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """The waiting pieces, in no particular order."""
        for bucket in self._buckets:
            yield from bucket

    @property
    def oldest(self) -> Item | None:
        """The piece that the next batch is anchored on."""
        number = self._anchor()
        return self._buckets[number][0] if number is not None else None

    @property
    def full(self) -> bool:
        """Whether the pieces fill a budget with tokens (not with padding) or with their number."""
        return self.tokens >= self.max_tokens or self._count >= self.max_items

    def wait_s(self, now: float, linger_s: float) -> float:
        """How long to linger before forming a batch when a staging slot is free, in seconds.

        0.0 once the window is full or its oldest piece has waited ``linger_s``; infinite while it is empty.
        """
        if self.full:
            return 0.0
        oldest = self.oldest
        return math.inf if oldest is None else max(0.0, oldest.ready_at + linger_s - now)

    def form(self, *, arrival: bool = False) -> list[Item]:
        """Take the next batch out of the window; empty if the window is.

        ``arrival`` takes pieces strictly in arrival order, as closing does: there the oldest prefix of every
        lane counts, not the device's efficiency.
        """
        anchor = self._anchor()
        if anchor is None:
            return []
        self._share = self._lane_share()
        batch = self._in_order() if arrival or not self.padded else self._anchored(anchor)
        self._count -= len(batch)
        self.tokens -= sum(item.length for item in batch)
        return batch

    def discard(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out the pieces for which ``unwanted`` is true (their lane was dropped), oldest first.

        Costs one step per waiting piece.
        """
        gone: list[Item] = []
        for number, bucket in enumerate(self._buckets):
            kept: deque[Item] = deque()
            for item in bucket:
                (gone if unwanted(item) else kept).append(item)
            self._buckets[number] = kept
        self._count -= len(gone)
        self.tokens -= sum(item.length for item in gone)
        gone.sort(key=lambda item: item.order)
        return gone

    def cost(self, items: Sequence[Item]) -> int:
        """What a batch costs of its budget, in tokens."""
        lengths = [item.length for item in items]
        return len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)

    def _lane_share(self) -> int:
        """What one lane computes of the waiting tokens: at most a budget, all of them if they are not worth sharing."""
        if self.lanes == 1 or self.tokens >= self.lanes * self.max_tokens:
            return self.max_tokens
        shares = min(self.lanes, self.tokens * SMALLEST_SHARE // self.max_tokens)
        return min(self.max_tokens, -(-self.tokens // shares)) if shares > 1 else self.max_tokens

    def _budget(self, longest: int) -> int:
        return self._share if self.limit is None else min(self._share, self.limit(longest))

    def _anchor(self) -> int | None:
        """The length class of the oldest piece."""
        anchor = None
        first = self._order
        for number, bucket in enumerate(self._buckets):
            if bucket and bucket[0].order < first:
                first = bucket[0].order
                anchor = number
        return anchor

    def _anchored(self, anchor: int) -> list[Item]:
        buckets = self._buckets
        batch = [buckets[anchor].popleft()]
        longest = self._fill(batch, batch[0].length, anchor)
        # Widen class by class, shorter before longer at the same distance: a shorter piece pads itself only,
        # a longer one pads all the others.
        for distance in range(1, len(buckets)):
            for number in (anchor - distance, anchor + distance):
                if 0 <= number < len(buckets) and buckets[number]:
                    if (len(batch) + 1) * longest > self._budget(longest) or len(batch) >= self.max_items:
                        return batch
                    longest = self._fill(batch, longest, number)
        return batch

    def _fill(self, batch: list[Item], longest: int, number: int) -> int:
        """Move what fits of a class into the batch, oldest first; returns the batch's longest length."""
        bucket = self._buckets[number]
        count, max_items, max_tokens = len(batch), self.max_items, self._share
        limited = self.limit is not None
        while bucket and count < max_items:
            length = bucket[0].length
            if length < longest:
                length = longest
            count += 1
            if count * length > (self._budget(length) if limited else max_tokens):
                break
            longest = length
            batch.append(bucket.popleft())
        return longest

    def _in_order(self) -> list[Item]:
        heads = [(bucket[0].order, bucket) for bucket in self._buckets if bucket]
        heapq.heapify(heads)
        batch: list[Item] = []
        longest = total = 0
        while heads and len(batch) < self.max_items:
            bucket = heads[0][1]
            length = bucket[0].length
            longest = max(longest, length)
            total += length
            cost = (len(batch) + 1) * longest if self.padded else total
            if batch and cost > self._budget(longest):
                break
            batch.append(bucket.popleft())
            if bucket:
                heapq.heapreplace(heads, (bucket[0].order, bucket))
            else:
                heapq.heappop(heads)
        return batch
