"""``dead-letters replay``: letters back to where they came from, each once.

Page by page of a partition: read, choose, publish, wait for every acknowledgement, commit what was acknowledged.
Killed in the middle, at most the page that was on its way is replayed again.  What a filter leaves out stays for
a later call (:mod:`inferstream.tools.dead_letters_progress`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inferstream.documents import Kind, Outgoing
from inferstream.errors import KafkaRefused
from inferstream.settings.tree import topic_name
from inferstream.tools.dead_letters import Filter, Letter, replayed_headers, replayed_partition
from inferstream.tools.dead_letters_group import Holding, committed
from inferstream.tools.dead_letters_progress import MAX_METADATA, Progress
from inferstream.tools.dead_letters_reading import MAX_RECORDS, Page, Reader, facts, reading
from inferstream.tools.dead_letters_sending import Replay, Sender

if TYPE_CHECKING:
    from inferstream.kafka.connection import TopicFacts
    from inferstream.settings.tree import Kafka

SHOWN_PROBLEMS = 20
# What a page adds to the metadata is foreseen but for where exactly the brokers refuse records.
METADATA_RESERVE = 64


@dataclass(frozen=True, slots=True)
class Options:
    """What to replay from the dead-letter topic ``topic``, and where to: ``to``, or each letter's source topic.

    A letter that was replayed ``max_replays`` times is left.  ``max_letters`` and ``rate`` (letters a second) of
    None mean no bound.  ``dismiss`` publishes nothing: what is chosen only counts as done.
    """

    topic: str
    chosen: Filter
    to: str | None = None
    max_replays: int = 3
    max_letters: int | None = None
    rate: float | None = None
    dismiss: bool = False


@dataclass(slots=True)
class Tally:
    """How far it is.  ``done`` is by reason, ``left`` by why; ``problems`` are the first few, in words."""

    done: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    full: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.done.total()

    def fail(self, letter: Letter, why: str) -> None:
        self.failed += 1
        self._note(letter, why)

    def leave(self, letter: Letter, why: str, detail: str) -> None:
        self.left[why] += 1
        self._note(letter, detail)

    def _note(self, letter: Letter, why: str) -> None:
        if len(self.problems) < SHOWN_PROBLEMS:
            source = f" (from {letter.source})" if letter.source is not None else ""
            self.problems.append(f"{letter.place}{source}: {why}")


class Replayer:
    """One call of replay.  ``kafka.group_id`` is the replay's own group.

    ``stopping`` is looked at between pages: the page on its way is finished and committed.
    """

    def __init__(self, kafka: Kafka, options: Options, tally: Tally, stopping: asyncio.Event) -> None:
        self._kafka = kafka
        self._options = options
        self._tally = tally
        self._stopping = stopping
        self._facts: dict[str, TopicFacts] = {}
        self._missing: set[str] = set()
        self._progress: dict[int, Progress] = {}
        self._full: set[int] = set()
        self._due = 0.0
        self.working = False  # once it is, it is told to stop by ``stopping``; before, it may be cancelled

    async def dry_run(self, write: Callable[[Sequence[Letter]], None]) -> None:
        """Give ``write`` the letters that would be replayed; joins no group and changes nothing.

        Raises KafkaRefused and Incomplete as :meth:`replay` does.
        """
        async with reading(self._kafka, self._options.topic) as reader:
            await self._check_target()
            async for page in self._pages(reader):
                letters = (await self._chosen(page))[: self._room]
                write(letters)
                for letter in letters:
                    self._count(letter)
                if self._room == 0:
                    break

    async def replay(self) -> None:
        """Replay what is chosen; ``tally`` is kept up to date.

        Raises KafkaRefused for a missing topic or right, Incomplete if another process replays for this group or
        the brokers stop answering.  What was acknowledged until then is committed.
        """
        options = self._options
        async with reading(self._kafka, options.topic) as reader:
            await self._check_target()
            holding, sender = Holding(self._kafka, options.topic), Sender(self._kafka, self._facts)
            try:
                await holding.start()
                self.working = True
                async for page in self._pages(reader):
                    await self._replay_page(page, holding, sender)
                    if self._room == 0:
                        break
            finally:
                await sender.stop()
                await holding.stop()

    @property
    def _room(self) -> int | None:
        """How many letters may still be replayed; None for no bound."""
        most = self._options.max_letters
        return None if most is None else max(0, most - self._tally.total)

    async def _check_target(self) -> None:
        to = self._options.to
        if to is None:
            return
        await self._know({to})
        if to in self._missing:
            raise KafkaRefused(
                f"--to: topic {to} does not exist on {','.join(self._kafka.bootstrap_servers)}: create it with "
                f"`inferstream topics create {to}`"
            )

    async def _pages(self, reader: Reader) -> AsyncIterator[Page]:
        """The pages that may hold letters still to be done, partition by partition."""
        self._progress = await committed(self._kafka, self._options.topic, reader.partitions)
        starts = {partition: progress.watermark for partition, progress in self._progress.items()}
        rate = self._options.rate
        size = MAX_RECORDS if rate is None else max(1, min(MAX_RECORDS, int(rate)))
        for stretch in await reader.stretches(self._options.chosen, starts):
            progress = self._progress.setdefault(stretch.partition, Progress(stretch.first))
            if progress.watermark > stretch.end:
                raise KafkaRefused(
                    f"group {self._kafka.group_id} has committed offset {progress.watermark} of "
                    f"{self._options.topic}:{stretch.partition}, which ends at {stretch.end}: the topic was deleted "
                    "and made anew.  Delete the group (kafka-consumer-groups --delete --group "
                    f"{self._kafka.group_id}), and every letter counts as not replayed"
                )
            progress.mark(0, stretch.first)  # what retention has deleted
            async for page in reader.pages(stretch, size):
                if self._stopping.is_set():
                    return
                yield page
                if page.partition in self._full:
                    break

    async def _chosen(self, page: Page) -> list[Letter]:
        """The letters of the page to be replayed; the others that the filter wants are counted as what they are."""
        wanted = [letter for letter in page.letters if self._options.chosen.wants(letter)]
        if not self._options.dismiss:
            await self._know({letter.source.topic for letter in wanted if letter.source is not None})
        progress, most, chosen = self._progress[page.partition], self._options.max_replays, []
        for letter in wanted:
            if progress.done(letter.record.offset):
                continue
            if self._options.dismiss:
                chosen.append(letter)
            elif letter.source is None:
                self._tally.leave(
                    letter, "without a source", "left: no inferstream.source headers, so no letter of ours"
                )
            elif letter.stripped_bytes is not None:
                self._tally.leave(
                    letter,
                    "without their value",
                    f"left: its value of {letter.stripped_bytes:,} bytes was left out (dead_letter.oversize: strip)",
                )
            elif letter.replays >= most:
                self._tally.leave(
                    letter,
                    "replayed too often",
                    f"left: replayed {letter.replays} times (--max-replays {most})",
                )
            elif self._options.to is None and letter.source.topic in self._missing:
                self._tally.fail(letter, f"topic {letter.source.topic} does not exist (--to names another)")
            else:
                chosen.append(letter)
        return chosen

    async def _replay_page(self, page: Page, holding: Holding, sender: Sender) -> None:
        progress = self._progress[page.partition]
        chosen = (await self._chosen(page))[: self._room]
        while chosen:
            fitting = _fitting(progress, page, chosen)
            if not fitting:
                self._full.add(page.partition)
                self._tally.full.append(
                    f"{self._options.topic}:{page.partition}: nothing was replayed from offset "
                    f"{chosen[0].record.offset} on, as the group's commit can hold no more letters that are done "
                    f"behind one that is not: first replay or --dismiss those from offset {progress.watermark} on"
                )
                return
            await self._keep_pace(len(fitting))
            await holding.ready()
            if self._stopping.is_set():
                return
            try:
                await self._publish(fitting, progress, sender)
            finally:
                _pass_gaps(progress, page)
                await holding.commit({page.partition: progress})
            chosen = chosen[len(fitting) :]
        _pass_gaps(progress, page)

    async def _publish(self, letters: Sequence[Letter], progress: Progress, sender: Sender) -> None:
        """Publish the letters and mark each that is acknowledged."""
        if self._options.dismiss:
            for letter in letters:
                progress.mark(letter.record.offset, letter.record.offset + 1)
                self._count(letter)
            return

        def acknowledged(replay: Replay) -> None:
            offset = replay.letter.record.offset
            progress.mark(offset, offset + 1)
            self._count(replay.letter)

        def refused(replay: Replay, error: str) -> None:
            self._tally.fail(replay.letter, f"refused by {replay.topic}:{replay.partition}: {error}")

        await sender.send([self._replay_of(letter) for letter in letters], acknowledged, refused)

    def _replay_of(self, letter: Letter) -> Replay:
        source, to = letter.source, self._options.to
        assert source is not None  # else it is not chosen
        topic = to or source.topic
        known = self._facts.get(source.topic)
        partition = replayed_partition(
            letter, self._facts[topic].partitions, known.partitions if known else None, topic != source.topic
        )
        headers = replayed_headers(letter)
        size = Outgoing(Kind.RESULT, letter.record.key, letter.record.value, headers).size
        return Replay(letter, topic, partition, headers, size)

    def _count(self, letter: Letter) -> None:
        self._tally.done[letter.reason or "no reason"] += 1

    async def _keep_pace(self, count: int) -> None:
        """Wait until so many more may be sent; ends early when we are told to stop."""
        rate = self._options.rate
        if rate is None:
            return
        now = asyncio.get_running_loop().time()
        self._due = max(self._due, now)
        if self._due > now:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._due - now)
        self._due += count / rate

    async def _know(self, topics: set[str]) -> None:
        """Look up what is not known yet of these topics."""
        unknown = topics - self._facts.keys() - self._missing
        # A record that is not of ours may name anything; the brokers refuse the whole question for one such name.
        if possible := sorted(filter(_is_topic_name, unknown)):
            self._facts |= await facts(self._kafka, possible)
        self._missing |= unknown - self._facts.keys()


def _is_topic_name(text: str) -> bool:
    try:
        return bool(topic_name(text))
    except ValueError:
        return False


def _fitting(progress: Progress, page: Page, letters: Sequence[Letter]) -> Sequence[Letter]:
    """As many of the letters, from the first on, as a commit can say are done."""
    while letters:
        # All are done, or, which takes more to say, every second was refused.
        for done in (letters, letters[::2]):
            after = progress.copy()
            for letter in done:
                after.mark(letter.record.offset, letter.record.offset + 1)
            _pass_gaps(after, page)
            if len(after.metadata()) > MAX_METADATA - METADATA_RESERVE:
                break
        else:
            return letters
        letters = letters[: len(letters) // 2]
    return letters


def _pass_gaps(progress: Progress, page: Page) -> None:
    """Count offsets of the page that hold no letter (transaction markers) as done behind one that is."""
    at = page.start
    for letter in page.letters:
        if progress.done(at - 1):
            progress.mark(at, letter.record.offset)
        at = letter.record.offset + 1
    if progress.done(at - 1):
        progress.mark(at, page.stop)
