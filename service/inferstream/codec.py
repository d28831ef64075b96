"""Bytes in, documents out; results in, bytes out: the contract, held to the published files in schemas/.

Every method is called from several worker threads at once, for every document, so the common path is short:
one parse, one projection, one compiled validation (0.2 µs), one serialisation.  The validator is compiled
from the file that is published; nothing is checked by hand that the schema can say.

No message made here holds any text of the document: they name fields, types, sizes and positions only.
"""

from __future__ import annotations

import binascii
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import jsonschema_rs
import numpy as np
import orjson

from inferstream.documents import Document, Headers, Kind, Outgoing, Prepared, Reason, Record, Rejected, Stage
from inferstream.errors import SettingsError
from inferstream.tasks import ModelInfo
from inferstream.version import version

if TYPE_CHECKING:
    from inferstream.settings import Settings

HEADER_PREFIX = "inferstream."
SCHEMA_HEADER = ("inferstream.schema", b"result/1")
STRIPPED_HEADER = "inferstream.stripped.value_bytes"
ID_HEADER = "inferstream.id"
REPLAYS_HEADER = "inferstream.replays"
MAX_ID_BYTES = 1024
MAX_MESSAGE_BYTES = 1024
INEXACT_FLOAT = 2.0**53  # from here on a double stands for several integers
BATCH_HEADER_BYTES = 61  # a v2 record batch; the broker's limit is on the batch

FLOAT32, FLOAT16 = np.dtype("<f4"), np.dtype("<f2")
MAX_FLOAT16 = 65504.0

_ABSENT: Any = object()
_NO_HEADERS: Headers = (SCHEMA_HEADER,)

Compression = Literal["none", "gzip", "snappy", "lz4", "zstd"]


def schema(name: str) -> dict[str, Any]:
    """A published schema, such as ``document.v1``, from the installed package or from the checkout."""
    here = Path(__file__)
    for folder in (here.parent / "schemas", here.parents[2] / "schemas"):
        path = folder / f"{name}.json"
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
    raise FileNotFoundError(f"the schema {name}.json is not part of this installation of inferstream")


@functools.cache
def pointer_parts(setting: str, pointer: str) -> tuple[str, ...]:
    """Split a JSON Pointer (RFC 6901); the empty pointer, which is the whole value, has no parts.

    Raises SettingsError, naming the setting, for what is not a pointer.
    """
    if not pointer:
        return ()
    if not pointer.startswith("/"):
        raise SettingsError(
            f"{setting}: {pointer!r} is not a JSON Pointer: it has to start with '/', as in '/text'"
        )
    if "~" in pointer.replace("~0", "").replace("~1", ""):
        raise SettingsError(
            f"{setting}: {pointer!r} is not a JSON Pointer: write '~' as '~0' and '/' as '~1'"
        )
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in pointer[1:].split("/"))


def resolve(value: Any, parts: tuple[str, ...], default: Any = None) -> Any:
    """What the pointer's parts lead to in a parsed JSON value, or ``default``."""
    for part in parts:
        if type(value) is dict:
            value = value.get(part, _ABSENT)
            if value is _ABSENT:
                return default
        elif type(value) is list:
            # RFC 6901: no leading zero, no sign; "-" is the element after the last, which never exists.
            if not (part.isascii() and part.isdigit()) or (part[0] == "0" and part != "0"):
                return default
            if len(part) > 18 or (index := int(part)) >= len(value):
                return default
            value = value[index]
        else:
            return default
    return value


