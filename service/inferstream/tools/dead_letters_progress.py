"""Which letters of one partition are done, as a commit of the replay's group says it.

The committed offset is the first letter that is not done; the letters behind it that are done nevertheless,
because a filter left out what lies between, stand in the commit's metadata.  So a second call replays nothing
twice and still reaches everything that the first left out.

The metadata is ``replay/1:``, a letter for the form and base64 (URL alphabet) of raw deflate.  Form ``r``:
unsigned LEB128 numbers, in turn the length of a stretch that is not done and of one that is, from the committed
offset on; form ``b``: a bit per offset, from the committed one on, lowest bit first, 1 for done.  The shorter of
the two is written.  The brokers take ``offset.metadata.max.bytes`` of it, 4096 unless changed.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

MAX_METADATA = 4096
_PREFIX = "replay/1:"
_MOST_BITS = 1 << 18  # beyond it the other form is the shorter one where anything fits
_LARGEST = 1 << 20  # bytes of unpacked metadata: a commit that somebody else wrote must not take our memory


class UnknownProgress(ValueError):
    """The metadata of a commit is not of this form."""


class Progress:
    """The letters of one partition that are done: all before ``watermark``, and some from there on.

    ``runs`` are the offsets done beyond it: half-open, sorted, neither touching nor empty, the first of them
    after ``watermark``.
    """

    def __init__(self, watermark: int, runs: Iterable[tuple[int, int]] = ()) -> None:
        self.watermark = watermark
        self.runs: list[tuple[int, int]] = list(runs)

    def copy(self) -> Progress:
        return Progress(self.watermark, self.runs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Progress) and self.watermark == other.watermark and self.runs == other.runs

    def __repr__(self) -> str:
        return f"Progress({self.watermark}, {self.runs})"

    def done(self, offset: int) -> bool:
        """Whether the letter at the offset is done."""
        if offset < self.watermark:
            return True
        at = bisect_right(self.runs, (offset, 1 << 63)) - 1
        return at >= 0 and offset < self.runs[at][1]

    def mark(self, start: int, stop: int) -> None:
        """The offsets from ``start`` to before ``stop`` are done."""
        start = max(start, self.watermark)
        if stop <= start:
            return
        first = bisect_left(self.runs, start, key=lambda run: run[1])
        last = bisect_right(self.runs, stop, key=lambda run: run[0])
        if first < last:
            start, stop = min(start, self.runs[first][0]), max(stop, self.runs[last - 1][1])
        self.runs[first:last] = [(start, stop)]
        if self.runs[0][0] <= self.watermark:
            self.watermark = self.runs.pop(0)[1]

    def metadata(self) -> str:
        """What is committed beside the watermark; empty if nothing beyond it is done."""
        if not self.runs:
            return ""
        numbers = bytearray()
        at = self.watermark
        for start, stop in self.runs:
            for number in (start - at, stop - start):
                while number >= 0x80:
                    numbers.append(number & 0x7F | 0x80)
                    number >>= 7
                numbers.append(number)
            at = stop
        forms = {"r": _packed(bytes(numbers))}
        length = self.runs[-1][1] - self.watermark
        if length <= _MOST_BITS:
            bits = 0
            for start, stop in self.runs:
                bits |= (1 << stop - self.watermark) - (1 << start - self.watermark)
            forms["b"] = _packed(bits.to_bytes((length + 7) // 8, "little"))
        form = min(forms, key=lambda name: len(forms[name]))
        return f"{_PREFIX}{form}{forms[form]}"

    @classmethod
    def of(cls, offset: int, metadata: str) -> Progress:
        """The progress that a commit says; raises UnknownProgress for metadata that is not ours."""
        if not metadata:
            return cls(offset)
        form, text = metadata[len(_PREFIX) :][:1], metadata[len(_PREFIX) + 1 :]
        if not metadata.startswith(_PREFIX) or form not in ("r", "b"):
            raise UnknownProgress(metadata[:40])
        try:
            packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            unpacker = zlib.decompressobj(-15)
            unpacked = unpacker.decompress(packed, _LARGEST)
            if not unpacker.eof:
                raise UnknownProgress(metadata[:40])
        except (binascii.Error, ValueError, zlib.error):
            raise UnknownProgress(metadata[:40]) from None
        progress = cls(offset)
        stretches = _numbers(unpacked) if form == "r" else _bit_runs(unpacked)
        at = offset
        for number, stretch in enumerate(stretches):
            if number % 2:
                progress.mark(at, at + stretch)
            at += stretch
        return progress


def _packed(form: bytes) -> str:
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(form) + packer.flush()
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def _numbers(unpacked: bytes) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in unpacked:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number = shift = 0
    return numbers


def _bit_runs(unpacked: bytes) -> list[int]:
    """The lengths of the stretches of equal bits, the first of them of zeros."""
    lengths, before = [0], "0"
    for bit in bin(int.from_bytes(unpacked, "little"))[:1:-1]:
        if bit != before:
            lengths.append(0)
            before = bit
        lengths[-1] += 1
    return lengths
