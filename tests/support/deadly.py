"""``inferstream`` with a model that kills its process on some texts, those of DEADLY_TEXTS, one per line.

A batch with one of HELD_TEXTS makes the file HELD, and comes back when that is gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inferstream.cli.main import main
from inferstream.tasks.hash import HashRunner, digest

DEADLY, HOLDING = (
    {digest(text) for text in os.environ.get(name, "").splitlines()}
    for name in ("DEADLY_TEXTS", "HELD_TEXTS")
)
HELD = Path(os.environ.get("HELD", ""))
LOOK_S = 0.02
run = HashRunner.run


def run_or_die(self: HashRunner, items: Sequence[Any]) -> np.ndarray:
    if not DEADLY.isdisjoint(items):
        os.abort()
    if not HOLDING.isdisjoint(items):
        HELD.touch()
        while HELD.exists():
            time.sleep(LOOK_S)
    return run(self, items)


HashRunner.run = run_or_die  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