class Codec:
    """Decodes records and encodes what is sent; one per worker, shared by its threads.

    ``id_field`` … ``metadata_field`` are JSON Pointers, applied before the schema (``format`` ``json`` only).
    ``result_limit`` is the output topic's ``max.message.bytes``; None where it is unknown.  ``compression``
    is the producer's: the limit is on what is sent, so a result that only fits compressed is still a result.
    """

    def __init__(
        self,
        *,
        format: Literal["json", "text"] = "json",
        id_field: str = "/id",
        text_field: str = "/text",
        text_pair_field: str = "/text_pair",
        metadata_field: str = "/metadata",
        tombstones: Literal["forward", "dead-letter"] = "forward",
        encoding: Literal["json", "base64-f32", "base64-f16"] = "json",
        group_id: str = "inferstream",
        result_limit: int | None = None,
        compression: Compression | None = "zstd",
    ) -> None:
        self._is_valid = jsonschema_rs.validator_for(schema("document.v1")).is_valid
        self._plain_text = format == "text"
        self._pointers = {
            "id": id_field,
            "text": text_field,
            "text_pair": text_pair_field,
            "metadata": metadata_field,
        }
        parts = {
            field: pointer_parts(f"input.{field}_field", pointer) for field, pointer in self._pointers.items()
        }
        self._parts = parts
        # The usual pointers have one part each: four look-ups in one dictionary.
        self._names: tuple[str, str, str, str] | None = None
        if all(len(each) == 1 for each in parts.values()):
            self._names = parts["id"][0], parts["text"][0], parts["text_pair"][0], parts["metadata"][0]
        self._forward_tombstones = tombstones == "forward"
        self._encoding = encoding
        self._result_limit = result_limit
        self._compression = compression or "none"
        self._compress = _compressor(self._compression)
        self._model: tuple[ModelInfo | None, orjson.Fragment] = (None, orjson.Fragment(b"{}"))
        self._worker_headers = (
            ("inferstream.version", version().encode()),
            ("inferstream.group_id", group_id.encode()),
        )

    @classmethod
    def from_settings(cls, settings: Settings, *, result_limit: int | None = None) -> Self:
        """The codec of a worker with these settings."""
        return cls(
            format=settings.input.format,
            id_field=settings.input.id_field,
            text_field=settings.input.text_field,
            text_pair_field=settings.input.text_pair_field,
            metadata_field=settings.input.metadata_field,
            tombstones=settings.input.tombstones,
            encoding=settings.output.encoding,
            group_id=settings.kafka.group_id,
            result_limit=result_limit,
            compression=settings.output.compression,
        )

    def decode(self, record: Record) -> Document | Rejected | Outgoing:
        """The record's document; why it has none; or, for a tombstone that is passed on, what to send.

        A document's metadata is kept as JSON text (``orjson.Fragment``): it is only ever copied, takes less
        memory than the parsed tree, and what cannot be written again is found out here, before the model.
        """
        value = record.value
        if value is None:
            return self._tombstone(record)
        document: dict[str, Any]
        metadata = _ABSENT
        if self._plain_text:
            try:
                document = {"text": value.decode()}
            except UnicodeDecodeError as error:
                return _not_utf8(error)
            doc_id = None
        else:
            try:
                tree = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                return _unreadable(value, error)
            if type(tree) is not dict:
                return Rejected(
                    Reason.NOT_AN_OBJECT, f"the value is {_kind(tree)}; it must be a JSON object with a text"
                )
            names = self._names
            if names is not None:
                get = tree.get
                doc_id = get(names[0])
                document = {"id": doc_id, "text": get(names[1]), "text_pair": get(names[2])}
                metadata = get(names[3], _ABSENT)
            else:
                parts = self._parts
                doc_id = resolve(tree, parts["id"])
                document = {
                    "id": doc_id,
                    "text": resolve(tree, parts["text"]),
                    "text_pair": resolve(tree, parts["text_pair"]),
                }
                metadata = resolve(tree, parts["metadata"], _ABSENT)
        if not self._is_valid(document):
            return self._refuse(document)
        if doc_id is None:
            doc_id = _first_id(record) or f"{record.topic}:{record.partition}:{record.offset}"
        elif type(doc_id) is str:
            if len(doc_id) > MAX_ID_BYTES // 4 and len(doc_id.encode()) > MAX_ID_BYTES:
                return self._refuse_id(doc_id)
        else:
            if type(doc_id) is float and abs(doc_id) >= INEXACT_FLOAT:
                return self._refuse_id(doc_id)  # it would come back as another number than it went in
            doc_id = str(int(doc_id))
        if metadata is _ABSENT:
            return Document(doc_id, document["text"], document.get("text_pair"))
        try:
            fragment = orjson.Fragment(orjson.dumps(metadata))
        except TypeError:
            return Rejected(
                Reason.INVALID_FIELD,
                f"{self._pointers['metadata']} is nested too deep; at most 250 levels are copied",
            )
        return Document(doc_id, document["text"], document["text_pair"], fragment, True)

    def result(
        self, record: Record, prepared: Prepared, task_name: str, model: ModelInfo, output: dict[str, Any]
    ) -> Outgoing | Rejected:
        """The result record, or RESULT_TOO_LARGE if the output topic would not take it even compressed.

        ``output`` holds JSON types and contiguous numpy arrays.
        """
        known, fragment = self._model
        if known is not model:
            fragment = orjson.Fragment(
                orjson.dumps({"id": model.id, "revision": model.revision, "dtype": model.dtype})
            )
            self._model = (model, fragment)  # one assignment: another thread sees the old pair or the new
        document = prepared.document
        body: dict[str, Any] = {
            "id": document.id,
            "task": task_name,
            "model": fragment,
            "output": output,
            "usage": {
                "tokens": sum(prepared.lengths),
                "truncated": prepared.truncated,
                "chunks": len(prepared.chunks),
            },
            "source": {
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
                "timestamp_ms": record.timestamp,
            },
        }
        if document.has_metadata:
            body["metadata"] = document.metadata
        value = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        outgoing = Outgoing(Kind.RESULT, record.key, value, _copied(record.headers))
        limit = self._result_limit
        if limit is not None and outgoing.size + BATCH_HEADER_BYTES > limit:
            return self._if_it_fits(outgoing, limit)
        return outgoing

    def embedding(self, vector: np.ndarray) -> dict[str, Any]:
        """The embed task's output in the configured encoding, for a finite vector of shape [dimensions].

        Raises ValueError for a number that ``base64-f16`` cannot hold.
        """
        vector = np.ascontiguousarray(vector, dtype=FLOAT32)
        if self._encoding == "json":
            return {"embedding": vector, "dimensions": len(vector)}
        if self._encoding == "base64-f16":
            vector = _halved(vector)
        text = binascii.b2a_base64(vector.data, newline=False).decode()
        return {"embedding_base64": text, "encoding": self._encoding, "dimensions": len(vector)}

    def dead_letter(self, record: Record, rejected: Rejected) -> Outgoing:
        """The record as it came, with the reason in headers; those of an earlier pass are replaced.

        What a replay has put there stays: the first id, and how often the document was replayed.
        """
        added = (
            ("inferstream.error.reason", rejected.reason.value.encode()),
            ("inferstream.error.message", _one_line(rejected.message)),
            ("inferstream.error.stage", rejected.stage.value.encode()),
            ("inferstream.error.attempts", b"%d" % rejected.attempts),
            ("inferstream.source.topic", record.topic.encode()),
            ("inferstream.source.partition", b"%d" % record.partition),
            ("inferstream.source.offset", b"%d" % record.offset),
            ("inferstream.source.timestamp_ms", b"%d" % record.timestamp),
            *self._worker_headers,
        )
        replaced = {STRIPPED_HEADER, *(name for name, _ in added)}
        kept = tuple(header for header in record.headers if header[0] not in replaced)
        return Outgoing(Kind.DEAD_LETTER, record.key, record.value, kept + added, rejected)

    def stripped(self, dead_letter: Outgoing) -> Outgoing:
        """The dead letter without its value, whose size in bytes is put into a header."""
        size = (STRIPPED_HEADER, b"%d" % len(dead_letter.value or b""))
        return replace(dead_letter, value=None, headers=(*dead_letter.headers, size))

    def _tombstone(self, record: Record) -> Outgoing | Rejected:
        if record.key is None:
            return Rejected(
                Reason.TOMBSTONE_WITHOUT_KEY, "the value is null and there is no key, so it deletes nothing"
            )
        if not self._forward_tombstones:
            return Rejected(Reason.MISSING_TEXT, "the value is null, and input.tombstones is dead-letter")
        return Outgoing(Kind.TOMBSTONE, record.key, None, _copied(record.headers))

    def _refuse(self, document: dict[str, Any]) -> Rejected:
        """Say which field of an invalid document is at fault: the text first, then the id."""
        text, doc_id = document["text"], document.get("id")
        where = self._pointers["text"] if not self._plain_text else "the value"
        if text is None:
            return Rejected(Reason.MISSING_TEXT, f"there is no text at {where}, or it is null")
        if not self._is_valid({"text": text}):
            if type(text) is str:
                problem = (
                    f"{where} is {'empty' if not text else 'only white space'}; there is nothing to read"
                )
            else:
                problem = f"{where} is {_kind(text)}; it must be a string"
            return Rejected(Reason.INVALID_TEXT, problem)
        if not self._is_valid({"text": text, "id": doc_id}):
            return self._refuse_id(doc_id)
        pair = document["text_pair"]
        return Rejected(
            Reason.INVALID_FIELD, f"{self._pointers['text_pair']} is {_kind(pair)}; it must be a string"
        )

    def _refuse_id(self, doc_id: Any) -> Rejected:
        size = f" of {len(doc_id.encode()):,} bytes" if type(doc_id) is str else ""
        return Rejected(
            Reason.INVALID_ID,
            f"{self._pointers['id']} is {_kind(doc_id)}{size}; it must be a string of at most "
            f"{MAX_ID_BYTES:,} bytes or an integer of at most 64 bits",
        )

    def _if_it_fits(self, outgoing: Outgoing, limit: int) -> Outgoing | Rejected:
        """The result if it fits the limit compressed; keys and headers are counted as they are."""
        value = outgoing.value or b""
        rest = outgoing.size - len(value) + BATCH_HEADER_BYTES
        sizes = f"the result takes {rest + len(value):,} bytes"
        if self._compress is not None:
            compressed = rest + len(self._compress(value))
            if compressed <= limit:
                return outgoing
            sizes += f", {compressed:,} compressed with {self._compression}"
        remedy = "raise max.message.bytes of the output topic"
        if self._encoding == "json":
            remedy += " or set output.encoding to base64-f32 or base64-f16"
        elif self._encoding == "base64-f32":
            remedy += " or set output.encoding to base64-f16"
        return Rejected(
            Reason.RESULT_TOO_LARGE,
            f"{sizes}, and the output topic takes {limit:,}: {remedy}, or send less metadata",
            Stage.FINISH,
        )


