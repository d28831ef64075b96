"""The embed task: one vector per document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from inferstream.documents import Document, Prepared, Reason, Rejected
from inferstream.models.tokenizer import Ids, TextTokenizer
from inferstream.tasks import ModelInfo

LongDocuments = Literal["truncate", "chunk", "reject"]

ROW_OVERHEAD = 128
"""Bytes an array and its place in a tuple take beside its data."""


class EmbedTask:
    """Tokenises documents and turns the device's rows into ``output`` objects.

    ``long_documents`` says what becomes of a text of more than ``max_length`` tokens (special tokens
    included): it loses its end, or is embedded in up to ``max_chunks`` parts, or is refused.  ``prompt`` is
    put before every text.  ``normalizes``: the model's vectors have unit length, so the vector of several
    chunks is brought to it as well.  ``encode_embedding`` makes the output of one vector [width], float32.
    """

    name = "embed"

    def __init__(
        self,
        tokenizer: TextTokenizer,
        model: ModelInfo,
        max_length: int,
        long_documents: LongDocuments,
        max_chunks: int,
        encode_embedding: Callable[[np.ndarray], dict[str, Any]],
        *,
        prompt: str = "",
        normalizes: bool = True,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._long_documents = long_documents
        self._max_chunks = max_chunks
        self._encode_embedding = encode_embedding
        self._prompt = prompt
        self._normalizes = normalizes
        self._special = tokenizer.single.added
        chunked = max_chunks * (max_length - self._special) + self._special
        self._limit = chunked if long_documents == "chunk" else max_length

    def prepare(self, documents: Sequence[Document]) -> list[Prepared | Rejected]:
        """Tokenise; one answer per document, in order.  A document that cannot be read harms no other."""
        try:
            return self._prepare(documents)
        except Exception as error:
            if len(documents) > 1:
                return [answer for document in documents for answer in self.prepare([document])]
            return [Rejected(Reason.INVALID_TEXT, f"the tokenizer cannot read it ({type(error).__name__})")]

    def output(self, prepared: Prepared, vectors: np.ndarray) -> dict[str, Any]:
        """The output of a document from its chunks' rows, shape [chunks, width], float32."""
        if len(vectors) == 1:
            return self._encode_embedding(vectors[0])
        weights = [length - self._special for length in prepared.lengths]
        return self._encode_embedding(combine(vectors, weights, normalize=self._normalizes))

    def _prepare(self, documents: Sequence[Document]) -> list[Prepared | Rejected]:
        singles = [n for n, document in enumerate(documents) if document.text_pair is None]
        texts = [self._prompt + documents[n].text for n in singles]
        rows = dict(zip(singles, self._tokenizer.encode(texts, self._limit), strict=True))
        return [
            self._single(document, rows[n]) if n in rows else self._pair(document)
            for n, document in enumerate(documents)
        ]

    def _single(self, document: Document, ids: Ids) -> Prepared | Rejected:
        if not ids:
            return Rejected(Reason.INVALID_TEXT, "the text holds no token of this model")
        if len(ids) <= self._max_length:
            return _prepared(document, (self._tokenizer.item(ids),), (len(ids),), truncated=False)
        if self._long_documents == "truncate":
            ids = self._tokenizer.truncate(ids, self._max_length)
            return _prepared(document, (self._tokenizer.item(ids),), (len(ids),), truncated=True)
        if self._long_documents == "reject" or len(ids) > self._limit:
            return self._too_long(len(ids))
        chunks = self._tokenizer.chunks(ids, self._max_length)
        items = tuple(self._tokenizer.item(chunk) for chunk in chunks)
        return _prepared(document, items, tuple(map(len, chunks)), truncated=False)

    def _pair(self, document: Document) -> Prepared | Rejected:
        texts = (self._prompt + document.text, document.text_pair or "")
        text, pair = self._tokenizer.encode_pair(*texts, self._max_length)
        length = len(text) + len(pair) + self._tokenizer.pair.added
        if not length:
            return Rejected(Reason.INVALID_TEXT, "the texts hold no token of this model")
        truncated = length > self._max_length
        if truncated and self._long_documents == "reject":
            return self._too_long(length)
        if truncated and self._long_documents == "chunk":
            return Rejected(Reason.TOO_LONG, "a pair of texts cannot be cut into chunks; shorten it")
        text, pair = self._tokenizer.truncate_pair(text, pair, self._max_length)
        length = len(text) + len(pair) + self._tokenizer.pair.added
        return _prepared(document, (self._tokenizer.pair_item(text, pair),), (length,), truncated=truncated)

    def _too_long(self, tokens: int) -> Rejected:
        limit = f"model.max_length is {self._max_length}"
        if self._long_documents == "chunk":
            limit += f", model.max_chunks is {self._max_chunks}"
        return Rejected(
            Reason.TOO_LONG, f"the text has at least {tokens} tokens, more than {self._limit} ({limit})"
        )


def combine(vectors: np.ndarray, weights: Sequence[int], *, normalize: bool) -> np.ndarray:
    """The weighted mean of rows [chunks, width], of unit length if ``normalize``; [width], float32."""
    mean = np.average(vectors, axis=0, weights=weights)
    if normalize:
        mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return np.asarray(mean, dtype=np.float32)


def _prepared(
    document: Document, chunks: tuple[Any, ...], lengths: tuple[int, ...], *, truncated: bool
) -> Prepared:
    weight = sum(8 * length + ROW_OVERHEAD for length in lengths)
    return Prepared(document.without_text(), chunks, lengths, truncated, weight)
