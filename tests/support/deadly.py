"""``inferstream`` with a model that kills its process on some texts: those of DEADLY_TEXTS, one per line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from inferstream.cli.main import main
from inferstream.tasks.hash import HashRunner, digest

DEADLY = {digest(text) for text in os.environ["DEADLY_TEXTS"].splitlines()}
run = HashRunner.run


def run_or_die(self: HashRunner, items: Sequence[Any]) -> np.ndarray:
    if not DEADLY.isdisjoint(items):
        os.abort()
    return run(self, items)


HashRunner.run = run_or_die  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
