"""Is memory bounded by the settings?  How much a worker's process grows while something stops or pours.

    python -m benchmarks.bounded

The cases are those of ``tests/kafka/test_bounded.py``, in front of a real broker that they freeze and kill.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks.machine import hardware
from benchmarks.report import number, table
from tests.support.broker import create_broker
from tests.support.memory import CASES, CONSTANT, MIB, Growth

BROKER = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
HEAD = ["case", "configured bound, MiB", "grew by, MiB", "ratio", "before, MiB"]


def row(growth: Growth) -> list[str]:
    bound, grown, before = (size / MIB for size in (growth.bound, growth.growth, growth.baseline))
    return [growth.case, number(bound), number(grown), f"{grown / bound:.2f}", number(before)]


async def measure(folder: Path) -> list[Growth]:
    broker = create_broker(folder / "kafka", BROKER)
    try:
        return [
            growth
            for name, case in CASES.items()
            for growth in await case(broker, folder / name.replace(" ", "-"))
        ]
    finally:
        broker.remove()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="inferstream-bounded-") as folder:
        found = asyncio.run(measure(Path(folder)))
    machine = hardware()
    print(table(HEAD, [row(growth) for growth in found]))
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores, {machine['memory']}; peaks of VmHWM over VmRSS before."
    )
    beyond = [growth.case for growth in found if not growth.within]
    if beyond:
        print(f"\nBeyond bound and constant ({CONSTANT / MIB:.0f} MiB): {', '.join(beyond)}")
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