def _halved(vector: np.ndarray) -> np.ndarray:
    """A finite float32 vector in float16, rounded to nearest even; ValueError where that is infinite."""
    # No number is larger than the vector is long, and almost all vectors are of length 1.
    if vector.dot(vector) < MAX_FLOAT16**2:
        return vector.astype(FLOAT16)
    with np.errstate(over="ignore"):
        half = vector.astype(FLOAT16)
    if not np.isfinite(half).all():
        raise ValueError("the vector has numbers beyond 65,504, which base64-f16 cannot hold")
    return half


def _first_id(record: Record) -> str | None:
    """The id that a replayed document without one had when it was first read; None for any other."""
    for name, value in record.headers:
        if name == ID_HEADER and value and len(value) <= MAX_ID_BYTES:
            try:
                return value.decode()
            except UnicodeDecodeError:
                return None  # somebody else's header
    return None


def _copied(headers: Headers) -> Headers:
    """The input's headers as a result has them: ours left out, the result's schema added."""
    if not headers:
        return _NO_HEADERS
    return (*(header for header in headers if not header[0].startswith(HEADER_PREFIX)), SCHEMA_HEADER)


def _not_utf8(error: UnicodeDecodeError) -> Rejected:
    return Rejected(Reason.INVALID_UTF8, f"the value is not UTF-8: {error.reason} at byte {error.start:,}")


def _unreadable(value: bytes, error: orjson.JSONDecodeError) -> Rejected:
    """Tell bytes that are no text from text that is no JSON.  Only msg is used: the error holds the text."""
    try:
        value.decode()
    except UnicodeDecodeError as not_text:
        return _not_utf8(not_text)
    return Rejected(Reason.INVALID_JSON, f"the value is not JSON: {error.msg} at character {error.pos:,}")


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words and without its content."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float):
        return "a number that is no exact integer"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _one_line(message: str) -> bytes:
    """At most 1 kB of UTF-8 on one line; never empty."""
    line = " ".join(message.split()) or "no further information"
    encoded = line.encode(errors="replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return encoded
    return encoded[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore").encode() + "…".encode()


def _compressor(compression: Compression) -> Callable[[bytes], bytes] | None:
    """The very functions the producer compresses its batches with."""
    if compression == "none":
        return None
    from aiokafka import codec  # only where it is needed: the codec knows nothing else of the client

    encoders: dict[str, Callable[[bytes], bytes]] = {
        "gzip": codec.gzip_encode,
        "snappy": codec.snappy_encode,
        "lz4": codec.lz4_encode,
        "zstd": codec.zstd_encode,
    }
    return encoders[compression]
