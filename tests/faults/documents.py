"""The input of a run and what must become of it: a record follows from its number, and its answer from the record."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import orjson

from inferstream.documents import Reason
from inferstream.tasks.hash import CHARACTERS_PER_TOKEN, digest

WORDS = ("order", "ship", "Größe", "late", "日本", "refund", "a", "of", "parcel", "no", "🙂", "broken")
LARGE_BYTES = 6000  # of metadata, half of which is left when compressed
MAX_LENGTH = 64  # tokens, of a text or of a chunk
MAX_CHUNKS = 4

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The worker's settings that decide what becomes of a record; MAX_LENGTH and MAX_CHUNKS hold in every run."""

    long_documents: Literal["truncate", "chunk"] = "truncate"
    tombstones: Literal["forward", "dead-letter"] = "forward"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a record must become: the vector of ``digests``, a tombstone, or else the dead letter with ``reason``.

    Of several digests, one for each chunk, it is the mean, weighted by their ``tokens``.  ``large``: its result is so
    large that a topic with a lowered limit refuses it.
    """

    digests: tuple[bytes, ...] = ()
    tokens: tuple[int, ...] = ()
    truncated: bool = False
    tombstone: bool = False
    reason: Reason | None = None
    id: str | None = None
    metadata: Any = None
    large: bool = False


def record(seed: int, number: int) -> tuple[bytes | None, bytes | None, Headers]:
    """Key, value and headers of the input's ``number``-th record.

    Of 200, 4 are no documents, 2 have no value (one of them no key either), 5 have much metadata and 5 a long text.
    """
    chance = random.Random(seed * 1_000_003 + number)
    key = b"key-%d" % chance.randrange(1000)
    kind = chance.randrange(200)
    headers = header(seed)
    if kind < 2:
        return key, b'{"id": %d, "text": ' % number, headers
    if kind < 4:
        return key, orjson.dumps({"id": number, "texts": "none"}), headers
    document: dict[str, Any] = {
        "id": number,
        "text": f"{number} " + " ".join(chance.choices(WORDS, k=chance.randrange(1, 30))),
    }
    if kind < 9:
        document["metadata"] = {"n": number, "large": chance.randbytes(LARGE_BYTES // 2).hex()}
    elif kind < 60:
        document["metadata"] = {"n": number}
    elif kind < 62:  # what is passed on of it has nothing but the headers to be known by
        return key if kind == 60 else None, None, (*headers, ("number", b"%d" % number))
    elif kind < 67:
        document["text"] += " " + " ".join(chance.choices(WORDS, k=chance.randrange(60, 360)))
    return key, orjson.dumps(document), headers


def answer(key: bytes | None, value: bytes | None, reading: Reading) -> Answer:
    """By the contract of the service and nothing of its code but the digest that ``builtin:hash`` is."""
    if value is None:
        if key is None:
            return Answer(reason=Reason.TOMBSTONE_WITHOUT_KEY)
        return (
            Answer(tombstone=True) if reading.tombstones == "forward" else Answer(reason=Reason.MISSING_TEXT)
        )
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError:
        return Answer(reason=Reason.INVALID_JSON)
    if "text" not in document:
        return Answer(reason=Reason.MISSING_TEXT)
    text, metadata = document["text"], document.get("metadata")
    pieces: Sequence[str] = [text]
    limit = MAX_LENGTH * CHARACTERS_PER_TOKEN
    too_long = len(text) >= limit
    if too_long and reading.long_documents == "chunk":
        pieces = [text[at : at + limit - 1] for at in range(0, len(text), limit - 1)]
        if len(pieces) > MAX_CHUNKS:
            return Answer(reason=Reason.TOO_LONG)
    return Answer(
        digests=tuple(digest(piece) for piece in pieces),
        tokens=tuple(len(piece) // CHARACTERS_PER_TOKEN + 1 for piece in pieces),
        truncated=too_long and len(pieces) == 1,
        id=str(document["id"]),
        metadata=metadata,
        large=isinstance(metadata, dict) and "large" in metadata,
    )


@lru_cache(maxsize=4)
def header(seed: int) -> Headers:
    """What every record of a run carries, to be found on its answer again."""
    return (("run", b"%d" % seed),)
