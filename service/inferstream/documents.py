"""The types that travel through the stages, in the order of the flow.

    Record  --decode-->  Document  --prepare-->  Prepared  --device, finish-->  Outgoing
       \\________________________ or Rejected, at any stage ______________________/

They are small and know neither asyncio nor Kafka nor torch.  Nobody changes one once it is made; those that
every record needs are not ``frozen`` only because that makes them three times as slow to make.  The codec
that turns bytes into these types and back lives in :mod:`inferstream.codec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

Headers = Sequence[tuple[str, bytes | None]]


class Record(Protocol):
    """What we read of a Kafka record; aiokafka's ``ConsumerRecord`` satisfies it as it is, without a copy."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class Reason(StrEnum):
    """Why a document became a dead letter: a closed list, a metric label and a filter."""

    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_TEXT = "missing_text"
    INVALID_TEXT = "invalid_text"
    INVALID_FIELD = "invalid_field"
    INVALID_ID = "invalid_id"
    TOMBSTONE_WITHOUT_KEY = "tombstone_without_key"
    TOO_LONG = "too_long"
    RESULT_TOO_LARGE = "result_too_large"
    RECORD_REFUSED = "record_refused"
    OUT_OF_MEMORY = "out_of_memory"
    MODEL_ERROR = "model_error"
    PROCESS_KILLED = "process_killed"


class Stage(StrEnum):
    """Where a document was refused; a metric label and a dead-letter header."""

    PREPARE = "prepare"
    DEVICE = "device"
    FINISH = "finish"
    SINK = "sink"


@dataclass(slots=True)
class Document:
    """A decoded input record, projected by the configured pointers and valid by ``schemas/document.v1``."""

    id: str
    text: str
    text_pair: str | None = None
    metadata: Any = None
    has_metadata: bool = False

    def without_text(self) -> Document:
        """What the result still needs once the model's input is made: 1 MB of text may be 256 tokens."""
        return Document(self.id, "", None, self.metadata, self.has_metadata)


@dataclass(slots=True)
class Prepared:
    """A document ready for the device; ``document`` has its text no longer.

    ``chunks`` holds one model input per chunk (for text models an int32 array of token ids, special tokens
    included); a document that is not cut has exactly one.  ``lengths`` are their token counts.  ``weight`` is
    the host memory of the prepared form in bytes.
    """

    document: Document
    chunks: tuple[Any, ...]
    lengths: tuple[int, ...]
    truncated: bool
    weight: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that gets no result.  ``message`` says what to do and holds no document text."""

    reason: Reason
    message: str
    stage: Stage = Stage.PREPARE
    attempts: int = 1


class Kind(StrEnum):
    """What an outgoing record is; it decides the topic."""

    RESULT = "result"
    TOMBSTONE = "tombstone"
    DEAD_LETTER = "dead_letter"


@dataclass(slots=True)
class Outgoing:
    """A record for the output topic (result, tombstone) or the dead-letter topic, ready to be sent.

    ``rejected`` is set on dead letters only.  ``size`` is an upper bound of the bytes the record takes in an
    uncompressed batch (v2 record format); worked out here, once, because the event loop asks for it often.
    """

    kind: Kind
    key: bytes | None
    value: bytes | None
    headers: Headers
    rejected: Rejected | None = None
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        size = 21 + len(self.key or b"") + len(self.value or b"")
        for name, value in self.headers:
            size += 10 + 3 * len(name) + len(value or b"")
        self.size = size
