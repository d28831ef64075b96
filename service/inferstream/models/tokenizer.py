"""Texts to token ids, exactly as the model's own tokenizer does it, without reading what will be cut off.

Truncation is done here and not by the tokenizer: it would build the overflowing part only to drop it, and it
would not say how long a text was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 6
"""The first guess of how much of a long text is read; a wrong one costs another look, 4 times longer."""

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A model input that needs token type ids: ``ids`` and ``types``, int32, shape [tokens] both."""

    ids: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Layout:
    """The special tokens around one text (two parts) or a pair (three), and every part's token type.

    ``specials[0] text specials[1]`` or ``specials[0] text specials[1] pair specials[2]``.
    """

    specials: tuple[tuple[int, ...], ...]
    special_types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]

    @property
    def added(self) -> int:
        """How many tokens are special."""
        return sum(map(len, self.specials))

    @property
    def typed(self) -> bool:
        """Whether any token has a type other than 0."""
        return any(self.text_types) or any(any(types) for types in self.special_types)

    def join(self, *texts: Ids) -> Ids:
        ids = list(self.specials[0])
        for text, specials in zip(texts, self.specials[1:], strict=True):
            ids += text
            ids += specials
        return ids

    def types(self, *lengths: int) -> Ids:
        types = list(self.special_types[0])
        for length, of_text, of_specials in zip(
            lengths, self.text_types, self.special_types[1:], strict=True
        ):
            types += [of_text] * length
            types += of_specials
        return types


class TextTokenizer:
    """A Rust tokenizer with its padding and truncation off; the GIL is released while it works.

    ``type_ids``: whether the model is given token type ids.  ``keep_end``: whether a text that is too long
    loses its beginning.  All methods may be called from several threads at once.
    """

    def __init__(self, backend: Tokenizer, *, type_ids: bool = True, keep_end: bool = False) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.type_ids = type_ids
        self._keep_end = keep_end
        self._boundary = None if keep_end else safe_boundary(json.loads(backend.to_str()))
        self.single = _layout(backend, pair=False)
        self.pair = _layout(backend, pair=True)

    def encode(self, texts: Sequence[str], limit: int, *, special: bool = True) -> list[Ids]:
        """Token ids of each text, special tokens included if ``special``.

        A list longer than ``limit`` may stop anywhere after it (its text was cut before it was read); its
        first ``limit`` ids are those of the whole text, save for the special tokens at the end.
        """
        enough = limit + self.single.added
        length = enough * CHARACTERS_PER_TOKEN
        heads = [self._head(text, length) for text in texts]
        encodings = self._backend.encode_batch_fast(heads, add_special_tokens=special)
        rows = [encoding.ids for encoding in encodings]
        for n, (text, head) in enumerate(zip(texts, heads, strict=True)):
            while len(head) < len(text) and len(rows[n]) <= enough:
                head = self._head(text, 4 * len(head))
                rows[n] = self._backend.encode_batch_fast([head], add_special_tokens=special)[0].ids
        return rows

    def encode_pair(self, text: str, pair: str, limit: int) -> tuple[Ids, Ids]:
        """Token ids of both texts without special tokens, as far as a truncation to ``limit`` needs them."""
        first, second = self.encode((text, pair), limit, special=False)
        room = limit - self.pair.added
        if room % 2 and min(len(first), len(second)) > room:
            # Both are cut to half, and the longer gets the odd token: only the whole tells which that is.
            whole = self._backend.encode_batch_fast((text, pair), add_special_tokens=False)
            first, second = (encoding.ids for encoding in whole)
        return first, second

    def item(self, ids: Ids) -> Any:
        """The model input of one text, from ids that hold their special tokens."""
        row = np.array(ids, dtype=np.int32)
        if not self.type_ids or not self.single.typed:
            return row
        types = self.single.types(len(ids) - self.single.added)
        return Tokens(row, np.array(types, dtype=np.int32))

    def pair_item(self, text: Ids, pair: Ids) -> Any:
        """The model input of a pair, from ids without special tokens."""
        row = np.array(self.pair.join(text, pair), dtype=np.int32)
        if not self.type_ids or not self.pair.typed:
            return row
        return Tokens(row, np.array(self.pair.types(len(text), len(pair)), dtype=np.int32))

    def truncate(self, ids: Ids, max_length: int) -> Ids:
        """Cut the text, not the special tokens, so that ``max_length`` ids are left."""
        first, last = self.single.specials
        text = ids[len(first) : len(ids) - len(last)]
        return self.single.join(self._cut(text, max_length - self.single.added))

    def truncate_pair(self, text: Ids, pair: Ids, max_length: int) -> tuple[Ids, Ids]:
        """Cut the longer of the two, then both, as the tokenizers library's ``longest_first`` does."""
        room = max_length - self.pair.added
        if len(text) + len(pair) <= room:
            return text, pair
        short = min(len(text), len(pair))
        long = short if short > room else max(short, room - short)
        if short + long > room:
            short = room // 2
            long = short + room % 2
        if len(text) <= len(pair):
            return self._cut(text, short), self._cut(pair, long)
        return self._cut(text, long), self._cut(pair, short)

    def chunks(self, ids: Ids, max_length: int) -> list[Ids]:
        """Cut the text into parts without overlap, each with its own special tokens."""
        first, last = self.single.specials
        text = ids[len(first) : len(ids) - len(last)]
        room = max_length - self.single.added
        return [self.single.join(text[at : at + room]) for at in range(0, len(text), room)]

    def _cut(self, ids: Ids, length: int) -> Ids:
        return ids[len(ids) - length :] if self._keep_end and length < len(ids) else ids[:length]

    def _head(self, text: str, length: int) -> str:
        """The text up to the first safe boundary at or after ``length`` characters; all of it if none."""
        if len(text) <= length or self._boundary is None:
            return text
        match = self._boundary.search(text, length)
        return text if match is None else text[: match.start()]


