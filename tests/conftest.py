"""Fixtures and markers for all tests.

``kafka``       the real broker, one for the whole run: make topics and groups with ``kafka.unique(name)``
``own_broker``  a real broker for one test, to stop, kill and start again
``launch``      starts workers as child processes; what still runs at the end of the test is killed
``one_thread``  torch computes with one thread in the tests of a module
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before anything imports torch or transformers: no hub is asked, the tokenizer starts no threads of its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts us in the background has SIGINT ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import Phase, settings

from tests.support.broker import Broker, BrokerUnavailable, create_broker
from tests.support.client import Kafka
from tests.support.worker import Worker

BROKER_FIXTURES = {"kafka", "own_broker", "secure"}
SHRINKING_S = 300  # the longest that Hypothesis looks for the shortest form of a failure

# Explaining a failure traces every line, which makes the search for its shortest form several times slower.
settings.register_profile("inferstream", phases=set(Phase) - {Phase.explain}, print_blob=True)
settings.load_profile("inferstream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a failed property time to be told; mark what uses the real broker, and say so where CI counts it."""
    for item in items:
        if item.path.stem.endswith("_properties"):
            item.add_marker(pytest.mark.timeout(2 * SHRINKING_S))
        if BROKER_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            continue
        item.add_marker(pytest.mark.kafka)
        item.user_properties.append(("marker", "kafka"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One OpenMP thread in the test's thread: several only wait for each other on a busy machine."""
    import torch  # most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A real Kafka: the one of INFERSTREAM_TEST_BOOTSTRAP, else one of our own.  Never skipped."""
    if bootstrap := os.environ.get("INFERSTREAM_TEST_BOOTSTRAP"):
        yield Kafka(bootstrap)
        return
    broker = start_broker(tmp_path_factory.mktemp("kafka"))
    yield broker
    broker.remove()


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A real Kafka that is this test's alone."""
    # Killed, a broker comes back once its old session is over: 3 s here, 9 s by default.
    session = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
    broker = start_broker(tmp_path / "own-broker", session)
    yield broker
    broker.remove()


def start_broker(folder: Path, overrides: Mapping[str, str] | None = None) -> Broker:
    try:
        return create_broker(folder, overrides)
    except BrokerUnavailable as error:
        reason = str(error)
    pytest.fail(reason, pytrace=False)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """``launch(tree)`` starts a worker with the settings tree; see :class:`tests.support.worker.Worker`."""
    workers: list[Worker] = []

    def start(tree: Mapping[str, Any], **options: Any) -> Worker:
        worker = Worker(tmp_path / f"worker-{len(workers) + 1}", tree, **options)
        workers.append(worker)
        return worker.start()

    yield start
    for worker in workers:
        worker.kill9()
