"""Publish documents: JSON lines, lines of text, files of a folder or stdin, each as one record.

    reader thread        reads what is there, cuts lines, builds the records, refuses what the schema refuses
      │  chunks          a queue of a few: a slow broker stops the reading, and a slow stdin is sent on at once
    event loop           sends with a bounded number of bytes and records unacknowledged, counts the answers

Memory is bounded by constants here plus the largest single document, whatever the size of a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.codec import has_zstd, zstd_encode
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import murmur2

from inferstream.codec import BATCH_HEADER_BYTES, Codec, pointer_parts, resolve
from inferstream.documents import Headers, Kind, Outgoing, Reason, Rejected
from inferstream.errors import Incomplete, KafkaRefused, SettingsError
from inferstream.kafka.connection import TopicFacts, client_options, start_with_retry, topic_facts

if TYPE_CHECKING:
    from inferstream.settings import Settings

READ_BYTES = 256 * 1024
CHUNKS_AHEAD = 4
MAX_RECORD_BYTES = 64 << 20  # a longer line or file is refused unread: no topic takes it
MAX_UNACKNOWLEDGED = 20_000
MAX_UNACKNOWLEDGED_BYTES = 32 << 20
LARGEST_BATCH = 256 * 1024
SMALLEST_BATCH = 16 * 1024
NO_LIMIT = 1 << 30
SHOWN_PROBLEMS = 10
STALL_STEP_S = (
    0.2  # the stall is put off in steps: once per acknowledgement would cost as much as the sending
)
STOP_TIMEOUT_S = 5.0
STDIN = "-"
TOO_LARGE = "too_large"  # refused here for the topic's limit, not by the schema
NOT_ACCEPTED = "not_accepted"  # refused by the brokers, or not acknowledged in time
UNREADABLE = "unreadable"
INVALID_KEY = "invalid_key"


Format = Literal[
    "auto", "jsonl", "text", "files"
]  # a JSON document per line, a text per line, a text per file
IdFrom = Literal["path", "line", "none"]  # where the id of a document that has none comes from


@dataclass(frozen=True, slots=True)
class Options:
    """What to publish and how.  ``id_from`` of None: by path for texts and files, not at all for JSON lines."""

    sources: tuple[str, ...]
    topic: str
    format: Format = "auto"
    key_field: str | None = None
    id_from: IdFrom | None = None
    raw: bool = False


@dataclass(slots=True)
class Counts:
    """How far it is; ``reasons`` and ``problems`` (the first few) say why documents failed."""

    total_bytes: int | None = None
    read_bytes: int = 0
    accepted: int = 0
    refused: int = 0
    lost: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Refused here, plus what the brokers did not accept."""
        return self.refused + self.lost

    def refuse(self, bad: Bad) -> None:
        self.refused += 1
        self._note(bad)

    def lose(self, where: str, message: str) -> None:
        self.lost += 1
        self._note(Bad(where, NOT_ACCEPTED, message))

    def _note(self, bad: Bad) -> None:
        self.reasons[bad.reason] += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append(f"{bad.where}: {bad.reason}: {bad.message}")


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


async def publish(settings: Settings, options: Options, counts: Counts) -> None:
    """Send every document of the sources and wait for the acknowledgements; ``counts`` is kept up to date.

    Raises SettingsError for sources and options that cannot work, KafkaRefused for a missing topic, missing
    rights or brokers that do not answer.  Documents that fail are in ``counts``.
    """
    reader = Reader(settings, options)
    counts.total_bytes = reader.total_bytes()
    facts = await _facts(settings, options.topic)
    reader.limit = facts.max_message_bytes
    reader.needs_key = facts.cleanup_policy is not None and "compact" in facts.cleanup_policy
    outbox = Outbox(settings, options.topic, facts, counts)
    stall_s = settings.kafka.connect_timeout_s
    stall = asyncio.timeout(None)
    try:
        await outbox.start()
        async with stall:
            outbox.watch(stall, stall_s)
            async for chunk in in_thread(reader.chunks()):
                for item in chunk.items:
                    if isinstance(item, Bad):
                        counts.refuse(item)
                    else:
                        await outbox.send(item)
                counts.read_bytes += chunk.bytes
            await outbox.drain()
    except TimeoutError:
        if not stall.expired():
            raise
        outbox.give_up()
        raise Incomplete(
            f"the brokers acknowledged nothing for {stall_s:g} s (kafka.connect_timeout_s): given up"
        ) from None
    finally:
        await outbox.stop()


async def _facts(settings: Settings, topic: str) -> TopicFacts:
    kafka = settings.kafka
    found: dict[str, TopicFacts] = {}

    async def look() -> None:
        found.update(await topic_facts(kafka, [topic]))

    await start_with_retry(kafka, look, kafka.connect_timeout_s)
    if topic not in found:
        raise KafkaRefused(
            f"topic {topic} does not exist on {','.join(kafka.bootstrap_servers)}: create it with "
            f"`inferstream topics create {topic}`"
        )
    return found[topic]


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


# ---- reading


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
            if source != STDIN and not Path(source).exists():
                raise SettingsError(f"{source}: no such file or folder")
        if options.sources.count(STDIN) > 1:
            raise SettingsError("- (stdin) can be given once")
        if options.format == "files" and options.id_from == "line":
            raise SettingsError("--id-from line: a file is one document; use path or none")
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


# ---- sending


