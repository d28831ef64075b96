"""Generated records through all that is done to one before and after the device, each with exactly one outcome.

    python -m tests.fuzz --records 1000000 --seed 7

decode -> prepare (``builtin:hash``) -> rows -> finish -> the record batch that would be sent, read back.  Records
are made by a seeded mutator, not by Hypothesis: a million take minutes.  What is checked of every record: no step
raises; it has one outcome; the verdict of ``decode`` is that of a second decoder, written here on Python's own
``json`` (:func:`verdict`); result and dead letter are valid by ``schemas/``; key, value, headers and metadata are
those that came in; no message holds text of the document; the size the sink counts with is an upper bound.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs
import orjson
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from inferstream.codec import HEADER_PREFIX, SCHEMA_HEADER, Codec, schema
from inferstream.documents import Document, Headers, Kind, Outgoing, Prepared, Reason, Rejected, Stage
from inferstream.tasks.hash import HashTask, hash_vectors

SECRET = "Qx7"  # in every text and id that is made here, and so in no message
CHUNK = 256
DEEPEST_JSON = 1024
DEEPEST_METADATA = 250  # what is promised
DEEPEST_COPIED = 254  # what orjson does: between the two, either is right


@dataclass(slots=True)
class Fuzzed:
    """A record as the codec reads it."""

    value: bytes | None
    key: bytes | None
    headers: Headers
    offset: int
    timestamp: int = 1_764_000_000_000
    topic: str = "documents"
    partition: int = 3


# ---------------------------------------------------------------- records

_TEXTS: list[bytes] = [
    rb'"Qx7 the reactor is cooled by water."',
    rb'"Qx7"',
    '"Qx7 реактор охлаждается водой, 反应堆由水冷却 😀"'.encode(),
    rb'"\u0051x7 \ud83d\ude00 \n\t\"\\ \/"',
    rb'"Qx7 \ud800 alone"',
    rb'"Qx7 \udc00\ud800 swapped"',
    rb'"Qx7 \u0000 \uffff \ufeff"',
    '"Qx7 \ufeff\u200b\u2028 \u0301"'.encode(),
    b'"Qx7 raw \x01 control"',
    b'"Qx7 \xed\xa0\x80 encoded surrogate"',
    b'"Qx7 \xc0\xaf overlong"',
    b'"Qx7 \xf4\x90\x80\x80 beyond unicode"',
    b'"Qx7 ' + b"word " * 200 + b'"',
    b'"Qx7 ' + "щ".encode() * 700 + b'"',
    b'""',
    rb'" \t\n\u2003\u3000"',
    rb'"\u200b"',
    b"null",
    b"7",
    b"-0.0",
    b"true",
    b"[]",
    b'["Qx7"]',
    b'{"Qx7":"Qx7"}',
    b'"Qx7 unterminated',
    b"NaN",
    b"Qx7",
]
_IDS: list[bytes] = [
    b'"Qx7-1"',
    b'""',
    b"7",
    b"-1",
    b"0",
    b"-0",
    b"-0.0",
    b"7.0",
    b"7e0",
    b"7.5",
    b"1e15",
    b"1e16",
    b"9007199254740992.0",
    b"9007199254740991.0",
    b"9007199254740993",
    b"9223372036854775807",
    b"-9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551615",
    b"18446744073709551616",
    b"1e308",
    b"1e309",
    b"-1e999",
    b"1e-400",
    b"1" + b"0" * 400,
    b"9" * 5000,
    b"01",
    b"+1",
    b".5",
    b"1.",
    b"0x10",
    b"Infinity",
    b"null",
    b"false",
    b"[1]",
    b"{}",
    b'"Qx7' + b"x" * 1021 + b'"',
    b'"Qx7' + b"x" * 1022 + b'"',
    b'"Qx7' + "é".encode() * 510 + b'"',
    b'"Qx7' + "é".encode() * 511 + b'"',
    rb'"Qx7\ud800"',
    rb'"Qx7\u0000\n"',
]
_PAIRS: list[bytes] = [b'"Qx7 pair"', b'""', b"null", b"3", b"[]", b'"' + b"pair " * 300 + b'"']


def _nested(depth: int, kind: int) -> bytes:
    if kind == 0:
        return b"[" * depth + b"]" * depth
    if kind == 1:
        return b'{"a":' * depth + b"1" + b"}" * depth
    return b'[{"a":' * (depth // 2) + b"[" * (depth % 2) + b"]" * (depth % 2) + b"}]" * (depth // 2)


_METADATA: list[bytes] = [
    b'{"lang":"en","n":[1,2.5,null,true]}',
    b"null",
    b'"text"',
    b"[1e400]",
    b"[12345678901234567890123]",
    b"1" * 30,
    b"[" + b"1" * 400 + b"]",
    b"-0.0",
    b"5e-324",
    b"0.1",
    rb'{"\ud83d\ude00":"\u0000"}',
    rb'{"\ud800":1}',
    b'{"a":1,"a":2}',
    b"{}",
    *(_nested(depth, kind) for depth in (1, 249, 250, 251, 252, 1000) for kind in range(3)),
]
_DEEP: list[bytes] = [_nested(d, k) for d in (1021, 1022, 1023, 1024, 1025, 1026, 10_000) for k in range(3)]
_OTHERS: list[bytes] = [b"1", b'"Qx7"', b"null", b"[]", b"NaN", b"-Infinity", b"1e999", rb'"\ud800"', b"tru"]
_NAMES: list[bytes] = [
    b'"id"',
    b'"text"',
    b'"text_pair"',
    b'"metadata"',
    rb'"\u0074ext"',
    b'"TEXT"',
    b'""',
    b'"text "',
]
_WHOLE: list[bytes | None] = [
    *[None] * 8,
    b"",
    b" ",
    b"\x00",
    b"null",
    b"[]",
    b'"Qx7"',
    b"7",
    b"{}",
    b"{",
    b"[{}]",
    b"{}{}",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"Qx7 plain words",
    b"\xed\xa0\x80",
]
_KEYS: list[bytes | None] = [None, b"", b"key", b"\xff\x00", b"k" * 300]
_TIMESTAMPS = [1_764_000_000_000, 0, -1, 1, (1 << 62), -(1 << 40)]
_HEADERS: list[Headers] = [
    (),
    (),
    [("trace", b"00-ab-cd-01")],
    [("empty", b""), ("null", None), ("", b"no name"), ("", None)],
    [("twice", b"1"), ("twice", b"2"), ("Twice", None)],
    [("ünïcode 😀\n", "ü".encode()), ("n" * 300, b"\xff" * 300)],
    [("inferstream.schema", b"result/9"), ("inferstream.schema", None)],
    [("inferstream.error.reason", b"forged"), ("inferstream.error.reason", None), ("inferstream.", b"")],
    [("inferstream.stripped.value_bytes", b"9"), ("INFERSTREAM.error.stage", b"x"), ("inferstreamx", b"y")],
    [("inferstream.replays", b"2"), ("inferstream.id", b"Qx7"), ("a", b"1")],
    [(f"h{n}", b"%d" % n) for n in range(40)],
]
_ODD_BYTES = b'\x00\x01\x1f"\\/{}[]:,.+-eE019nft\x7f\x80\xbf\xc0\xed\xf4\xff\xef \n\t'
_VALID = [
    b'{"id": "Qx7-a", "text": "Qx7 one", "metadata": {"n": [1, null, "x"]}}',
    '{"text":"Qx7 дом 😀","text_pair":"Qx7 zwei","id":18446744073709551615}'.encode(),
    b'{\n  "metadata": null,\n  "other": {"deep": [[[[1.5e3]]]]},\n  "text": "Qx7 \\u00e9\\ud83d\\ude00"\n}',
    b'{"text":"Qx7 ' + b"long " * 120 + b'","id":-5}',
    b'{"body":{"parts":[{"text":"Qx7 inner"}]},"text":"Qx7 outer","a/b":{"m~n":7}}',
]


class Mutator:
    """Records without end, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def record(self, offset: int) -> Fuzzed:
        chance = self._random
        choice, roll = chance.choice, chance.random()
        value: bytes | None
        if roll < 0.55:
            value = self._composed()
        elif roll < 0.85:
            value = self._damaged(choice(_VALID) if chance.random() < 0.7 else self._composed())
        elif roll < 0.92:
            value = self._encoded(choice(_VALID))
        elif roll < 0.97:
            value = choice(_WHOLE)
        else:
            value = chance.randbytes(chance.randrange(1, 80))
        headers = choice(_HEADERS)
        if chance.random() < 0.05:
            headers = [*headers, *choice(_HEADERS), (f"h{chance.random()}", chance.randbytes(3))]
        return Fuzzed(value, choice(_KEYS), headers, offset, choice(_TIMESTAMPS))

    def _composed(self) -> bytes:
        """An object, mostly nearly right, of fields that are mostly odd."""
        chance = self._random
        choice = chance.choice
        fields = [b'"text":' + (choice(_TEXTS) if chance.random() < 0.25 else _TEXTS[chance.randrange(4)])]
        if chance.random() < 0.6:
            fields.append(b'"id":' + (choice(_IDS) if chance.random() < 0.4 else choice(_IDS[:8])))
        if chance.random() < 0.2:
            fields.append(b'"text_pair":' + choice(_PAIRS))
        if chance.random() < 0.4:
            fields.append(b'"metadata":' + choice(_METADATA))
        if chance.random() < 0.1:
            fields.append(choice(_NAMES) + b":" + choice(_OTHERS))
        if chance.random() < 0.1:
            fields.append(b'"other":' + choice(_OTHERS))
        if chance.random() < 0.02:
            fields.append(choice((b'"other":', b'"metadata":', b'"text":')) + choice(_DEEP))
        if chance.random() < 0.3:
            chance.shuffle(fields)
        value = b"{" + b",".join(fields) + b"}"
        if chance.random() < 0.05:
            value = choice((b" \n\t\r", b"\xef\xbb\xbf", b"\x0b", b"\x00")) + value
        if chance.random() < 0.05:
            value += choice((b" \n", b",", b"\x00", b"}", b"//", b"\xef\xbb\xbf"))
        return value

    def _damaged(self, value: bytes) -> bytes:
        chance = self._random
        data = bytearray(value)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            at = chance.randrange(len(data) + 1)
            to = min(len(data), at + chance.choice((1, 1, 2, 5, 30)))
            kind = chance.randrange(7)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 1 and at < len(data):
                data[at] = chance.choice(_ODD_BYTES)
            elif kind == 2:
                data.insert(at, chance.choice(_ODD_BYTES))
            elif kind == 3:
                del data[at:to]
            elif kind == 4:
                data[at:at] = data[at:to]
            elif kind == 5:
                data[at:] = chance.choice(_VALID)[at:]
            elif kind == 6 and chance.random() < 0.3:
                del data[at:]
        return bytes(data)

    def _encoded(self, value: bytes) -> bytes:
        text = value.decode()
        kind = self._random.randrange(8)
        if kind < 5:
            return text.encode(("utf-16", "utf-16-be", "utf-32", "utf-7", "utf-8-sig")[kind], "surrogatepass")
        if kind == 5:
            return text.encode("latin-1", "xmlcharrefreplace").replace(b"Qx7", b"Qx7\xe9")
        return gzip.compress(value, 1) if kind == 6 else json.dumps(text).encode()


