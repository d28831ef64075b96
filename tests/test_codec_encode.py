"""Results and dead letters: the bytes that are sent, held to the published schemas."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import jsonschema_rs
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferstream.codec import Codec, schema
from inferstream.documents import Document, Headers, Kind, Outgoing, Prepared, Reason, Rejected, Stage
from inferstream.tasks import ModelInfo
from inferstream.version import version
from tests.test_codec_decode import FakeRecord

MODEL = ModelInfo("a/model", "sha256:0123456789ab", "float32")
RESULT_SCHEMA = jsonschema_rs.validator_for(schema("result.v1"))
HEADER_SCHEMA = jsonschema_rs.validator_for(schema("dead-letter-headers.v1"))


def prepared(document: Document | None = None, *, lengths: tuple[int, ...] = (3,)) -> Prepared:
    return Prepared(document or Document("a", "one"), tuple(range(len(lengths))), lengths, False, 100)


def result(codec: Codec, output: dict[str, Any], record: FakeRecord | None = None, **kwargs: Any) -> Outgoing:
    encoded = codec.result(record or FakeRecord(b"x"), prepared(**kwargs), "embed", MODEL, output)
    assert isinstance(encoded, Outgoing)
    return encoded


def body(outgoing: Outgoing) -> dict[str, Any]:
    assert outgoing.value is not None
    return dict(orjson.loads(outgoing.value))


def published(headers: Headers) -> dict[str, str | None]:
    """Headers as dead-letter-headers.v1 sees them."""
    ours = [(name, value) for name, value in headers if name.startswith("inferstream.")]
    assert len(dict(ours)) == len(ours), "a header of ours stands twice"
    return {name: None if value is None else value.decode() for name, value in ours}


# ---- results


def test_result_then_its_fields_stand_in_the_published_order() -> None:
    document = Document("a", "one", None, {"n": 1}, True)

    value = body(result(Codec(), Codec().embedding(np.ones(2)), document=document, lengths=(3, 4)))

    assert list(value) == ["id", "task", "model", "output", "usage", "source", "metadata"]
    assert value == {
        "id": "a",
        "task": "embed",
        "model": {"id": "a/model", "revision": "sha256:0123456789ab", "dtype": "float32"},
        "output": {"embedding": [1.0, 1.0], "dimensions": 2},
        "usage": {"tokens": 7, "truncated": False, "chunks": 2},
        "source": {"topic": "documents", "partition": 3, "offset": 41, "timestamp_ms": 1_764_000_000_000},
        "metadata": {"n": 1},
    }


def test_result_when_the_document_has_no_metadata_then_neither_has_the_result() -> None:
    assert "metadata" not in body(result(Codec(), {}))


def test_result_when_metadata_is_null_then_it_is_echoed() -> None:
    assert body(result(Codec(), {}, document=Document("a", "one", None, None, True)))["metadata"] is None


def test_result_when_the_model_changes_then_each_result_names_its_own() -> None:
    codec, other = Codec(), ModelInfo("b/model", "2", "bfloat16")

    named = [
        body(outgoing)["model"]["id"]
        for model in (MODEL, other, MODEL)
        if isinstance(outgoing := codec.result(FakeRecord(b"x"), prepared(), "embed", model, {}), Outgoing)
    ]

    assert named == ["a/model", "b/model", "a/model"]


def test_result_then_key_and_headers_are_the_inputs_but_for_ours() -> None:
    headers = (("trace", b"1"), ("none", None), ("inferstream.id", b"x"), ("trace", b"2"))

    outgoing = result(Codec(), {}, FakeRecord(b"x", b"the key", headers))

    assert (outgoing.kind, outgoing.key) == (Kind.RESULT, b"the key")
    assert list(outgoing.headers) == [
        ("trace", b"1"),
        ("none", None),
        ("trace", b"2"),
        ("inferstream.schema", b"result/1"),
    ]


METADATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text("aé\n", max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
).filter(lambda value: "inf" not in str(value))


@given(
    METADATA,
    st.sampled_from(["json", "base64-f32", "base64-f16"]),
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5),
    st.sampled_from(["a", 7, None]),
)
def test_result_of_any_document_then_it_is_valid_and_echoes_its_metadata(
    metadata: Any, encoding: Any, vector: list[float], doc_id: Any
) -> None:
    codec = Codec(encoding=encoding)
    record = FakeRecord(orjson.dumps({"id": doc_id, "text": "one", "metadata": metadata}))
    document = codec.decode(record)
    assert isinstance(document, Document)

    output = codec.embedding(np.array(vector, dtype=np.float32))
    value = body(result(codec, output, record, document=document))

    RESULT_SCHEMA.validate(value)
    assert value["metadata"] == metadata
    assert value["id"] == str(doc_id or "documents:3:41")


# ---- vectors


def test_embedding_in_json_then_the_numbers_are_the_vectors() -> None:
    vector = np.random.default_rng(7).standard_normal(384, dtype=np.float32)

    output = body(result(Codec(), Codec().embedding(vector)))["output"]

    assert output["dimensions"] == 384
    assert np.array_equal(np.array(output["embedding"], dtype=np.float32), vector)


@pytest.mark.parametrize(
    ("encoding", "dtype", "tolerance"), [("base64-f32", "<f4", 0.0), ("base64-f16", "<f2", 1e-3)]
)
def test_embedding_in_base64_then_numpy_reads_it_back(encoding: Any, dtype: str, tolerance: float) -> None:
    vector = np.random.default_rng(7).uniform(-1, 1, 384).astype(np.float32)

    output = Codec(encoding=encoding).embedding(vector)

    assert list(output) == ["embedding_base64", "encoding", "dimensions"]
    back = np.frombuffer(base64.b64decode(output["embedding_base64"]), dtype)
    assert np.abs(back.astype(np.float32) - vector).max() <= tolerance


@pytest.mark.parametrize("encoding", ["json", "base64-f32", "base64-f16"])
def test_embedding_when_the_vector_is_a_view_in_double_precision_then_it_is_written_alike(
    encoding: Any,
) -> None:
    codec = Codec(encoding=encoding)
    view = np.arange(8, dtype=np.float64)[::2]

    assert body(result(codec, codec.embedding(view))) == body(
        result(codec, codec.embedding(view.astype(np.float32)))
    )


@given(
    st.lists(
        st.floats(-70_000, 70_000, width=32) | st.sampled_from([65_504.0, -65_519.0, 65_520.0, 6e-8, -0.0]),
        min_size=1,
        max_size=20,
    )
)
def test_embedding_in_half_precision_of_any_vector_then_it_is_numpys_rounding_or_refused(
    numbers: list[float],
) -> None:
    vector = np.array(numbers, dtype=np.float32)
    with np.errstate(over="ignore"):
        expected = vector.astype("<f2")
    codec = Codec(encoding="base64-f16")

    if np.isfinite(expected).all():
        assert base64.b64decode(codec.embedding(vector)["embedding_base64"]) == expected.tobytes()
    else:
        with pytest.raises(ValueError, match="65,504"):
            codec.embedding(vector)


def test_embedding_when_a_number_is_too_large_for_half_precision_then_it_raises() -> None:
    with pytest.raises(ValueError, match="65,504"):
        Codec(encoding="base64-f16").embedding(np.array([70_000.0], dtype=np.float32))


@pytest.mark.parametrize(
    "output",
    [
        {"embedding": [1.0], "embedding_base64": "AACAPw==", "encoding": "base64-f32", "dimensions": 1},
        {"embedding_base64": "AACAPw==", "dimensions": 1},
        {"embedding": [1.0]},
        {"embedding": [], "dimensions": 0},
        {"embedding": [None], "dimensions": 1},
        {"embedding_base64": "no base64!", "encoding": "base64-f32", "dimensions": 1},
        {"dimensions": 1},
    ],
)
def test_result_schema_when_the_embedding_is_wrong_then_it_says_so(output: dict[str, Any]) -> None:
    value = body(result(Codec(), output))

    assert not RESULT_SCHEMA.is_valid(value)
    assert RESULT_SCHEMA.is_valid({**value, "task": "another-task"})


# ---- the output topic's limit

LARGE = {"embedding": np.zeros(5_000, dtype=np.float32), "dimensions": 5_000}
RANDOM = np.random.default_rng(7).standard_normal(5_000, dtype=np.float32)


def test_result_when_it_fits_to_the_byte_then_it_is_sent_and_one_byte_less_refuses_it() -> None:
    outgoing = result(Codec(compression="none"), LARGE)
    fits = outgoing.size + 61  # the batch around the record

    assert result(Codec(compression="none", result_limit=fits), LARGE) == outgoing
    refused = Codec(compression="none", result_limit=fits - 1).result(
        FakeRecord(b"x"), prepared(), "embed", MODEL, LARGE
    )

    assert isinstance(refused, Rejected)
    assert (refused.reason, refused.stage) == (Reason.RESULT_TOO_LARGE, Stage.FINISH)
    assert f"{fits:,}" in refused.message
    assert f"{fits - 1:,}" in refused.message
    assert "max.message.bytes" in refused.message
    assert "output.encoding" in refused.message


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
def test_result_when_it_only_fits_compressed_then_it_is_sent(compression: Any) -> None:
    outgoing = result(Codec(compression=compression, result_limit=4_000), LARGE)

    assert outgoing.size > 4_000


def test_result_when_it_does_not_fit_compressed_either_then_both_sizes_are_named() -> None:
    codec = Codec(encoding="base64-f16", result_limit=4_000)

    refused = codec.result(FakeRecord(b"x"), prepared(), "embed", MODEL, codec.embedding(RANDOM))

    assert isinstance(refused, Rejected)
    assert "compressed with zstd" in refused.message
    assert "output.encoding" not in refused.message, "there is no smaller encoding"


# ---- dead letters

REJECTED = Rejected(Reason.MODEL_ERROR, "it raised", Stage.DEVICE, attempts=2)


def test_dead_letter_then_key_value_and_headers_are_untouched() -> None:
    headers = (("trace", b"\xff"), ("none", None), ("trace", b"2"), ("inferstream.id", b"x"))

    outgoing = Codec().dead_letter(FakeRecord(b"\xff", b"the key", headers), REJECTED)

    assert (outgoing.kind, outgoing.key, outgoing.value) == (Kind.DEAD_LETTER, b"the key", b"\xff")
    assert tuple(outgoing.headers)[:4] == headers
    assert outgoing.rejected is REJECTED


def test_dead_letter_then_its_headers_are_the_published_ones() -> None:
    headers = published(Codec(group_id="a-group").dead_letter(FakeRecord(b"x"), REJECTED).headers)

    HEADER_SCHEMA.validate(headers)
    assert list(headers) == schema("dead-letter-headers.v1")["required"]
    assert headers == {
        "inferstream.error.reason": "model_error",
        "inferstream.error.message": "it raised",
        "inferstream.error.stage": "device",
        "inferstream.error.attempts": "2",
        "inferstream.source.topic": "documents",
        "inferstream.source.partition": "3",
        "inferstream.source.offset": "41",
        "inferstream.source.timestamp_ms": "1764000000000",
        "inferstream.version": version(),
        "inferstream.group_id": "a-group",
    }


def test_dead_letter_when_the_record_was_one_before_then_its_headers_are_replaced() -> None:
    codec = Codec()
    first = codec.stripped(codec.dead_letter(FakeRecord(b"x"), Rejected(Reason.INVALID_JSON, "first")))
    replayed = (("inferstream.id", b"x"), ("inferstream.replays", b"1"), *first.headers)

    second = codec.dead_letter(FakeRecord(b"x", headers=replayed, offset=99), REJECTED)

    headers = published(second.headers)
    HEADER_SCHEMA.validate(headers)
    assert headers["inferstream.error.message"] == "it raised"
    assert headers["inferstream.source.offset"] == "99"
    assert (headers["inferstream.id"], headers["inferstream.replays"]) == ("x", "1")
    assert "inferstream.stripped.value_bytes" not in headers


def test_dead_letter_of_any_reason_and_stage_then_its_headers_are_valid() -> None:
    codec = Codec()
    for reason, stage, value in itertools.product(Reason, Stage, (None, b"", b"\xff")):
        outgoing = codec.dead_letter(FakeRecord(value, timestamp=-1), Rejected(reason, "why", stage))

        HEADER_SCHEMA.validate(published(outgoing.headers))


def test_dead_letter_schema_then_its_reasons_and_stages_are_the_codes() -> None:
    properties = schema("dead-letter-headers.v1")["properties"]

    assert properties["inferstream.error.reason"]["enum"] == [each.value for each in Reason]
    assert properties["inferstream.error.stage"]["enum"] == [each.value for each in Stage]


@given(st.text(max_size=20).map(lambda text: text * 100) | st.sampled_from(["é" * 2_000, "", "\n", "\ud800"]))
def test_dead_letter_of_any_message_then_it_is_one_line_of_at_most_1_kb(message: str) -> None:
    outgoing = Codec().dead_letter(FakeRecord(b"x"), Rejected(Reason.MODEL_ERROR, message))

    encoded = dict(outgoing.headers)["inferstream.error.message"]
    assert encoded is not None
    assert 0 < len(encoded) <= 1024
    assert len(encoded.decode().splitlines()) == 1


def test_stripped_then_the_value_is_gone_and_its_size_is_in_a_header() -> None:
    codec = Codec()
    outgoing = codec.dead_letter(FakeRecord(b"x" * 1_234, b"the key", (("trace", b"1"),)), REJECTED)

    stripped = codec.stripped(outgoing)

    assert (stripped.key, stripped.value, stripped.kind) == (b"the key", None, Kind.DEAD_LETTER)
    assert stripped.rejected is REJECTED
    assert stripped.headers == (*outgoing.headers, ("inferstream.stripped.value_bytes", b"1234"))
    HEADER_SCHEMA.validate(published(stripped.headers))


@pytest.mark.parametrize("name", ["document.v1", "result.v1", "dead-letter-headers.v1"])
def test_schemas_then_they_are_valid_json_schema(name: str) -> None:
    jsonschema_rs.meta.validate(schema(name))