def safe_boundary(tokenizer: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text can be cut so that the tokens of its head are the first tokens of the whole text.

    ``tokenizer`` is the content of a tokenizer.json.  The pattern matches the empty string at such places;
    None where no such place can be proven.  The proof, stage by stage of the tokenizer, for a cut before the
    character c:

    * Added tokens are found in the raw or the normalised text.  None of them holds white space or an
      ideograph, so none spans the cut; one that ends at it is followed by c or by the end of the text, and
      none asks for a word boundary there.  What lstrip or rstrip takes is white space on the far side.
    * Normalisation: every normaliser accepted here works on single characters or composes and reorders
      combining marks behind a starter.  c (white space or an ideograph) is a starter that composes with
      nothing before it, so what stands before the cut does not depend on what stands behind it.
    * Pre-tokenisation, splitters at white space: c is, or (BertNormalizer with handle_chinese_chars) is
      preceded by, white space, so no word spans the cut, and later splitters see one word at a time.
      ByteLevel with its own expression: c is a space behind a character that is not white space; no
      alternative of the expression goes on into a space behind its first character, and its look-ahead is
      only used inside a run of white space, which cannot have begun before the cut.
    * The model (WordPiece, BPE, Unigram, WordLevel) sees one word at a time.
    """
    ideographs = "\u4e00-\u9fff"
    for token in tokenizer.get("added_tokens") or ():
        if token["single_word"] or re.search(rf"[\s{ideographs}]", token["content"]):
            return None
    normalizers = _sequence(tokenizer.get("normalizer"), "normalizers")
    if any(part["type"] not in _LOCAL_NORMALIZERS for part in normalizers):
        return None
    splitters = _sequence(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not splitters:
        return None
    if splitters[0]["type"] in _WHITESPACE_SPLITTERS:
        if any(part.get("handle_chinese_chars") for part in normalizers):
            return re.compile(rf"(?=[ \t\r\n{ideographs}])")
        return re.compile(r"(?=[ \t\r\n])")
    if splitters[0]["type"] == "ByteLevel" and splitters[0].get("use_regex", True) and len(splitters) == 1:
        return re.compile(r"(?<=[^\s\u180e])(?= )")  # \u180e was white space before Unicode 6.3
    return None


_LOCAL_NORMALIZERS = frozenset(("BertNormalizer", "Lowercase", "StripAccents", "NFC", "NFD", "NFKC", "NFKD"))
_WHITESPACE_SPLITTERS = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"))


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normaliser or pre-tokeniser in order, nested sequences flattened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for nested in part[key] for inner in _sequence(nested, key)]
    return [part]


def _layout(backend: Tokenizer, *, pair: bool) -> Layout:
    """Read the special tokens off an encoded probe.  Raises ValueError if no probe has tokens of its own."""
    for probe in ("a", "1", "."):
        encoding = backend.encode(probe, probe) if pair else backend.encode(probe)
        specials: list[list[int]] = [[]]
        types: list[list[int]] = [[]]
        text_types: list[int] = []
        inside = False
        marks = zip(encoding.ids, encoding.type_ids, encoding.special_tokens_mask, strict=True)
        sequences = encoding.sequence_ids
        for n, (token, kind, special) in enumerate(marks):
            if special:
                specials[-1].append(token)
                types[-1].append(kind)
            elif not inside or sequences[n] != sequences[n - 1]:
                text_types.append(kind)
                specials.append([])
                types.append([])
            inside = not special
        if len(text_types) == 1 + pair:
            return Layout(tuple(map(tuple, specials)), tuple(map(tuple, types)), tuple(text_types))
    raise ValueError("the tokenizer finds no token in a letter, a digit or a full stop")
