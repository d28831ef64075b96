"""A slice of the fault matrix: the real service, a real Kafka, and the verdict over the logs.

``make faults`` runs all of it; see docs/faults.md.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.faults.catalogue import FAULTS, SLICES
from tests.faults.run import run
from tests.support.client import Kafka

UNDER = {"slice-offsets": "at-least-once", "slice-transactions": "exactly-once"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine that has much else to do; quiet, it is one minute
async def test_promises_when_faults_follow_one_another_then_all_are_kept(
    kafka: Kafka, tmp_path: Path
) -> None:
    """Under both guarantees side by side: what takes time is waiting, for sessions to end and workers to start."""
    seed = random.SystemRandom().randrange(1 << 32)
    reports = await asyncio.gather(
        *(
            run(kafka, name, [FAULTS[entry] for entry in SLICES[name]], guarantee, seed, tmp_path / name)
            for name, guarantee in UNDER.items()
        )
    )
    for report in reports:
        print(report)
    for report in reports:
        assert not report.problems, f"{report.problems}\nreplay: {report.replay}"
    for report in reports:
        uncounted = [injection for injection in report.injections if not injection.counted]
        assert not uncounted, f"a fault found no input left: {uncounted}; replay: {report.replay}"
