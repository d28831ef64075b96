"""Publish documents: JSON lines, lines of text, files of a folder or stdin, each as one record.

    reader thread        reads what is there, cuts lines, builds the records, refuses what the schema refuses
      │                  (publish_reading)
      │  chunks          a queue of a few: a slow broker stops the reading, and a slow stdin is sent on at once
    event loop           sends with a bounded number of bytes and records unacknowledged, counts the answers
                         (publish_sending)

What is here is the whole: what to publish, how far it is, and the run from the one part to the other.  Memory
is bounded by constants of the two parts plus the largest single document, whatever the size of a file.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inferstream.errors import Incomplete, KafkaRefused
from inferstream.kafka.connection import TopicFacts, start_with_retry, topic_facts
from inferstream.kafka.rights import Right
from inferstream.tools.publish_reading import Bad, Format, IdFrom, Reader, in_thread
from inferstream.tools.publish_sending import Outbox

if TYPE_CHECKING:
    from inferstream.settings import Settings

SHOWN_PROBLEMS = 10
NOT_ACCEPTED = "not_accepted"  # refused by the brokers, or not acknowledged in time


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
    keyless: int = 0  # sent without a key, although one was asked for
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
                        continue
                    counts.keyless += options.key_field is not None and item.key is None
                    await outbox.send(item)
                counts.read_bytes += chunk.bytes
            await outbox.drain()
    except TimeoutError:
        if not stall.expired():
            raise
        outbox.give_up()
        raise Incomplete(
            f"the brokers acknowledged nothing for {stall_s:g} s (kafka.connect_timeout_s): given up, and "
            "the rest was not read"
        ) from None
    finally:
        await outbox.stop()


async def _facts(settings: Settings, topic: str) -> TopicFacts:
    kafka = settings.kafka
    needed = [Right("WRITE", "topic", topic)]
    found = await start_with_retry(
        kafka, lambda: topic_facts(kafka, [topic], needed), kafka.connect_timeout_s
    )
    if topic not in found:
        raise KafkaRefused(
            f"topic {topic} does not exist on {','.join(kafka.bootstrap_servers)}: create it with "
            f"`inferstream topics create {topic}`"
        )
    return found[topic]
