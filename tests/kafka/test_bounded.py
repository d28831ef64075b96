"""Promise 4 on a real Kafka: what a worker's process holds stays within what its settings say, whatever stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import start_broker
from tests.support.broker import Broker
from tests.support.memory import CASES, MIB, Growth, stopped_device


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One that is stopped and killed on the way; it comes back once its old session is over, 3 s here."""
    session = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
    broker = start_broker(tmp_path_factory.mktemp("bounded"), session)
    yield broker
    broker.remove()


def story(growth: Growth) -> str:
    sizes = [f"{size / MIB:.1f}" for size in (growth.growth, growth.bound, growth.baseline)]
    return "{}: grew by {} MiB, its bound is {}, its baseline {}".format(growth.case, *sizes)


@pytest.mark.kafka
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
async def test_memory_when_something_stops_or_pours_then_it_stays_within_the_configured_bound(
    broker: Broker, tmp_path: Path, case: str
) -> None:
    for growth in await CASES[case](broker, tmp_path / "worker"):
        print(story(growth))
        assert growth.within, story(growth)


@pytest.mark.kafka
@pytest.mark.timeout(240)
async def test_memory_when_results_wait_for_their_transactions_then_it_stays_within_the_configured_bound(
    broker: Broker, tmp_path: Path
) -> None:
    # Results keep their credit until they are committed: all that there is credit for waits in a transaction.
    delivery = {"guarantee": "exactly-once", "commit_interval_ms": 1000}
    for growth in await stopped_device(broker, tmp_path / "worker", {"delivery": delivery}):
        print(story(growth))
        assert growth.within, story(growth)
