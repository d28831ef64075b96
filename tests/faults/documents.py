"""The input of a run and what must become of it: a record follows from its number, and its answer from the record."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from inferstream.documents import Reason
from inferstream.tasks.hash import digest

WORDS = ("order", "ship", "Größe", "late", "日本", "refund", "a", "of", "parcel", "no", "🙂", "broken")
LARGE_BYTES = 6000  # of metadata, half of which is left when compressed


@dataclass(frozen=True, slots=True)
class Answer:
    """What a record must become: the vector of ``digest``, or else the dead letter with ``reason``.

    ``large``: its result is so large that a topic with a lowered limit refuses it.
    """

    digest: bytes | None
    reason: Reason | None
    id: str | None
    metadata: Any
    large: bool


def record(seed: int, number: int) -> tuple[bytes, bytes]:
    """Key and value of the input's ``number``-th record: 1 in 50 is no document, 1 in 40 is large."""
    chance = random.Random(seed * 1_000_003 + number)
    key = b"key-%d" % chance.randrange(1000)
    kind = chance.randrange(200)
    if kind < 2:
        return key, b'{"id": %d, "text": ' % number
    if kind < 4:
        return key, orjson.dumps({"id": number, "texts": "none"})
    document: dict[str, Any] = {
        "id": number,
        "text": f"{number} " + " ".join(chance.choices(WORDS, k=chance.randrange(1, 30))),
    }
    if kind < 9:
        document["metadata"] = {"n": number, "large": chance.randbytes(LARGE_BYTES // 2).hex()}
    elif kind < 60:
        document["metadata"] = {"n": number}
    return key, orjson.dumps(document)


def answer(value: bytes) -> Answer:
    """By the contract of the service and nothing of its code but the digest that ``builtin:hash`` is."""
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError:
        return Answer(None, Reason.INVALID_JSON, None, None, False)
    if "text" not in document:
        return Answer(None, Reason.MISSING_TEXT, None, None, False)
    metadata = document.get("metadata")
    return Answer(
        digest(document["text"]),
        None,
        str(document["id"]),
        metadata,
        isinstance(metadata, dict) and "large" in metadata,
    )


@lru_cache(maxsize=4)
def header(seed: int) -> tuple[tuple[str, bytes], ...]:
    """What every record of a run carries, to be found on its answer again."""
    return (("run", b"%d" % seed),)
