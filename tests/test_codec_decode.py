"""Records to documents: what is read, what is refused and why, and that no refusal repeats the text."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferstream.codec import Codec, pointer_parts, resolve, schema
from inferstream.documents import Document, Headers, Kind, Outgoing, Reason, Rejected, Stage
from inferstream.errors import SettingsError


@dataclass(frozen=True)
class FakeRecord:
    value: bytes | None
    key: bytes | None = b"key"
    headers: Headers = field(default=())
    topic: str = "documents"
    partition: int = 3
    offset: int = 41
    timestamp: int = 1_764_000_000_000


def decode(value: bytes | None, **options: Any) -> Document | Rejected | Outgoing:
    return Codec(**options).decode(FakeRecord(value))


def document(value: Any, **options: Any) -> Document:
    decoded = decode(json.dumps(value).encode(), **options)
    assert isinstance(decoded, Document), decoded
    return decoded


def test_decode_of_a_full_document_then_every_field_is_read() -> None:
    decoded = document(
        {"id": "a", "text": "one", "text_pair": "two", "metadata": {"n": [1, None]}, "other": 1}
    )

    assert (decoded.id, decoded.text, decoded.text_pair) == ("a", "one", "two")
    assert decoded.has_metadata
    assert orjson.dumps(decoded.metadata) == b'{"n":[1,null]}'


def test_decode_when_there_is_only_text_then_the_id_is_the_place_of_the_record() -> None:
    assert document({"text": "one"}) == Document("documents:3:41", "one")


def test_decode_when_optional_fields_are_null_then_they_count_as_absent() -> None:
    assert document({"id": None, "text": "one", "text_pair": None}) == Document("documents:3:41", "one")


def test_decode_when_metadata_is_null_then_it_is_kept() -> None:
    decoded = document({"text": "one", "metadata": None})

    assert decoded.has_metadata
    assert orjson.dumps(decoded.metadata) == b"null"


@pytest.mark.parametrize(
    ("written", "echoed"),
    [
        ("7", "7"),
        ("-7", "-7"),
        ("9223372036854775808", "9223372036854775808"),
        ("18446744073709551615", "18446744073709551615"),
        ("-9223372036854775808", "-9223372036854775808"),
        ("7.0", "7"),
        ("1e3", "1000"),
        ('""', ""),
        ('"\\u00e9"', "é"),
        (f'"{"x" * 1024}"', "x" * 1024),
    ],
)
def test_decode_when_the_id_is_valid_then_it_is_echoed_as_text(written: str, echoed: str) -> None:
    decoded = decode(b'{"text": "one", "id": %s}' % written.encode())

    assert isinstance(decoded, Document)
    assert decoded.id == echoed


def test_decode_when_a_field_is_written_twice_then_the_last_counts() -> None:
    decoded = decode(b'{"text": "one", "text": "two"}')

    assert isinstance(decoded, Document)
    assert decoded.text == "two"


BAD = [
    (b"\xff\xfe", Reason.INVALID_UTF8),
    (b'{"text": "\xff"}', Reason.INVALID_UTF8),
    (b'{"text": "\xed\xa0\x80"}', Reason.INVALID_UTF8),
    (b"", Reason.INVALID_JSON),
    (b" ", Reason.INVALID_JSON),
    (b"plain words", Reason.INVALID_JSON),
    (b'{"text": "cut off', Reason.INVALID_JSON),
    (b'\xef\xbb\xbf{"text": "a byte order mark"}', Reason.INVALID_JSON),
    (b'{"text": "one", "n": NaN}', Reason.INVALID_JSON),
    (b'{"text": "one", "n": Infinity}', Reason.INVALID_JSON),
    (b'{"text": "one", "n": -Infinity}', Reason.INVALID_JSON),
    (b'{"text": "one", "n": 1e400}', Reason.INVALID_JSON),
    (b'{"text": "\\ud800"}', Reason.INVALID_JSON),
    (b'{"text": "\\udc00 one"}', Reason.INVALID_JSON),
    (b'{"text": "a\ttab"}', Reason.INVALID_JSON),
    (b"[" * 10_000 + b"]" * 10_000, Reason.INVALID_JSON),
    (b'{"text":' * 10_000 + b"1" + b"}" * 10_000, Reason.INVALID_JSON),
    (b"[" * 1_000_000, Reason.INVALID_JSON),
    (b"[]", Reason.NOT_AN_OBJECT),
    (b'"text"', Reason.NOT_AN_OBJECT),
    (b"null", Reason.NOT_AN_OBJECT),
    (b"true", Reason.NOT_AN_OBJECT),
    (b"1", Reason.NOT_AN_OBJECT),
    (b"1.5", Reason.NOT_AN_OBJECT),
    (b"[" * 1_000 + b"]" * 1_000, Reason.NOT_AN_OBJECT),
    (b"{}", Reason.MISSING_TEXT),
    (b'{"text": null}', Reason.MISSING_TEXT),
    (b'{"Text": "one"}', Reason.MISSING_TEXT),
    (b'{"text": 1}', Reason.INVALID_TEXT),
    (b'{"text": true}', Reason.INVALID_TEXT),
    (b'{"text": ["one"]}', Reason.INVALID_TEXT),
    (b'{"text": {"text": "one"}}', Reason.INVALID_TEXT),
    (b'{"text": ""}', Reason.INVALID_TEXT),
    (b'{"text": " \\t\\n\\u00a0\\u3000"}', Reason.INVALID_TEXT),
    (b'{"text":' + b"[" * 1_000 + b"]" * 1_000 + b"}", Reason.INVALID_TEXT),
    (b'{"text": "one", "id": []}', Reason.INVALID_ID),
    (b'{"text": "one", "id": {}}', Reason.INVALID_ID),
    (b'{"text": "one", "id": true}', Reason.INVALID_ID),
    (b'{"text": "one", "id": 1.5}', Reason.INVALID_ID),
    (b'{"text": "one", "id": 9007199254740993.0}', Reason.INVALID_ID),
    (b'{"text": "one", "id": 1e19}', Reason.INVALID_ID),
    (b'{"text": "one", "id": 18446744073709551616}', Reason.INVALID_ID),
    (b'{"text": "one", "id": -9223372036854775809}', Reason.INVALID_ID),
    (b'{"text": "one", "id": "%s"}' % (b"x" * 1_025), Reason.INVALID_ID),
    (b'{"text": "one", "id": "%s"}' % (b"x" * 10_000), Reason.INVALID_ID),
    (b'{"text": "one", "id": "%s"}' % ("é" * 513).encode(), Reason.INVALID_ID),
    (b'{"text": "one", "text_pair": 1}', Reason.INVALID_FIELD),
    (b'{"text": "one", "text_pair": ["two"]}', Reason.INVALID_FIELD),
    (b'{"text": "one", "metadata": %s}' % (b"[" * 300 + b"]" * 300), Reason.INVALID_FIELD),
    (b'{"text": " ", "id": []}', Reason.INVALID_TEXT),
    (b'{"text": "one", "id": [], "text_pair": 1}', Reason.INVALID_ID),
]


@pytest.mark.parametrize(("value", "reason"), BAD, ids=lambda each: str(each)[:40])
def test_decode_when_the_value_is_bad_then_it_is_refused_with_the_reason(
    value: bytes, reason: Reason
) -> None:
    decoded = decode(value)

    assert isinstance(decoded, Rejected)
    assert (decoded.reason, decoded.stage) == (reason, Stage.PREPARE)
    assert 0 < len(decoded.message) < 300


def test_decode_when_metadata_is_nested_250_deep_then_it_is_copied() -> None:
    nested = "[" * 250 + "]" * 250

    decoded = decode(b'{"text": "one", "metadata": %s}' % nested.encode())

    assert isinstance(decoded, Document)
    assert orjson.dumps(decoded.metadata).decode() == nested


def test_decode_of_five_megabytes_then_it_is_a_document() -> None:
    assert len(document({"text": "word " * 1_000_000}).text) == 5_000_000


SECRET = "confidential"
LEAKS = [
    SECRET.encode(),
    b'{"text": "%s' % SECRET.encode(),
    b'{"%s"}' % SECRET.encode(),
    b'{"text": "%s \xff"}' % SECRET.encode(),
    b'"%s"' % SECRET.encode(),
    b'{"text": ["%s"]}' % SECRET.encode(),
    b'{"text": "%s", "id": ["%s"]}' % (SECRET.encode(), SECRET.encode()),
    b'{"text": "%s", "id": "%s"}' % (SECRET.encode(), SECRET.encode() * 1_000),
    b'{"text": "%s", "text_pair": ["%s"]}' % (SECRET.encode(), SECRET.encode()),
    b'{"text": "%s\\ud800"}' % SECRET.encode(),
    b"%s\xff" % SECRET.encode(),
]


@pytest.mark.parametrize("value", LEAKS, ids=range(len(LEAKS)))
@pytest.mark.parametrize("format", ["json", "text"])
def test_decode_when_it_refuses_then_the_message_holds_none_of_the_text(value: bytes, format: str) -> None:
    decoded = decode(value, format=format)

    if isinstance(decoded, Rejected):
        assert SECRET not in decoded.message
    else:
        assert format == "text"


@given(st.binary(max_size=60).map(lambda tail: b'{"text": "' + SECRET.encode() + tail))
def test_decode_of_any_broken_bytes_then_the_message_holds_none_of_the_text(value: bytes) -> None:
    decoded = decode(value)

    assert isinstance(decoded, Document) or SECRET not in decoded.message  # type: ignore[union-attr]  # no tombstone


# ---- the published schema and the code agree

PUBLISHED = jsonschema_rs.validator_for(schema("document.v1"))
WORDS = st.text("aé\u0085\ufeff \x1c", max_size=4)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON | st.builds(lambda letter, n: letter * n, st.sampled_from("aé"), st.integers(510, 1030)),
        "text": JSON,
        "text_pair": JSON,
        "metadata": JSON,
        "other": JSON,
    },
)


@given(FIELDS)
def test_decode_of_any_object_then_the_verdict_is_the_published_schemas(value: dict[str, Any]) -> None:
    valid = PUBLISHED.is_valid(value)
    doc_id = value.get("id")
    # the rules that the schema states in its $comment, as JSON Schema cannot
    if isinstance(doc_id, str) and len(doc_id.encode()) > 1024:
        valid = False
    if isinstance(doc_id, float) and abs(doc_id) >= 2**53:
        valid = False

    decoded = decode(orjson.dumps(value))

    assert isinstance(decoded, Document if valid else Rejected)


@given(st.text(max_size=4))
def test_decode_of_any_text_then_empty_means_what_strip_says(text: str) -> None:
    decoded = decode(orjson.dumps({"text": text}))

    assert isinstance(decoded, Document) == bool(text.strip())


def test_document_schema_then_every_description_names_a_field_the_codec_reads() -> None:
    assert set(schema("document.v1")["properties"]) == {"id", "text", "text_pair", "metadata"}
    jsonschema_rs.meta.validate(schema("document.v1"))


def test_schema_when_there_is_none_of_that_name_then_it_says_so() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.v1\.json"):
        schema("nothing.v1")


# ---- pointers


def test_decode_when_pointers_lead_deep_then_the_fields_are_found_there() -> None:
    value = {"meta": {"key/with~both": 7}, "parts": [{"body": "one"}, {"body": "two"}]}

    decoded = document(
        value, id_field="/meta/key~1with~0both", text_field="/parts/1/body", metadata_field="/meta"
    )

    assert (decoded.id, decoded.text) == ("7", "two")
    assert orjson.dumps(decoded.metadata) == b'{"key/with~both":7}'


def test_decode_when_a_deep_text_is_not_there_then_the_message_names_the_pointer() -> None:
    decoded = decode(b'{"parts": []}', text_field="/parts/0/body")

    assert decoded == Rejected(Reason.MISSING_TEXT, "there is no text at /parts/0/body, or it is null")


def test_decode_when_the_metadata_pointer_is_empty_then_the_whole_value_is_echoed() -> None:
    decoded = document({"text": "one", "n": 1}, metadata_field="")

    assert orjson.dumps(decoded.metadata) == b'{"text":"one","n":1}'


RFC_6901 = {
    "foo": ["bar", "baz"],
    "": 0,
    "a/b": 1,
    "c%d": 2,
    "e^f": 3,
    "g|h": 4,
    "i\\j": 5,
    'k"l': 6,
    " ": 7,
    "m~n": 8,
}


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [
        ("", RFC_6901),
        ("/foo", ["bar", "baz"]),
        ("/foo/0", "bar"),
        ("/", 0),
        ("/a~1b", 1),
        ("/c%d", 2),
        ("/e^f", 3),
        ("/g|h", 4),
        ("/i\\j", 5),
        ('/k"l', 6),
        ("/ ", 7),
        ("/m~0n", 8),
        ("/foo/2", None),
        ("/foo/-", None),
        ("/foo/-1", None),
        ("/foo/00", None),
        ("/foo/01", None),
        ("/foo/²", None),
        ("/foo/" + "9" * 5000, None),
        ("/foo/", None),
        ("/a~1b/0", None),
        ("/~01", None),
    ],
)
def test_resolve_when_given_the_examples_of_rfc_6901_then_it_finds_what_they_say(
    pointer: str, expected: Any
) -> None:
    assert resolve(RFC_6901, pointer_parts("input.text_field", pointer)) == expected


@pytest.mark.parametrize("pointer", ["text", "/a~", "/a~2", "/~~", "$.text"])
def test_codec_when_a_pointer_is_none_then_the_setting_is_named(pointer: str) -> None:
    with pytest.raises(SettingsError, match=r"input\.text_field"):
        Codec(text_field=pointer)


# ---- plain text and tombstones


def test_decode_when_the_format_is_text_then_the_value_is_the_text() -> None:
    assert decode("{Übung}".encode(), format="text") == Document("documents:3:41", "{Übung}")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(b"\xff", Reason.INVALID_UTF8), (b"", Reason.INVALID_TEXT), (b" \n", Reason.INVALID_TEXT)],
)
def test_decode_when_the_format_is_text_and_there_is_none_then_it_is_refused(
    value: bytes, reason: Reason
) -> None:
    decoded = decode(value, format="text")

    assert isinstance(decoded, Rejected)
    assert decoded.reason is reason


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize("key", [b"key", b""])
def test_decode_of_a_tombstone_with_a_key_then_it_is_passed_on(format: Any, key: bytes) -> None:
    headers = (("trace", b"1"), ("inferstream.id", b"x"), ("none", None))

    decoded = Codec(format=format).decode(FakeRecord(None, key, headers))

    assert decoded == Outgoing(
        Kind.TOMBSTONE, key, None, (("trace", b"1"), ("none", None), ("inferstream.schema", b"result/1"))
    )


def test_decode_of_a_tombstone_without_a_key_then_it_is_refused() -> None:
    decoded = Codec().decode(FakeRecord(None, None))

    assert isinstance(decoded, Rejected)
    assert decoded.reason is Reason.TOMBSTONE_WITHOUT_KEY


def test_decode_of_a_tombstone_when_they_are_dead_letters_then_it_is_refused() -> None:
    decoded = Codec(tombstones="dead-letter").decode(FakeRecord(None, b"key"))

    assert isinstance(decoded, Rejected)
    assert decoded.reason is Reason.MISSING_TEXT


def test_decode_when_many_threads_share_a_codec_then_each_gets_its_own_document() -> None:
    codec = Codec()
    wrong: list[object] = []

    def work(name: str) -> None:
        for n in range(2_000):
            decoded = codec.decode(FakeRecord(orjson.dumps({"id": f"{name}-{n}", "text": name})))
            if decoded != Document(f"{name}-{n}", name):
                wrong.append(decoded)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