# ---------------------------------------------------------------- the second decoder

_SPACE = re.compile(
    "[\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"
)


_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


class _NotJson(ValueError):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotJson(name)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _NotJson("too large")
    return number


def _int(text: str) -> int | float:
    # Beyond 64 bits orjson reads a double, and refuses what is beyond that.
    if len(text) < 19:
        return int(text)
    if len(text) < 4000 and -(1 << 63) <= (number := int(text)) < 1 << 64:
        return number
    return _float(text)


_DECODER = json.JSONDecoder(parse_float=_float, parse_int=_int, parse_constant=_refuse_constant)
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _depth(value: bytes) -> int:
    """How deep the brackets outside of strings go."""
    if value.count(b"[") + value.count(b"{") <= DEEPEST_METADATA:
        return 0
    depth = deepest = 0
    for byte in _STRINGS.sub(b"", value):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _height(tree: Any) -> int:
    """How many containers lie in each other in a parsed value."""
    height, level = 0, [tree]
    while level := [each for each in level if type(each) in (dict, list)]:
        height += 1
        level = [child for each in level for child in (each.values() if type(each) is dict else each)]
    return height


def _id_without_one(record: Fuzzed) -> str:
    """What a document without an id is called: as it was when it was first read, if it is a replayed one."""
    first = [
        value for name, value in record.headers if name == "inferstream.id" and value and len(value) <= 1024
    ]
    try:
        return first[0].decode()
    except (IndexError, UnicodeDecodeError):
        return f"{record.topic}:{record.partition}:{record.offset}"


