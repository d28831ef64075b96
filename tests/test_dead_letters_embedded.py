"""Dead letters of the embedded broker, which finds no offset for a time."""

from __future__ import annotations

import pytest

from inferstream.codec import Codec
from inferstream.documents import Reason, Rejected
from inferstream.settings.tree import Kafka as Connection
from inferstream.tools.dead_letters import Filter, Place
from inferstream.tools.dead_letters_reading import find, reading
from inferstream.tools.embedded import EmbeddedBroker
from tests.support.client import Kafka, Sent
from tests.test_dead_letters import FakeRecord

pytestmark = pytest.mark.embedded


async def test_letters_when_the_broker_has_no_index_of_times_then_those_in_time_are_found_all_the_same() -> (
    None
):
    with EmbeddedBroker() as broker:
        broker.create_topic("dead", 2)
        made = [
            Codec().dead_letter(FakeRecord(offset=n), Rejected(Reason.TOO_LONG, "too long")) for n in range(4)
        ]
        await Kafka(broker.bootstrap).produce(
            "dead",
            [Sent(each.key, each.value, each.headers, n % 2) for n, each in enumerate(made)],
            enable_idempotence=False,
        )
        kafka = Connection(bootstrap_servers=[broker.bootstrap], connect_timeout_s=5)
        [first] = await find(kafka, "dead", Place("dead", 0, 0))
        moment = first.record.timestamp
        found = {}
        for chosen in (Filter(since_ms=moment - 60_000), Filter(until_ms=moment - 60_000)):
            async with reading(kafka, "dead") as reader:
                found[chosen] = [
                    letter.source.offset
                    for stretch in await reader.stretches(chosen)
                    async for page in reader.pages(stretch)
                    for letter in page.letters
                    if letter.source is not None and chosen.wants(letter)
                ]
        assert list(found.values()) == [[0, 2, 1, 3], []]
        assert [letter.place for letter in await find(kafka, "dead", Place("documents", 3, 3))] == [
            Place("dead", 1, 1)
        ]
