"""The reading part of ``publish``: from lines, files and stdin to records, refused here where a worker would.

It knows the codec and what the topic takes, and nothing of brokers.  What one read gave comes out as one chunk,
so a slow stdin holds nothing back, and a line or file longer than any topic takes is never held whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson
from aiokafka.codec import has_zstd, zstd_encode

from inferstream.codec import BATCH_HEADER_BYTES, Codec, pointer_parts, resolve
from inferstream.documents import Headers, Kind, Outgoing, Reason, Rejected
from inferstream.errors import SettingsError

if TYPE_CHECKING:
    from inferstream.settings import Settings
    from inferstream.tools.publish import Options

READ_BYTES = 256 * 1024
CHUNKS_AHEAD = 4
MAX_RECORD_BYTES = 64 << 20  # a longer line or file is refused unread: no topic takes it
STDIN = "-"
TOO_LARGE = "too_large"  # refused here for the topic's limit, not by the schema
UNREADABLE = "unreadable"
INVALID_KEY = "invalid_key"


Format = Literal[
    "auto", "jsonl", "text", "files"
]  # a JSON document per line, a text per line, a text per file
IdFrom = Literal["path", "line", "none"]  # where the id of a document that has none comes from


@dataclass(frozen=True, slots=True)
class Good:
    """A record to send; ``where`` names the line or file it comes from."""

    where: str
    key: bytes | None
    value: bytes


@dataclass(frozen=True, slots=True)
class Bad:
    """A document that is not sent."""

    where: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one read gave, and how many bytes of the sources that were."""

    items: list[Good | Bad]
    bytes: int


async def in_thread(chunks: Iterator[Chunk]) -> AsyncIterator[Chunk]:
    """Iterate in a daemon thread, at most CHUNKS_AHEAD ahead: a stdin that blocks holds up neither the event
    loop nor the exit."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
    room = threading.Semaphore(CHUNKS_AHEAD)

    def put(item: Chunk | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the need
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> None:
        try:
            for chunk in chunks:
                room.acquire()
                put(chunk)
        except Exception as error:
            put(error)
        else:
            put(None)

    threading.Thread(target=work, name="read-sources", daemon=True).start()
    while (item := await queue.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item
        room.release()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A record as the codec reads one."""

    topic: str
    value: bytes
    key: bytes | None = None
    partition: int = 0
    offset: int = 0
    timestamp: int = 0
    headers: Headers = ()


