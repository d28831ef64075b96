"""The documents that everything is measured with: docstrings, the same ones on every run of one installation.

Half of them are short (a median of 63 of MiniLM's tokens) and a few are very long: what batches have to cope
with in real collections.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import orjson

from inferstream.tools.demo_corpus import collect

SEED = 1


@dataclass(frozen=True, slots=True)
class Corpus:
    """Distinct texts in random order."""

    texts: list[str]

    @classmethod
    def load(cls) -> Corpus:
        """Read the docstrings; takes about 4 s."""
        texts = [each.text for each in collect()]
        random.Random(SEED).shuffle(texts)
        return cls(texts)

    def take(self, count: int) -> list[str]:
        """The first ``count`` texts, from the start again (in another order) when there are not so many."""
        taken: list[str] = []
        chance = random.Random(SEED)
        turn = self.texts
        while len(taken) < count:
            taken += turn[: count - len(taken)]
            turn = chance.sample(self.texts, len(self.texts))
        return taken

    def facts(self) -> dict[str, Any]:
        """What a reader has to know of the documents; lengths in characters."""
        lengths = sorted(map(len, self.texts))
        digest = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()
        return {
            "distinct": len(lengths),
            "characters_mean": round(sum(lengths) / len(lengths)),
            "characters_p50": lengths[len(lengths) // 2],
            "characters_p95": lengths[len(lengths) * 95 // 100],
            "characters_max": lengths[-1],
            "sha256": digest[:12],
        }


def records(texts: list[str]) -> list[tuple[bytes, bytes]]:
    """Key and value of the input record of each text."""
    return [(b"%d" % n, orjson.dumps({"id": str(n), "text": text})) for n, text in enumerate(texts)]
