"""``python -m tests.faults.worker run …``: what ``inferstream run`` is, with a device that can be told to fail.

Everything is the service's own but the runner behind the device of ``builtin:hash``.  What it shall do is in the
file that FAULTS_ORDER names, which it looks for before each batch; it touches ``<file>.obeyed`` when it has done so:

``{"do": "raise", "byte": n}``   raise on every batch that holds a document whose digest begins with byte n
``{"do": "memory", "most": n}``  run out of memory on every batch of more than n documents
``{"do": "slow", "seconds": s}`` take so long for every batch
``{"do": "poison"}``             fail for good, once
``{"do": "hang"}``               never come back from this batch
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from inferstream import app
from inferstream.cli.main import main
from inferstream.device.cpu import CpuDevice
from inferstream.errors import DeviceFailed, OutOfMemory
from inferstream.models.loading import Loaded, load
from inferstream.settings import Settings
from inferstream.tasks.hash import HashRunner


class FaultyRunner(HashRunner):
    """The hash device's runner, under orders; items are digests."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._obeyed = order.with_suffix(".obeyed")

    def run(self, items: Sequence[Any]) -> np.ndarray:
        try:
            order = json.loads(self._order.read_bytes())
        except FileNotFoundError:
            return super().run(items)
        match order["do"]:
            case "raise" if any(item[0] == order["byte"] for item in items):
                self._obeyed.touch()
                raise RuntimeError("told to raise")
            case "memory" if len(items) > order["most"]:
                self._obeyed.touch()
                raise OutOfMemory("told to have too little memory")
            case "slow":
                self._obeyed.touch()
                time.sleep(order["seconds"])
            case "poison":
                self._once()
                raise DeviceFailed("told to be poisoned")
            case "hang":
                self._once()
                threading.Event().wait()
        return super().run(items)

    def _once(self) -> None:
        """The process that comes after this one shall be healthy."""
        self._order.unlink()
        self._obeyed.touch()


def load_faulty(settings: Settings, encode_embedding: Callable[..., dict[str, Any]]) -> Loaded:
    loaded = load(settings, encode_embedding)
    loaded.device.close()
    return replace(loaded, device=CpuDevice(FaultyRunner(Path(os.environ["FAULTS_ORDER"])), 1, "hash"))


if __name__ == "__main__":
    app.run = functools.partial(app.run, load_model=load_faulty)  # type: ignore[assignment]
    sys.exit(main())
