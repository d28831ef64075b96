"""Whatever bytes come in: one outcome each, no error but our own, and what goes out is valid by schemas/."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferstream.codec import Codec
from inferstream.documents import Document, Reason, Rejected
from tests import fuzz
from tests.fuzz import SECRET, Failure, Fuzzed, Route, deep_recursion, routes, run

RECORDS = 30_000

# ---- strategies: JSON text that is nearly right

spaces = st.sampled_from(["", "", "", " ", "\n\t\r", "\u00a0", "\ufeff", "/**/"])
numbers = st.one_of(
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.floats(allow_nan=True, allow_infinity=True).map(json.dumps),
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
    st.from_regex(r"[-+0-9.eE]{1,8}", fullmatch=True),
)
escapes = st.one_of(
    st.text(max_size=8).map(lambda text: json.dumps(text)[1:-1]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.from_regex(r"\\u[dD][89aAbBcCfF][0-9a-fA-F]{2}", fullmatch=True),
    st.from_regex(r"\\[bfnrtu\"/xX0\\]?[0-9a-fA-F]{0,4}", fullmatch=True),
)
strings = st.lists(escapes, max_size=4).map(lambda parts: f'"{SECRET}{"".join(parts)}"')
scalars = st.one_of(
    numbers, strings, st.sampled_from(["null", "true", "false", "nul", "NaN", '""', '" "', ""])
)


def _array(parts: list[str]) -> str:
    return "[" + ",".join(parts) + "]"


def _object(fields: list[tuple[str, str, str]]) -> str:
    return "{" + ",".join(f"{space}{name}{space}:{value}" for name, space, value in fields) + "}"


names = strings | st.sampled_from(['"a"', '"text"', '""', "a"])
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(_array),
        st.lists(st.tuples(names, spaces, inner), max_size=3).map(_object),
        st.tuples(inner, st.integers(240, 260)).map(lambda pair: "[" * pair[1] + pair[0] + "]" * pair[1]),
    ),
    max_leaves=5,
)
fields = st.lists(
    st.tuples(
        st.sampled_from(['"text"', '"text"', '"id"', '"text_pair"', '"metadata"', '"other"', r'"\u0069d"']),
        spaces,
        strings | values,
    ),
    max_size=6,
)
documents = st.tuples(spaces, fields, spaces).map(
    lambda parts: (parts[0] + _object(parts[1]) + parts[2]).encode("utf-8", "surrogatepass")
)
encodings = st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp1252", "shift_jis"])
encoded = st.tuples(strings, encodings).map(
    lambda pair: f'{{"text":{pair[0]}}}'.encode(pair[1], "xmlcharrefreplace")
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A document with some bytes put in, taken out or changed."""
    data = bytearray(draw(documents))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


header_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["inferstream.", "inferstream.schema", "inferstream.error.reason", "inferstream.stripped.value_bytes"]
)
headers = st.lists(st.tuples(header_names, st.none() | st.binary(max_size=12)), max_size=5)
keys = st.none() | st.binary(max_size=12)
offsets = st.integers(0, (1 << 63) - 1)
timestamps = st.integers(-(1 << 62), 1 << 62)


WAYS = list({id(route): route for route in routes()}.values())
ways = st.sampled_from(range(len(WAYS)))


def records(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[Fuzzed]:
    return st.builds(Fuzzed, values, keys, headers, offsets, timestamps)


@pytest.mark.parametrize(
    "values",
    [documents, damaged(), encoded | st.binary(max_size=64)],
    ids=["nearly-valid", "damaged", "other-encodings"],
)
def test_codec_of_any_record_then_it_has_one_valid_outcome_and_the_second_decoders_verdict(
    values: st.SearchStrategy[bytes],
) -> None:
    @settings(max_examples=500, deadline=None)
    @given(records(values), ways)
    def answer(record: Fuzzed, way: int) -> None:
        with deep_recursion():
            WAYS[way].take([record])

    answer()


def test_codec_of_generated_records_then_every_one_is_answered_and_every_reason_occurs() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"again: python -m tests.fuzz --records {RECORDS} --seed {seed}")
    answered = run(RECORDS, seed)
    assert sum(answered.values()) == RECORDS
    assert set(answered) >= {"result", "tombstone", "invalid_utf8", "invalid_json", "not_an_object"}
    assert set(answered) >= {"missing_text", "invalid_text", "invalid_field", "invalid_id"}
    assert set(answered) >= {"tombstone_without_key", "too_long", "result_too_large"}


def test_records_when_the_seed_is_the_same_then_so_are_they() -> None:
    first, again = fuzz.Mutator(5), fuzz.Mutator(5)
    assert [first.record(n) for n in range(500)] == [again.record(n) for n in range(500)]


# ---- the fuzzer itself: a codec with a defect does not get through


def _without_metadata(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = codec.decode

    def defective(record: Any) -> Any:
        decoded = decode(record)
        return Document(decoded.id, decoded.text) if isinstance(decoded, Document) else decoded

    monkeypatch.setattr(codec, "decode", defective)


def _wrong_reason(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = codec.decode

    def defective(record: Any) -> Any:
        decoded = decode(record)
        return Rejected(Reason.INVALID_JSON, "no") if isinstance(decoded, Rejected) else decoded

    monkeypatch.setattr(codec, "decode", defective)


def _leaks_text(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = codec.decode

    def defective(record: Any) -> Any:
        decoded = decode(record)
        if isinstance(decoded, Rejected):
            return Rejected(decoded.reason, repr(record.value))
        return decoded

    monkeypatch.setattr(codec, "decode", defective)


def _raises(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*arguments: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(codec, "result", defective)


def _keeps_our_headers(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferstream.codec.HEADER_PREFIX", "no prefix")


@pytest.mark.parametrize(
    "defect", [_without_metadata, _wrong_reason, _leaks_text, _raises, _keeps_our_headers]
)
def test_fuzzer_when_the_codec_has_a_defect_then_it_is_found(
    defect: Callable[[Codec, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    route, mutator = Route(), fuzz.Mutator(1)
    defect(route.codec, monkeypatch)
    with pytest.raises(Failure), deep_recursion():
        for start in range(0, 5000, 250):
            route.take([mutator.record(start + n) for n in range(250)])
