"""A worker as `inferstream run` starts it, whose device can be held.  ``python -m tests.support.held_worker JSON``.

``config`` is its settings file.  While the file ``hold`` exists, a batch does not come back from the device; otherwise
it takes ``document_s`` seconds per document.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from inferstream import app
from inferstream.device.cpu import CpuDevice
from inferstream.models.loading import Loaded, load
from inferstream.settings import Settings, cores, device_kind, load_settings, resolve
from inferstream.tasks.hash import HashRunner
from inferstream.telemetry.logs import configure

LOOK_S = 0.05


class HeldRunner(HashRunner):
    def __init__(self, hold: Path, document_s: float) -> None:
        self._hold = hold
        self._document_s = document_s

    def run(self, items: Sequence[Any]) -> np.ndarray:
        time.sleep(self._document_s * len(items))
        while self._hold.exists():
            time.sleep(LOOK_S)
        return super().run(items)


async def serve(options: dict[str, Any]) -> None:
    loaded = load_settings([Path(options["config"])], environ={})
    settings = resolve(loaded.settings, device_kind(loaded.settings), cores())
    configure(settings.telemetry.log_format, settings.telemetry.log_level)

    def load_model(settings: Settings, encode: Callable[..., dict[str, Any]]) -> Loaded:
        found = load(settings, encode)
        found.device.close()
        return replace(found, device=CpuDevice(HeldRunner(Path(options["hold"]), options["document_s"]), 1))

    await app.run(settings, load_model=load_model)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
