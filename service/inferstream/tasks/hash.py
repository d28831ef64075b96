"""``builtin:hash``: a deterministic vector from the text, for tests and to measure the path around a model.

It imports no torch, needs no file and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from inferstream.documents import Document, Prepared, Reason, Rejected
from inferstream.tasks import ModelInfo
from inferstream.tasks.embed import LongDocuments, combine

MODEL_ID = "builtin:hash"
WIDTH = 8
MAX_LENGTH = 8192
CHARACTERS_PER_TOKEN = 4
OVERHEAD = 128


def hash_vectors(digests: Sequence[bytes]) -> np.ndarray:
    """Vectors of unit length from digests of 32 bytes, shape [digests, 8], float32."""
    words = np.frombuffer(b"".join(digests), dtype="<i4").reshape(-1, WIDTH).astype(np.float64) + 0.5
    words /= np.sqrt(np.einsum("ij,ij->i", words, words))[:, None]  # + 0.5: never all zero
    return words.astype(np.float32)


def digest(text: str, text_pair: str | None = None) -> bytes:
    """What stands for a text on the device: 32 bytes."""
    state = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4 * WIDTH)
    if text_pair is not None:
        state.update(b"\x00" + text_pair.encode("utf-8", "surrogatepass"))
    return state.digest()


class HashTask:
    """Four characters count as a token; long documents are treated as :class:`EmbedTask` treats them.

    A pair counts with both its texts and is never cut.
    """

    name = "embed"

    def __init__(
        self,
        max_length: int,
        long_documents: LongDocuments,
        max_chunks: int,
        encode_embedding: Callable[[np.ndarray], dict[str, Any]],
    ) -> None:
        self.model = ModelInfo(MODEL_ID, "1", "float32")
        self._characters = max_length * CHARACTERS_PER_TOKEN
        self._max_length = max_length
        self._long_documents = long_documents
        self._max_chunks = max_chunks
        self._encode_embedding = encode_embedding

    def prepare(self, documents: Sequence[Document]) -> list[Prepared | Rejected]:
        answers: list[Prepared | Rejected] = []
        characters = self._characters
        for document in documents:
            text, pair = document.text, document.text_pair
            size = len(text) if pair is None else len(text) + len(pair)
            if size >= characters:
                answers.append(self._long(document, size))
                continue
            length = size // CHARACTERS_PER_TOKEN + 1
            kept = document.without_text()
            answers.append(Prepared(kept, (digest(text, pair),), (length,), False, OVERHEAD))
        return answers

    def output(self, prepared: Prepared, vectors: np.ndarray) -> dict[str, Any]:
        if len(vectors) == 1:
            return self._encode_embedding(vectors[0])
        return self._encode_embedding(combine(vectors, prepared.lengths, normalize=True))

    def _long(self, document: Document, size: int) -> Prepared | Rejected:
        text, pair = document.text, document.text_pair
        tokens = size // CHARACTERS_PER_TOKEN + 1
        if self._long_documents == "truncate":
            # the vector is that of the whole text: a test can tell it from the text alone
            kept = document.without_text()
            return Prepared(kept, (digest(text, pair),), (self._max_length,), True, OVERHEAD)
        step = self._characters - 1  # so that a full chunk has max_length tokens
        parts = -(-size // step)
        if self._long_documents == "reject" or parts > self._max_chunks or pair is not None:
            return Rejected(
                Reason.TOO_LONG,
                f"the text has {tokens} tokens; model.max_length is {self._max_length}"
                + (f", model.max_chunks is {self._max_chunks}" if self._long_documents == "chunk" else ""),
            )
        chunks = [text[at : at + step] for at in range(0, size, step)]
        lengths = tuple(len(chunk) // CHARACTERS_PER_TOKEN + 1 for chunk in chunks)
        digests = tuple(map(digest, chunks))
        return Prepared(document.without_text(), digests, lengths, False, OVERHEAD * parts)


class HashRunner:
    """Turns digests into vectors, behind :class:`inferstream.device.Runner`."""

    padded = False

    def enter_thread(self) -> None:
        pass

    def run(self, items: Sequence[Any]) -> np.ndarray:
        return hash_vectors(items)
