"""Records that aiokafka cannot unpack, or not as the contract has them, unpacked all the same.

*A header's name that is not UTF-8.*  The protocol says it is, and no broker looks.  aiokafka 0.14 raises in the
middle of the batch, and again at every start: one such record would stop its partition for ever.  The Java
client reads it with U+FFFD for what is no UTF-8, and so is it read here: once more, by aiokafka's parser in
Python, from the batch that raised on.

*No timestamp.*  Records of message format 0 have None; the broker itself says -1 (``NO_TIMESTAMP``).

Both are rare, so the usual record costs nothing more.  aiokafka has no place to hook this in: the two classes
are put where its fetcher looks for its own, for every consumer of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy

NO_TIMESTAMP = -1


def install() -> None:
    """Have aiokafka's fetcher unpack with the classes of this module."""
    fetcher.MemoryRecords = Fetched
    fetcher.PartitionRecords = Unpacked


class Fetched(MemoryRecords):  # type: ignore[misc]  # aiokafka ships no types
    """The record batches of one partition in a fetch response; keeps the bytes, as the base class does unseen."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data

    def next_batch(self) -> Any:
        batch = super().next_batch()
        return _Dated(batch) if isinstance(batch, LegacyRecordBatch) else batch


class Unpacked(PartitionRecords):  # type: ignore[misc]
    """The records of one partition in a fetch response, whatever their headers are called."""

    _records: Any

    def _unpack_records(self) -> Iterator[Any]:
        try:
            yield from super()._unpack_records()
            return
        except UnicodeDecodeError:
            pass
        self._records = _Lenient(self._records.data, self.next_fetch_offset)
        yield from super()._unpack_records()


class _Dated:
    """A batch of message format 0 or 1, with a timestamp in every record."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        for record in self._batch:
            if record.timestamp is None:
                record = _DefaultRecordPy(record.offset, NO_TIMESTAMP, 0, record.key, record.value, [])
            yield record


class _Lenient(_MemoryRecordsPy):  # type: ignore[misc]
    """The batches that end behind ``offset``, parsed in Python."""

    def __init__(self, data: bytes, offset: int) -> None:
        super().__init__(data)
        while self._next_slice is not None and self._next_slice[self.MAGIC_OFFSET] >= 2:
            if _DefaultRecordBatchPy(self._next_slice).next_offset > offset:
                break
            self._cache_next()

    def next_batch(self) -> Any:
        taken = self._next_slice
        batch = super().next_batch()
        if isinstance(batch, LegacyRecordBatch):
            return _Dated(batch)
        return batch if taken is None else _LenientBatch(taken)


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _LenientBytes(self._buffer)


class _LenientBytes(bytearray):
    """Bytes whose slices decode with U+FFFD for what is no UTF-8."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return _LenientBytes(found) if isinstance(index, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)