class Outbox:
    """Sends records with a bounded number unacknowledged, and survives the refusal of one.

    After a refused batch every later one of its partition is refused as out of sequence.  So the producer is
    replaced then, and what was not acknowledged is sent again one by one, in order: what is refused alone is
    lost and counted, the rest arrives.
    """

    def __init__(self, settings: Settings, topic: str, facts: TopicFacts, counts: Counts) -> None:
        self._kafka = settings.kafka
        self._topic = topic
        self._partitions = facts.partitions
        self._counts = counts
        share = MAX_UNACKNOWLEDGED_BYTES // (2 * facts.partitions)
        limit = facts.max_message_bytes or LARGEST_BATCH
        self._batch_bytes = min(limit, max(SMALLEST_BATCH, min(LARGEST_BATCH, share)))
        self._stall: asyncio.Timeout | None = None
        self._stall_s = 0.0
        self._producer: AIOKafkaProducer | None = None
        self._waiting: dict[int, tuple[Good, int]] = {}  # number → record and partition, unacknowledged
        self._failed: dict[int, BaseException] = {}
        self._bytes = 0
        self._number = 0
        self._next_partition = 0
        self._moved = asyncio.Event()

    async def start(self) -> None:
        producer = AIOKafkaProducer(
            **client_options(self._kafka),
            enable_idempotence=True,
            acks="all",
            compression_type="zstd" if has_zstd() else None,
            max_batch_size=self._batch_bytes,
            max_request_size=NO_LIMIT,  # the size was checked against the topic's own limit
            linger_ms=5,
        )
        self._producer = producer

        async def start() -> None:
            await producer.start()
            await producer.partitions_for(self._topic)  # else the first send would wait for it

        await start_with_retry(self._kafka, start, self._kafka.connect_timeout_s)

    def watch(self, stall: asyncio.Timeout, stall_s: float) -> None:
        """Let ``stall`` expire once something is unacknowledged and nothing has moved for ``stall_s``."""
        self._stall, self._stall_s = stall, stall_s

    def give_up(self) -> None:
        """Count what is unacknowledged as lost."""
        for record, _ in self._waiting.values():
            self._counts.lose(record.where, "not acknowledged in time; it may or may not have arrived")
        self._waiting.clear()

    async def send(self, record: Good) -> None:
        """Hand the record over, after waiting for room."""
        while self._failed or self._is_full(len(record.value)):
            await self._progress()
        if record.key is not None:
            partition = (murmur2(record.key) & 0x7FFFFFFF) % self._partitions
        else:
            partition = self._next_partition
            self._next_partition = (partition + 1) % self._partitions
        number = self._number
        self._number += 1
        self._waiting[number] = record, partition
        if len(self._waiting) == 1:
            self._moves()
        self._bytes += len(record.value)
        try:
            future = await self._handed_over(record, partition)
        except KafkaError as error:
            self._failed[number] = error
            return
        future.add_done_callback(functools.partial(self._acknowledged, number))

    async def drain(self) -> None:
        """Wait until every record is acknowledged or lost."""
        while self._waiting:
            await self._progress()

    async def stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(TimeoutError, KafkaError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await producer.stop()

    async def _handed_over(self, record: Good, partition: int) -> asyncio.Future[Any]:
        assert self._producer is not None
        future: asyncio.Future[Any] = await self._producer.send(
            self._topic, record.value, key=record.key, partition=partition
        )
        return future

    def _acknowledged(self, number: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if number not in self._waiting:
            return
        if error is None:
            self._settle(number)
            self._counts.accepted += 1
        else:
            self._failed[number] = error
        self._moved.set()

    def _settle(self, number: int) -> None:
        record, _ = self._waiting.pop(number)
        self._bytes -= len(record.value)
        self._moves()

    def _moves(self) -> None:
        """Put the stall off; without anything to wait for there is none."""
        if self._stall is None:
            return
        if not self._waiting:
            self._stall.reschedule(None)
            return
        when, wanted = self._stall.when(), asyncio.get_running_loop().time() + self._stall_s
        if when is None or wanted - when > STALL_STEP_S:
            self._stall.reschedule(wanted)

    def _is_full(self, size: int) -> bool:
        if len(self._waiting) >= MAX_UNACKNOWLEDGED:
            return True
        return bool(self._waiting) and self._bytes + size > MAX_UNACKNOWLEDGED_BYTES

    async def _progress(self) -> None:
        """Until an answer comes; what was refused is seen to."""
        if self._failed:
            await self._recover()
            return
        self._moved.clear()
        await self._moved.wait()

    async def _recover(self) -> None:
        """Take a new producer and send what is left one by one."""
        self._refused_for_good(self._failed.values())
        while len(self._failed) < len(self._waiting):  # healthy partitions are still answering
            self._moved.clear()
            await self._moved.wait()
        await self._replace_producer()
        self._failed.clear()
        for number in sorted(self._waiting):
            record, partition = self._waiting[number]
            try:
                await (await self._handed_over(record, partition))
            except KafkaError as error:
                self._refused_for_good([error])
                self._counts.lose(record.where, " ".join(str(error).split()) or type(error).__name__)
                await self._replace_producer()
            else:
                self._counts.accepted += 1
            self._settle(number)

    async def _replace_producer(self) -> None:
        await self.stop()
        await self.start()

    def _refused_for_good(self, errors: Iterable[BaseException]) -> None:
        for error in errors:
            if isinstance(error, TopicAuthorizationFailedError):
                raise KafkaRefused(f"topic {self._topic}: no right to write to it (ACL: Write)")
            if isinstance(error, ClusterAuthorizationFailedError):
                raise KafkaRefused("no right to produce idempotently (ACL: IdempotentWrite on the cluster)")