def verdict(value: bytes) -> tuple[set[Reason | None], Any]:
    """What ``decode`` may say of a JSON value under the default settings: its reasons, and the parsed value.

    Written on Python's ``json`` from docs/contract.md alone; for deep values, call it in :func:`deep_recursion`.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return {Reason.INVALID_UTF8}, None
    if _depth(value) > DEEPEST_JSON:
        return {Reason.INVALID_JSON}, None
    try:
        stripped = text.strip(" \t\n\r")
        tree, end = _DECODER.raw_decode(stripped)
        if end != len(stripped):
            return {Reason.INVALID_JSON}, None
        # Also where a later field of the same name hides it from the tree.
        if "\\u" in stripped and _LONE_SURROGATE.search(stripped.replace("\\\\", "")):
            return {Reason.INVALID_JSON}, None
    except (ValueError, RecursionError):
        return {Reason.INVALID_JSON}, None
    if type(tree) is not dict:
        return {Reason.NOT_AN_OBJECT}, tree
    read, doc_id, pair = tree.get("text"), tree.get("id"), tree.get("text_pair")
    if read is None:
        return {Reason.MISSING_TEXT}, tree
    if type(read) is not str or _SPACE.fullmatch(read):
        return {Reason.INVALID_TEXT}, tree
    faults: set[Reason | None] = set()  # of two, either may be named
    if not _is_id(doc_id):
        faults.add(Reason.INVALID_ID)
    height = _height(tree.get("metadata"))
    if (pair is not None and type(pair) is not str) or height > DEEPEST_COPIED:
        faults.add(Reason.INVALID_FIELD)
    if not faults and height > DEEPEST_METADATA:
        return {None, Reason.INVALID_FIELD}, tree
    return faults or {None}, tree


def _is_id(doc_id: Any) -> bool:
    if doc_id is None:
        return True
    if type(doc_id) is str:
        return len(doc_id.encode()) <= 1024
    if type(doc_id) is int:
        return True  # _int has made a double of what is larger than 64 bits
    return type(doc_id) is float and doc_id.is_integer() and abs(doc_id) < 2**53


# ---------------------------------------------------------------- one record's way

_VALID_RESULT = jsonschema_rs.validator_for(schema("result.v1"))
_VALID_LETTER = jsonschema_rs.validator_for(schema("dead-letter-headers.v1"))


class Failure(Exception):
    """A record that was treated wrongly."""

    def __init__(self, record: Fuzzed, why: str) -> None:
        super().__init__(f"{why:.600}\n{record!r:.3000}")


@dataclass
class Route:
    """The parts that a record goes through, with some settings; ``answered`` counts outcomes by kind or reason."""

    codec: Codec = field(default_factory=Codec)
    max_length: int = 8192
    long_documents: Any = "truncate"
    plain: bool = False  # input.format: text
    usual: bool = True  # fields, tombstones and format as by default, so that `verdict` applies
    answered: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.task = HashTask(self.max_length, self.long_documents, 4, self.codec.embedding)

    def take(self, records: Sequence[Fuzzed]) -> None:
        """Answer a chunk of records, as the pipeline does; raises Failure."""
        answers: list[tuple[Fuzzed, Outgoing]] = []
        documents: list[tuple[Fuzzed, Document]] = []
        for record in records:
            try:
                decoded = self.codec.decode(record)
                if isinstance(decoded, Rejected):
                    self._check_rejected(record, decoded, Stage.PREPARE)
                    decoded = self.codec.dead_letter(record, decoded)
            except Failure:
                raise
            except Exception as error:
                raise Failure(record, f"decode raised {error!r}") from error
            if isinstance(decoded, Document):
                self._check_document(record, decoded)
                documents.append((record, decoded))
            else:
                answers.append((record, decoded))
        prepared = self.task.prepare([document for _, document in documents])
        for (record, document), ready in zip(documents, prepared, strict=True):
            try:
                answers.append((record, self._finish(record, document, ready)))
            except Failure:
                raise
            except Exception as error:
                raise Failure(record, f"finishing raised {error!r}") from error
        if len(answers) != len(records):
            raise AssertionError(f"{len(records)} records, {len(answers)} answers")
        for record, outgoing in answers:
            self._check_outgoing(record, outgoing)
        self._check_batch(answers)

    def _finish(self, record: Fuzzed, document: Document, ready: Prepared | Rejected) -> Outgoing:
        if isinstance(ready, Rejected):
            self._check_rejected(record, ready, Stage.PREPARE)
            return self.codec.dead_letter(record, ready)
        rows = hash_vectors(ready.chunks)
        output = self.task.output(ready, rows)
        result = self.codec.result(record, ready, self.task.name, self.task.model, output)
        if isinstance(result, Rejected):
            self._check_rejected(record, result, Stage.FINISH)
            return self.codec.dead_letter(record, result)
        return result

    def _check_document(self, record: Fuzzed, document: Document) -> None:
        if not self.usual:
            return
        assert record.value is not None
        expected, tree = verdict(record.value)
        if None not in expected:
            raise Failure(record, f"decoded, and should be {expected}")
        doc_id = tree.get("id")
        echoed = (
            _id_without_one(record) if doc_id is None else doc_id if type(doc_id) is str else str(int(doc_id))
        )
        found = (document.id, document.text, document.text_pair, document.has_metadata)
        if found != (echoed, tree["text"], tree.get("text_pair"), "metadata" in tree):
            raise Failure(record, f"decoded as {found}")

    def _check_rejected(self, record: Fuzzed, rejected: Rejected, stage: Stage) -> None:
        if rejected.stage is not stage or SECRET in rejected.message or rejected.reason is Reason.MODEL_ERROR:
            raise Failure(record, f"{rejected}")
        if not self.usual or rejected.reason in (Reason.TOO_LONG, Reason.RESULT_TOO_LARGE):
            return
        if record.value is None:
            expected: set[Reason | None] = {Reason.TOMBSTONE_WITHOUT_KEY if record.key is None else None}
        else:
            expected, _ = verdict(record.value)
        if rejected.reason not in expected:
            raise Failure(record, f"{rejected}, and should be {expected}")

    def _check_outgoing(self, record: Fuzzed, outgoing: Outgoing) -> None:
        headers = list(outgoing.headers)
        if outgoing.key != record.key:
            raise Failure(record, "another key")
        if outgoing.kind is Kind.DEAD_LETTER:
            assert outgoing.rejected is not None
            self.answered[outgoing.rejected.reason.value] += 1
            ours = {name: (value or b"").decode() for name, value in headers[-10:]}
            if outgoing.value != record.value or not _VALID_LETTER.is_valid(ours):
                raise Failure(record, f"a dead letter that is none: {ours}")
            stripped = "inferstream.stripped.value_bytes"
            kept = [header for header in record.headers if header[0] not in ours and header[0] != stripped]
        else:
            self.answered[outgoing.kind.value] += 1
            kept = [header for header in record.headers if not header[0].startswith(HEADER_PREFIX)]
            if headers.pop() != SCHEMA_HEADER:
                raise Failure(record, "no schema header")
            headers += [("", None)] * 10
            if outgoing.kind is Kind.RESULT:
                self._check_result(record, outgoing.value or b"")
            elif outgoing.value is not None or record.value is not None:
                raise Failure(record, "a tombstone with a value")
        if headers[:-10] != kept:
            raise Failure(record, f"headers {headers}")

    def _check_result(self, record: Fuzzed, value: bytes) -> None:
        body = orjson.loads(value)
        if not _VALID_RESULT.is_valid(body) or b'"embedding":null' in value:
            raise Failure(record, f"a result that is none: {value!r}")
        source = body["source"]
        if (source["offset"], source["timestamp_ms"]) != (record.offset, record.timestamp):
            raise Failure(record, f"a result of another record: {source}")
        if self.usual:
            tree = orjson.loads(record.value or b"")
            if ("metadata" in tree) != ("metadata" in body) or tree.get("metadata") != body.get("metadata"):
                raise Failure(record, "other metadata")

    def _check_batch(self, answers: Sequence[tuple[Fuzzed, Outgoing]]) -> None:
        """What the sink does with the answers; and what a reader then finds."""
        builder = BatchBuilder(1 << 26, 0, is_transactional=False)
        for record, outgoing in answers:
            taken = builder.append(
                timestamp=1_764_000_000_000,
                key=outgoing.key,
                value=outgoing.value,
                headers=list(outgoing.headers),
            )
            if taken is None or taken.size > outgoing.size:
                raise Failure(record, f"{taken and taken.size} bytes, counted as {outgoing.size}")
        builder.close()
        read = MemoryRecords(bytes(builder._build())).next_batch()
        for (record, outgoing), found in zip(answers, read or (), strict=True):
            if (found.key, found.value, list(found.headers)) != (
                outgoing.key,
                outgoing.value,
                list(outgoing.headers),
            ):
                raise Failure(record, f"read back as {found}")


def routes() -> list[Route]:
    """The usual settings most of the time, and each other one now and then."""
    usual = [Route(), Route(Codec(encoding="base64-f32"))]
    return [
        *usual,
        Route(max_length=16, long_documents="chunk"),
        *usual,
        Route(max_length=16, long_documents="reject"),
        Route(Codec(encoding="base64-f16", result_limit=420, compression="zstd")),
        *usual,
        Route(Codec(format="text"), plain=True, usual=False),
        Route(Codec(tombstones="dead-letter", result_limit=300, compression="none"), usual=False),
        Route(
            Codec(id_field="/a~1b/m~0n", text_field="/body/parts/0/text", metadata_field=""),
            usual=False,
        ),
    ]


def run(records: int, seed: int) -> Counter[str]:
    """Answer so many records; how many outcomes there were of each kind or reason.  Raises Failure."""
    ways = routes()
    mutator, answered = Mutator(seed), Counter[str]()
    with deep_recursion():
        for number, start in enumerate(range(0, records, CHUNK)):
            offsets = range(start, min(start + CHUNK, records))
            ways[number % len(ways)].take([mutator.record(offset) for offset in offsets])
    for way in {id(way): way for way in ways}.values():
        answered += way.answered
    return answered


@contextlib.contextmanager
def deep_recursion() -> Iterator[None]:
    """Python's ``json`` recurses, and its usual limit is below the 1,024 levels that are allowed."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 10 * DEEPEST_JSON))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument(
        "--seed", type=int, default=None, help="default: another one each time; it is printed"
    )
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    again = f"python -m tests.fuzz --records {options.records} --seed {seed}"
    print(f"seed {seed}", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        answered = run(options.records, seed)
    except Failure as failure:
        print(f"{failure}\nagain: {again}", file=sys.stderr)
        return 1
    took = time.monotonic() - started
    for name, count in answered.most_common():
        print(f"{name:24}{count:>10,}")
    total = sum(answered.values())
    print(f"{total:,} of {options.records:,} records answered in {took:.0f} s, none raised ({again})")
    return 0 if total == options.records else 1


if __name__ == "__main__":
    sys.exit(main())
