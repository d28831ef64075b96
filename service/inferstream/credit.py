"""Credit: how much the worker may hold at once, and which partitions may be polled for more.

Every admitted record takes credit, in documents and bytes, and gives it back when it is acknowledged, so
memory is bounded whatever the input rate or the state of the broker (promise 4).  Pure and synchronous.

With L open lanes, F = ``fetch_bytes``, W = the heaviest record as taken (unpacked), G = what the records now
held have gained since (``reweigh``), at every moment:

    documents <= max_documents + L - 1
    bytes     <= max_bytes + F + L x W + G
    documents of one lane <= its share + quantum, a quantum being an eighth of the share, at least 1

These are bytes as they lie in memory: no ratio of compression comes in, because polls are cut by unpacked bytes
(``kafka/polling.py``).  It does in what the client keeps beside: for each partition a fetched chunk, packed,
and the one record batch of it that is being read, C x its packed size with C the ratio of its compression.

*Documents.*  While credit is left, a poll asks for no more than is left.  While none is left, only lanes that
hold nothing are polled, for one record in all: a reserve.  Since the credit last ran out, a lane that took a
reserve holds that alone, and one that took none holds no more than it did then.  So the reserves add at most
one for each lane but one: if all L lanes took one, they hold L in all, which is <= max_documents + L - 1.

*Bytes.*  A record's size is known only once it is unpacked.  The mean of the recent ones says how many records
to ask for, but the next may be of another kind; so a poll ends with the record that brings it to F bytes in
all.  One that begins below ``max_bytes`` ends below ``max_bytes + F + W``, whatever was expected of its
records, and the reserves, at most one for each lane but one, add W each.  A document heavier than ``max_bytes``
is therefore admitted, and exhausts the credit until it is acknowledged: alone, but for the reserves and what
came in the same poll.  To keep G near 0, take a record at the weight it will end with, as far as that is known
(a result's size is, for embeddings).  When F is not left for each eligible lane, they take turns: a poll
empties one partition's chunk before it touches the next, and the first would have all that is left.

*Tokens* are known only after tokenising, so ``max_tokens`` is a gate and no bound: nothing but reserves is
polled while it is reached, and what was polled and not tokenised by then comes on top.

*No deadlock.*  A lane that holds nothing is always eligible, and at least one record is asked for when any
lane is.  So if none is eligible, each holds a record that the pipeline is working on; and nothing that a held
record needs in order to be finished takes credit.

*One slow head does not stall the others.*  A lane stops being polled at ``max_lane_share`` of the documents
or bytes and leaves the rest to the others; if several are slow and together hold everything, each of the
others still has its reserve.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

RECORD_OVERHEAD: Final = 512  # part of a record's weight: the host memory of its objects beside its bytes

# The recent mean size forgets: a record's part in it halves every 44 records (0.5 = (1 - 1/64) ** 44).
_SMOOTHING: Final = 1 / 64


def _forget(count: int) -> float:
    """How much of a recent mean ``count`` further records replace."""
    return _SMOOTHING if count == 1 else 1.0 - (1.0 - _SMOOTHING) ** count


class _Account:
    """What one lane holds."""

    __slots__ = ("bytes", "documents", "tokens")

    def __init__(self) -> None:
        self.documents = 0
        self.bytes = 0
        self.tokens = 0


class Credit(Generic[K]):
    """The shared bounds and what each lane holds of them.

    ``max_documents``, ``max_bytes`` and ``max_tokens`` bound what is held; ``max_lane_share`` (above 0,
    at most 1) is the part of documents and bytes at which a lane is not polled.  ``fetch_bytes`` is what one
    poll hands over, unpacked and in all, before its last record (``kafka.max_partition_fetch_bytes``); without
    it every eligible lane is polled at once, and F in the bound above is whatever a poll hands over.

    Lanes are known by a key of the caller's that is never used again for another epoch of the same partition.
    """

    __slots__ = (
        "_fetch_bytes",
        "_given_mean",
        "_lane_bytes",
        "_lane_documents",
        "_lanes",
        "_quantum",
        "_taken_mean",
        "_tokens_mean",
        "_turn",
        "bytes",
        "documents",
        "max_bytes",
        "max_documents",
        "max_tokens",
        "tokens",
    )

    def __init__(
        self,
        max_documents: int,
        max_bytes: int,
        max_tokens: int,
        max_lane_share: float,
        fetch_bytes: int | None = None,
    ) -> None:
        if min(max_documents, max_bytes, max_tokens) < 1 or not 0 < max_lane_share <= 1:
            raise ValueError("bounds must be at least 1 and 0 < max_lane_share <= 1")
        if fetch_bytes is not None and fetch_bytes < 1:
            raise ValueError("fetch_bytes must be at least 1")
        self.max_documents = max_documents
        self.max_bytes = max_bytes
        self.max_tokens = max_tokens
        self.documents = 0
        self.bytes = 0
        self.tokens = 0
        self._fetch_bytes = fetch_bytes
        self._lane_documents = max(1, int(max_documents * max_lane_share))
        self._lane_bytes = max(1, int(max_bytes * max_lane_share))
        # A lane just below its share must not make every poll tiny; this much of an overshoot buys that.
        self._quantum = max(1, self._lane_documents // 8)
        # Until the first record: the size at which both bounds are reached together.
        self._taken_mean = max_bytes / max_documents
        self._given_mean = 0.0
        self._tokens_mean = 0.0
        self._lanes: dict[K, _Account] = {}
        self._turn = 0

    # -- lanes ---------------------------------------------------------------------------------------------

    def open_lane(self, key: K) -> None:
        """Let a lane take credit.  ValueError if it is open already."""
        if key in self._lanes:
            raise ValueError(f"lane {key!r} is open already")
        self._lanes[key] = _Account()

    def close_lane(self, key: K) -> None:
        """End a lane: what it still holds goes back at once, and what comes back for it later is ignored.

        Without effect on a lane that is not open.
        """
        account = self._lanes.pop(key, None)
        if account is not None:
            self.documents -= account.documents
            self.bytes -= account.bytes
            self.tokens -= account.tokens

    # -- records -------------------------------------------------------------------------------------------

    def take(self, key: K, weight: int, count: int = 1) -> None:
        """Charge ``count`` records that were polled, ``weight`` bytes in all.

        Never refuses: they are in memory already.  KeyError if the lane is not open.
        """
        account = self._lanes[key]
        account.documents += count
        account.bytes += weight
        self.documents += count
        self.bytes += weight
        self._taken_mean += (weight / count - self._taken_mean) * _forget(count)

    def reweigh(self, key: K, old: int, new: int, tokens: int = 0, count: int = 1) -> None:
        """Change the weight of ``count`` held records from ``old`` to ``new`` bytes and add to their tokens."""
        account = self._lanes.get(key)
        if account is None:
            return
        account.bytes += new - old
        self.bytes += new - old
        if tokens:
            account.tokens += tokens
            self.tokens += tokens
            if tokens > 0:
                self._tokens_mean += (tokens / count - self._tokens_mean) * _forget(count)

    def give(self, key: K, weight: int, tokens: int = 0, count: int = 1) -> None:
        """Give back the credit of ``count`` held records, as last weighed in all."""
        account = self._lanes.get(key)
        if account is None:
            return
        account.documents -= count
        account.bytes -= weight
        account.tokens -= tokens
        self.documents -= count
        self.bytes -= weight
        self.tokens -= tokens
        self._given_mean += (weight / count - self._given_mean) * _forget(count)

    # -- what may be polled --------------------------------------------------------------------------------

    @property
    def exhausted(self) -> bool:
        """Whether only reserves are left."""
        return (
            self.documents >= self.max_documents
            or self.bytes >= self.max_bytes
            or self.tokens >= self.max_tokens
        )

    def max_records(self) -> int:
        """How many records the shared credit has room for, by the recent mean size; 0 when exhausted."""
        if self.exhausted:
            return 0
        # A record may leave heavier than it came (its result): the larger mean is the one that must fit.
        room = min(
            self.max_documents - self.documents,
            int((self.max_bytes - self.bytes) / max(self._taken_mean, self._given_mean, 1.0)),
            int((self.max_tokens - self.tokens) / max(self._tokens_mean, 1.0)),
        )
        return max(1, room)

    def eligible(self, key: K) -> bool:
        """Whether a lane may be polled: it holds nothing, or there is credit and it is below its share."""
        account = self._lanes.get(key)
        if account is None:
            return False
        return not account.documents or (not self.exhausted and self._below_share(account))

    def poll_limit(self, keys: Iterable[K]) -> tuple[list[K], int]:
        """Which of these lanes to poll together now, and for how many records in all.

        ([], 0) when there is none.  When the bytes left do not cover a fetch of each, some sit out by turns.
        """
        lanes = self._lanes
        limit = self.max_records()
        if not limit:
            empty = [key for key in keys if key in lanes and not lanes[key].documents]
            return (empty, 1) if empty else ([], 0)
        chosen: list[K] = []
        smallest = self._lane_documents
        for key in keys:
            account = lanes.get(key)
            if account is not None and (not account.documents or self._below_share(account)):
                chosen.append(key)
                smallest = min(smallest, self._lane_documents - account.documents)
        if not chosen:
            return [], 0
        if self._fetch_bytes is not None:
            together = max(1, (self.max_bytes - self.bytes) // self._fetch_bytes)
            if together < len(chosen):
                first = self._turn % len(chosen)
                self._turn += together
                chosen = (chosen[first:] + chosen[:first])[:together]
        return chosen, min(limit, max(self._quantum, smallest))

    def _below_share(self, account: _Account) -> bool:
        return account.documents < self._lane_documents and account.bytes < self._lane_bytes

    def held(self, key: K) -> int:
        """How many records a lane holds; 0 when it is not open."""
        account = self._lanes.get(key)
        return account.documents if account is not None else 0
