"""Dead letters without a broker: what headers say, which are meant, what is sent, and how they are shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from inferstream.codec import Codec, schema
from inferstream.documents import Document, Headers, Reason, Rejected
from inferstream.errors import SettingsError
from inferstream.tools.dead_letters import (
    Filter,
    Letter,
    Place,
    letter_of,
    moment_of,
    place_of,
    reason_of,
    replayed_headers,
    replayed_partition,
)
from inferstream.tools.dead_letters_lines import details, table, whole

CODEC = Codec()
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@dataclass(frozen=True)
class FakeRecord:
    value: bytes | None = b"{}"
    key: bytes | None = b"k"
    headers: Headers = ()
    topic: str = "documents"
    partition: int = 3
    offset: int = 41
    timestamp: int = 1_764_000_000_000


def letter(record: FakeRecord, reason: Reason = Reason.MISSING_TEXT) -> Letter:
    """The record after a worker has refused it, as it is read from the dead-letter topic."""
    made = CODEC.dead_letter(record, Rejected(reason, "there is no text"))
    return letter_of(FakeRecord(made.value, made.key, made.headers, "dead", 0, 7, 1_764_000_500_000))


def replayed(one: Letter) -> FakeRecord:
    return FakeRecord(one.record.value, one.record.key, replayed_headers(one), offset=one.record.offset + 100)


headers = st.lists(
    st.tuples(
        st.one_of(st.text(max_size=9), st.sampled_from(["inferstream.x", "inferstream.schema", "trace"])),
        st.one_of(st.none(), st.binary(max_size=9)),
    ),
    max_size=6,
)


@given(headers, st.integers(1, 5), st.one_of(st.none(), st.binary()), st.one_of(st.none(), st.binary()))
def test_letter_when_replayed_and_refused_again_and_again_then_only_the_count_grows(
    own: list[tuple[str, bytes | None]], times: int, key: bytes | None, value: bytes | None
) -> None:
    record = FakeRecord(value, key, tuple(own))
    others = tuple(header for header in own if not header[0].startswith("inferstream."))
    for count in range(times):
        one = letter(record)
        assert one.replays == count
        assert (one.record.key, one.record.value) == (key, value)
        record = replayed(one)
        assert record.headers == (
            *others,
            ("inferstream.id", b"documents:3:41"),
            ("inferstream.replays", b"%d" % (count + 1)),
        )


def test_letter_of_a_replayed_document_then_its_headers_are_those_of_the_schema() -> None:
    again = letter(replayed(letter(FakeRecord())))
    text = {name: (value or b"").decode() for name, value in again.record.headers}
    jsonschema_rs.validate(schema("dead-letter-headers.v1"), text)
    assert text["inferstream.replays"] == "1" and text["inferstream.id"] == "documents:3:41"
    assert again.source == Place("documents", 3, 107)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"documents:3:41", "documents:3:41"),
        (b"", "documents:3:99"),
        (b"\xff", "documents:3:99"),
        (b"x" * 1025, "documents:3:99"),
        (None, "documents:3:99"),
    ],
)
def test_document_without_an_id_when_the_header_names_one_then_it_is_its_id(
    value: bytes | None, expected: str
) -> None:
    record = FakeRecord(b'{"text": "t"}', headers=(("a", None), ("inferstream.id", value)), offset=99)
    for codec, found in ((Codec(), record), (Codec(format="text"), record)):
        document = codec.decode(found)
        assert isinstance(document, Document) and document.id == expected


def test_document_with_an_id_when_the_header_names_another_then_it_keeps_its_own() -> None:
    record = FakeRecord(b'{"id": 7, "text": "t"}', headers=(("inferstream.id", b"documents:3:41"),))
    document = Codec().decode(record)
    assert isinstance(document, Document) and document.id == "7"


@pytest.mark.parametrize("count", [b"many", b"-3", b"", None, b"\xff", b"9" * 40])
def test_letter_when_its_count_is_no_number_then_it_counts_as_never_replayed(count: bytes | None) -> None:
    assert letter(FakeRecord(headers=(("inferstream.replays", count),))).replays == 0


def test_letter_when_the_record_is_no_letter_of_ours_then_it_has_no_source_and_cannot_be_replayed() -> None:
    for own in (
        (),
        (("inferstream.source.topic", b"a"),),
        (("inferstream.source.topic", b"a"), ("inferstream.source.partition", b"x")),
        (
            ("inferstream.source.topic", b"a"),
            ("inferstream.source.partition", b"-1"),
            ("inferstream.source.offset", b"4"),
        ),
    ):
        foreign = letter_of(FakeRecord(headers=own))
        assert foreign.source is None and foreign.reason is None
        with pytest.raises(ValueError, match="source"):
            replayed_headers(foreign)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (Filter(), True),
        (Filter(reasons=frozenset({"missing_text", "too_long"})), True),
        (Filter(reasons=frozenset({"too_long"})), False),
        (Filter(sources=(Place("documents"),)), True),
        (Filter(sources=(Place("other"), Place("documents", 3))), True),
        (Filter(sources=(Place("documents", 3, 41),)), True),
        (Filter(sources=(Place("documents", 3, 40),)), False),
        (Filter(sources=(Place("documents", 4),)), False),
        (Filter(since_ms=1_764_000_500_000), True),
        (Filter(since_ms=1_764_000_500_001), False),
        (Filter(until_ms=1_764_000_500_001), True),
        (Filter(until_ms=1_764_000_500_000), False),
        (Filter(frozenset({"missing_text"}), (Place("documents", 4),)), False),
    ],
)
def test_filter_when_it_has_several_parts_then_all_must_hold(chosen: Filter, wanted: bool) -> None:
    assert chosen.wants(letter(FakeRecord())) is wanted


def test_filter_when_it_names_a_source_then_a_foreign_record_is_not_meant() -> None:
    assert not Filter(sources=(Place("documents"),)).wants(letter_of(FakeRecord()))
    assert Filter().wants(letter_of(FakeRecord()))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2h", NOW - timedelta(hours=2)),
        ("1d12h", NOW - timedelta(hours=36)),
        ("45m", NOW - timedelta(minutes=45)),
        ("90s", NOW - timedelta(seconds=90)),
        ("1w", NOW - timedelta(weeks=1)),
        ("2026-01-31T08:00:00Z", datetime(2026, 1, 31, 8, tzinfo=UTC)),
        ("2026-01-31T08:00:00.5+02:00", datetime(2026, 1, 31, 6, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-31 08:00", datetime(2026, 1, 31, 8).astimezone()),
        ("2026-01-31", datetime(2026, 1, 31).astimezone()),
    ],
)
def test_moment_when_it_is_a_time_or_so_long_ago_then_it_is_in_milliseconds(
    text: str, moment: datetime
) -> None:
    assert moment_of("--since", text, NOW) == moment.timestamp() * 1000


@pytest.mark.parametrize("text", ["", "2", "h", "2x", "-2h", "yesterday", "2026-13-01", "999999999w", "1.5h"])
def test_moment_when_it_is_none_then_the_option_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--since: .* is no time: write 2h"):
        moment_of("--since", text, NOW)


def test_place_when_it_is_a_topic_partition_or_record_then_it_is_read() -> None:
    assert place_of("--source", "a.b-c") == Place("a.b-c")
    assert place_of("--source", "a:0") == Place("a", 0)
    assert place_of("--source", "a:12:345") == Place("a", 12, 345)
    for text in ("", ":1", "a:", "a:x", "a:-1", "a:1:2:3", "a:1:", "a:²"):
        with pytest.raises(SettingsError, match="--source"):
            place_of("--source", text)


def test_reason_when_it_is_unknown_then_the_closed_list_is_named() -> None:
    assert reason_of("--reason", "too_long") == "too_long"
    with pytest.raises(SettingsError) as caught:
        reason_of("--reason", "to_long")
    assert all(reason.value in str(caught.value) for reason in Reason)


@pytest.mark.parametrize(
    ("key", "partitions", "source_partitions", "elsewhere", "expected"),
    [
        (b"k", 8, 8, False, 3),
        (b"k", 4, None, False, 3),
        (b"k", 8, 8, True, 3),
        (None, 2, 8, False, 1),
        (None, 8, 4, True, 3),
        # Kafka's own test vector: murmur2("21") is -973932308.
        (b"21", 8, 4, True, (-973932308 & 0x7FFFFFFF) % 8),
        (b"21", 2, 4, False, (-973932308 & 0x7FFFFFFF) % 2),
    ],
)
def test_partition_when_a_letter_is_replayed_then_it_is_its_own_or_by_key(
    key: bytes | None, partitions: int, source_partitions: int | None, elsewhere: bool, expected: int
) -> None:
    one = letter(FakeRecord(key=key))
    assert replayed_partition(one, partitions, source_partitions, elsewhere) == expected


@given(st.binary(max_size=40), st.one_of(st.none(), st.binary(max_size=40)), headers)
def test_letter_when_it_holds_anything_then_it_can_be_shown(
    value: bytes, key: bytes | None, own: list[tuple[str, bytes | None]]
) -> None:
    one = letter(FakeRecord(value, key, tuple(own)))
    for name, _ in own:
        if any("\ud800" <= c <= "\udfff" for c in name):
            return
    shown = json.loads(whole(one))
    assert shown["source"]["offset"] == 41
    out = StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    console.print(table([one]))
    for text in details(one):
        console.print(text, soft_wrap=True)
    allowed = {"\n", "\t"}
    assert all(c.isprintable() or c in allowed for c in out.getvalue())
