"""A slice of the fault matrix: the real service, a real Kafka, and the verdict over the logs.

``make faults`` runs all of it; see docs/faults.md.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.catalogue import FAULTS, SLICES
from tests.faults.run import refusal, run
from tests.support.client import Kafka


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "guarantee"),
    [
        ("slice-service", "at-least-once"),
        ("slice-device", "at-least-once"),
        ("slice-transactions", "exactly-once"),
    ],
)
async def test_promises_when_faults_follow_one_another_then_all_are_kept(
    kafka: Kafka, tmp_path: Path, name: str, guarantee: str
) -> None:
    if (why := refusal(guarantee)) is not None:
        pytest.skip(f"{guarantee} is refused by this version of the service: {why}")
    faults = [FAULTS[entry] for entry in SLICES[name]]
    report = await run(kafka, name, faults, guarantee, random.SystemRandom().randrange(1 << 32), tmp_path)
    print(report)
    assert not report.problems, f"{report.problems}\nreplay: {report.replay}"
    assert len(report.counted) == len(faults), f"a fault found no input left; replay: {report.replay}"
