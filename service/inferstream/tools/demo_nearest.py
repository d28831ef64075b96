"""The nearest docstrings to a question, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Neighbour:
    name: str
    cosine: float


def nearest(
    question: np.ndarray, vectors: Mapping[str, np.ndarray], excluded: Collection[str] = (), count: int = 3
) -> list[Neighbour]:
    """The ``count`` names with the greatest cosine to ``question``, the nearest first."""
    names = [name for name in vectors if name not in excluded]
    if not names:
        return []
    matrix = np.stack([vectors[name] for name in names]).astype(np.float64)
    lengths = np.linalg.norm(matrix, axis=1) * np.linalg.norm(question)
    # A vector of zeros is near to nothing.
    cosines = (matrix @ question) / np.where(lengths > 0, lengths, np.inf)
    best = np.argsort(-cosines, kind="stable")[:count]
    return [Neighbour(names[index], float(cosines[index])) for index in best]
