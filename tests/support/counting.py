"""``inferstream`` with a device that writes down what it computes, and can be held.

Each batch appends the digests of its documents to the file COMPUTED, one a line, when it begins.  While the file HOLD
exists, no batch comes back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inferstream.cli.main import main
from inferstream.tasks.hash import HashRunner

COMPUTED, HOLD = Path(os.environ["COMPUTED"]), Path(os.environ["HOLD"])
LOOK_S = 0.02
run = HashRunner.run


def run_and_tell(self: HashRunner, items: Sequence[Any]) -> np.ndarray:
    with COMPUTED.open("a") as log:
        log.write("".join(f"{item.hex()}\n" for item in items))
    while HOLD.exists():
        time.sleep(LOOK_S)
    return run(self, items)


HashRunner.run = run_and_tell  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
