"""docs/contract.md says what the code does: its examples come out of the codec, its tables are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import orjson
import pytest

from inferstream.codec import Codec, schema
from inferstream.documents import Document, Outgoing, Prepared, Reason, Rejected, Stage
from inferstream.tasks import ModelInfo
from tests.test_codec_decode import FakeRecord

PAGE = (Path(__file__).parents[1] / "docs" / "contract.md").read_text(encoding="utf-8")


def example(name: str) -> Any:
    found = re.search(rf"<!-- example: {name} -->\n```json\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"docs/contract.md has no example {name}"
    return json.loads(found.group(1))


def rows(heading: str) -> list[list[str]]:
    """The cells of the last table under a heading, without its head."""
    table = re.findall(r"^\|(.*)\|$", PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in table[2:]]


def test_contract_page_then_its_result_is_what_the_codec_makes_of_its_document() -> None:
    codec = Codec()
    record = FakeRecord(orjson.dumps(example("document")))
    document = codec.decode(record)
    assert isinstance(document, Document)
    model = ModelInfo("sentence-transformers/all-MiniLM-L6-v2", "sha256:53aa51172d14", "float32")

    outgoing = codec.result(
        record,
        Prepared(document, (0,), (9,), False, 0),
        "embed",
        model,
        codec.embedding(np.array([0.6, -0.8])),
    )

    assert isinstance(outgoing, Outgoing)
    assert outgoing.value is not None
    assert json.loads(outgoing.value) == example("result")
    assert list(json.loads(outgoing.value)) == list(example("result"))
    jsonschema_rs.validate(schema("result.v1"), example("result"))


def test_contract_page_then_its_base64_output_is_what_the_codec_makes() -> None:
    assert Codec(encoding="base64-f32").embedding(np.array([0.6, -0.8])) == example("base64")


def test_contract_page_then_its_dead_letter_headers_are_what_the_codec_makes() -> None:
    codec, record = Codec(), FakeRecord(b"{}", offset=42)
    rejected = codec.decode(record)
    assert isinstance(rejected, Rejected)

    headers = {
        name: value.decode()
        for name, value in codec.dead_letter(record, rejected).headers
        if value is not None
    }

    assert headers.pop("inferstream.version")  # of this installation
    assert headers == {name: value for name, value in example("dead-letter").items() if "version" not in name}
    jsonschema_rs.validate(schema("dead-letter-headers.v1"), example("dead-letter"))


def test_contract_page_then_its_reasons_are_the_closed_list_and_its_stages_exist() -> None:
    table = [row for row in rows("Dead letter") if row[0].startswith("`")]

    assert {row[0].strip("`") for row in table} == {reason.value for reason in Reason}
    assert {stage for row in table for stage in row[1].split(", ")} <= {stage.value for stage in Stage}


DECODED = {
    "not JSON": [b"plain words"],
    "JSON, but no object": [b"[]", b'"one"'],
    "text missing, or null": [b"{}", b'{"text": null}'],
    "text not a string, empty, or only white space": [b'{"text": 1}', b'{"text": ""}', b'{"text": " "}'],
    "invalid UTF-8": [b'{"text": "\xff"}'],
    'a lone surrogate escape (`"\\ud800"`)': [b'{"text": "\\ud800"}'],
    "`NaN` and `Infinity`": [b'{"text": "one", "n": NaN}', b'{"text": "one", "n": Infinity}'],
    "nesting 10,000 deep": [b'{"text": "one", "n": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"],
    "an id of 10 kB": [b'{"text": "one", "id": "' + b"x" * 10_000 + b'"}'],
    "an id that is a list": [b'{"text": "one", "id": [1]}'],
    "integer id": [b'{"text": "one", "id": 7}'],
    "unknown fields": [b'{"text": "one", "colour": "red"}'],
    "5 MB of text": [b'{"text": "' + b"word " * 1_000_000 + b'"}'],
}


@pytest.mark.parametrize("row", rows("Bad input"), ids=lambda row: row[0][:30])
def test_contract_page_then_each_row_of_bad_input_that_is_decided_here_is_so(row: list[str]) -> None:
    name, outcome, reason = row
    if name == "tombstone with a key":
        assert isinstance(Codec().decode(FakeRecord(None)), Outgoing)
    elif name == "tombstone without a key":
        decoded = Codec().decode(FakeRecord(None, None))
        assert isinstance(decoded, Rejected)
        assert f"`{decoded.reason.value}`" == reason
    else:
        for value in DECODED.get(name, []):
            decoded = Codec().decode(FakeRecord(value))
            if outcome.startswith("result"):
                assert isinstance(decoded, Document)
            else:
                assert isinstance(decoded, Rejected)
                assert f"`{decoded.reason.value}`" == reason


def test_contract_page_then_every_case_of_bad_input_here_has_its_row() -> None:
    assert set(DECODED) <= {row[0] for row in rows("Bad input")}