class Reader:
    """Turns sources into records.  ``limit`` (bytes, None if unknown) and ``needs_key`` are the topic's."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self._options = options
        self._plain = settings.input.format == "text"
        self._codec = Codec.from_settings(settings)
        self._id = pointer_parts("input.id_field", settings.input.id_field)
        self._text = pointer_parts("input.text_field", settings.input.text_field)
        self._key = (
            None if options.key_field is None else pointer_parts("--key-field", _pointer(options.key_field))
        )
        self.limit: int | None = None
        self.needs_key = False
        for source in options.sources:
            if not source:  # would be the current folder
                raise SettingsError("nothing to publish: a name is empty (an unset variable?)")
            if source != STDIN and not Path(source).exists():
                raise SettingsError(f"{source}: no such file or folder")
        if options.sources.count(STDIN) > 1:
            raise SettingsError("- (stdin) can be given once")
        if options.format == "files" and options.id_from == "line":
            raise SettingsError("--id-from line: a file is one document; use path or none")
        if options.id_from is not None and (options.raw or (self._plain and options.id_from != "none")):
            why = "with --raw" if options.raw else "with input.format=text"
            raise SettingsError(f"--id-from: {why} nothing is added to a record")
        if self._plain and not options.raw and self._key is not None:
            raise SettingsError("--key-field: with input.format=text a record has no fields")

    def total_bytes(self) -> int | None:
        """The size of all sources, None when stdin or a pipe is among them."""
        total = 0
        for source in self._options.sources:
            path = Path(source)
            if source == STDIN or not (path.is_file() or path.is_dir()):
                return None
            total += sum(_size(file) for file in _files(path)) if path.is_dir() else _size(path)
        return total

    def chunks(self) -> Iterator[Chunk]:
        """The records of all sources, in order."""
        for source in self._options.sources:
            if source == STDIN:
                yield from self._lines("stdin", 0)
            elif Path(source).is_dir():
                yield from self._folder(Path(source))
            else:
                yield from self._file(Path(source), source)

    def _folder(self, folder: Path) -> Iterator[Chunk]:
        whole = self._options.format in ("auto", "files")
        for path in _files(folder):
            if whole:
                yield self._whole(path, path.relative_to(folder).as_posix())
            else:
                yield from self._file(path, path.relative_to(folder).as_posix())

    def _file(self, path: Path, name: str) -> Iterator[Chunk]:
        if self._options.format == "files":
            yield self._whole(path, name)
            return
        try:
            number = os.open(path, os.O_RDONLY)
        except OSError as error:
            yield Chunk([Bad(name, UNREADABLE, error.strerror or str(error))], _size(path))
            return
        try:
            yield from self._lines(name, number)
        finally:
            os.close(number)

    def _whole(self, path: Path, name: str) -> Chunk:
        size = _size(path)
        if size > MAX_RECORD_BYTES:
            return Chunk([_oversized(name)], size)
        try:
            content = path.read_bytes()
        except OSError as error:
            return Chunk([Bad(name, UNREADABLE, error.strerror or str(error))], size)
        return Chunk([self._document(name, None, content, "files")], size)

    def _lines(self, name: str, number: int) -> Iterator[Chunk]:
        """A chunk for every read that ended a line.  Raw reads: they give what is there, and nothing is
        buffered that a thread could hold a lock on when the process ends."""
        form = self._options.format
        rest = bytearray()
        skipping = False  # inside a line that is too long
        line_number = pending = 0
        first = True
        while True:
            try:
                data = os.read(number, READ_BYTES)
            except OSError as error:
                yield Chunk([Bad(name, UNREADABLE, error.strerror or str(error))], pending)
                return
            pending += len(data)
            if data:
                rest += data
                end = rest.rfind(b"\n", len(rest) - len(data)) + 1
                if end == 0 and len(rest) <= MAX_RECORD_BYTES:
                    continue
                lines = bytes(rest[:end]).split(b"\n")[:-1]
                del rest[:end]
            else:
                lines = [bytes(rest)] if rest or skipping else []
                rest.clear()
            items: list[Good | Bad] = []
            for line in lines:
                line_number += 1
                if skipping:
                    skipping = False
                    continue
                if first and line.strip():
                    first = False
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    form = _format_of(form, name, line)
                line = line.removesuffix(b"\r")
                if line.strip():
                    items.append(self._document(name, line_number, line, form))
            if len(rest) > MAX_RECORD_BYTES:
                if not skipping:
                    items.append(_oversized(f"{name}:{line_number + 1}"))
                skipping = True
                rest.clear()
            if items or not data:
                yield Chunk(items, pending)
                pending = 0
            if not data:
                return

    def _document(self, name: str, line_number: int | None, content: bytes, form: Format) -> Good | Bad:
        where = name if line_number is None else f"{name}:{line_number}"
        value: bytes = content
        if not self._options.raw:
            built = self._built(where, name, line_number, content, form)
            if isinstance(built, Bad):
                return built
            value = built
        key: bytes | None = None
        if self._key is not None:
            found = _key_of(where, value, self._key, raw=self._options.raw)
            if isinstance(found, Bad):
                return found
            key = found
        if not self._options.raw:
            decoded = self._codec.decode(_Candidate(self._options.topic, value, key))
            if isinstance(decoded, Rejected):
                return Bad(where, decoded.reason.value, decoded.message)
        if self.needs_key and key is None:
            return Bad(
                where,
                INVALID_KEY,
                "the topic is compacted and takes no record without a key; use --key-field",
            )
        size = Outgoing(Kind.RESULT, key, value, ()).size + BATCH_HEADER_BYTES
        if self.limit is not None and size > self.limit:
            packed = size - len(value) + len(zstd_encode(value)) if has_zstd() else size
            if packed > self.limit:
                return Bad(
                    where, TOO_LARGE, f"takes {packed:,} bytes compressed, and the topic takes {self.limit:,}"
                )
        return Good(where, key, value)

    def _built(
        self, where: str, name: str, line_number: int | None, content: bytes, form: Format
    ) -> bytes | Bad:
        """The record's value: the line as it is, or a document made of a text."""
        by_default: IdFrom = "none" if form == "jsonl" else "path"
        id_from = self._options.id_from or by_default
        new_id = {
            "none": None,
            "path": where,
            "line": name if line_number is None else str(line_number),
        }[id_from]
        if form == "jsonl":
            if new_id is None or self._plain:
                return content
            try:
                tree = orjson.loads(content)
            except orjson.JSONDecodeError:
                return content  # the codec says what is wrong with it
            if not isinstance(tree, dict) or resolve(tree, self._id) is not None:
                return content
            return orjson.dumps(tree) if _put(tree, self._id, new_id) else content
        if self._plain:
            return content
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            return Bad(where, Reason.INVALID_UTF8.value, f"not UTF-8: {error.reason} at byte {error.start:,}")
        document: dict[str, Any] = {}
        if new_id is not None:
            _put(document, self._id, new_id)
        _put(document, self._text, text)
        return orjson.dumps(document)


def _pointer(field_name: str) -> str:
    """``id`` is as good as ``/id``."""
    return field_name if field_name.startswith("/") or not field_name else f"/{field_name}"


def _format_of(form: Format, name: str, first_line: bytes) -> Format:
    """JSON lines begin with an object; anything else is text."""
    if form != "auto":
        return form
    start = first_line.lstrip()[:1]
    if start == b"[" and first_line.rstrip()[-1:] in (b"[", b"{", b"]", b",", b"}"):
        raise SettingsError(
            f"{name} looks like one JSON array; one document per line is needed: jq -c '.[]' makes that, or say "
            "--format text"
        )
    return "jsonl" if start == b"{" else "text"


def _key_of(where: str, value: bytes, parts: tuple[str, ...], *, raw: bool) -> bytes | Bad | None:
    try:
        found = resolve(orjson.loads(value), parts)
    except orjson.JSONDecodeError:
        # Raw bytes without a key are what was asked for; of a document the codec says what is wrong.
        return None
    if found is None or isinstance(found, str):
        return found.encode() if found is not None else None
    if isinstance(found, int) and not isinstance(found, bool):
        return b"%d" % found
    if raw:
        return None
    return Bad(where, INVALID_KEY, "the key field is neither a string nor an integer")


def _put(tree: dict[str, Any], parts: tuple[str, ...], value: str) -> bool:
    """Set what the pointer's parts lead to; False where something else is in the way."""
    for part in parts[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            return False
        tree = inner
    tree[parts[-1]] = value
    return True


def _oversized(where: str) -> Bad:
    return Bad(where, TOO_LARGE, f"longer than {MAX_RECORD_BYTES >> 20} MiB")


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder in the order of their names, without hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
