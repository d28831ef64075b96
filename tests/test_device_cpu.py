"""The CPU device: batches compute side by side, errors come back, and its end is clean."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from inferstream.device import Flight
from inferstream.device.cpu import CpuDevice
from tests.support.leaks import Growth


class Doubling:
    """Gives twice each item; an item that is an exception is raised; ``gate`` holds batches back."""

    padded = True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Semaphore(0)
        self.entered: list[str] = []
        self.broken: Exception | None = None

    def enter_thread(self) -> None:
        self.entered.append(threading.current_thread().name)
        if self.broken is not None:
            raise self.broken

    def run(self, items: Sequence[Any]) -> np.ndarray:
        self.running.release()
        assert self.gate.wait(60)
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return np.array(items, dtype=np.float32)[:, None] * 2


@pytest.fixture
def runner() -> Doubling:
    return Doubling()


@pytest.fixture
def device(runner: Doubling) -> Iterator[CpuDevice]:
    device = CpuDevice(runner, 2)
    yield device
    runner.gate.set()
    device.close()


def wait(device: CpuDevice) -> Flight:
    flight = device.wait()
    assert flight is not None
    return flight


def test_wait_when_a_batch_ends_gives_its_rows_slot_and_time(device: CpuDevice) -> None:
    device.launch(1, [1, 2, 3])

    flight = wait(device)

    assert flight.slot == 1
    assert flight.rows is not None and flight.rows.tolist() == [[2], [4], [6]]
    assert flight.error is None
    assert flight.busy_s > 0


def test_flights_when_a_thread_waited_then_idle_and_stalled_are_told_apart(runner: Doubling) -> None:
    device = CpuDevice(runner, 1)
    runner.gate.clear()
    device.launch(0, [1])
    assert runner.running.acquire(timeout=60)
    time.sleep(0.1)  # begun, and no CPU time for it
    runner.gate.set()
    first = wait(device)
    time.sleep(0.2)
    device.launch(0, [1])
    second = wait(device)
    device.close()

    assert first.idle_s == 0.0 and first.stalled_s >= 0.1
    assert second.idle_s >= 0.2 > 0.1 > second.stalled_s
    for flight in (first, second):
        [span] = flight.spans
        assert flight.busy_s + flight.stalled_s == pytest.approx(span.end - span.start)
    assert second.idle_s == pytest.approx(second.spans[0].start - first.spans[0].end)


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), KeyboardInterrupt(), SystemExit(1)])
def test_wait_when_a_batch_raises_gives_the_error_and_the_device_goes_on(
    device: CpuDevice, error: BaseException
) -> None:
    device.launch(0, [1, error])
    failed = wait(device)
    for slot in range(device.slots):
        device.launch(slot, [1])
    flights = [wait(device) for _ in range(device.slots)]

    assert failed.slot == 0 and failed.rows is None and failed.error is error
    assert all(flight.error is None for flight in flights)


def test_launch_when_there_are_several_lanes_computes_side_by_side(
    device: CpuDevice, runner: Doubling
) -> None:
    runner.gate.clear()
    for slot in range(device.slots):
        device.launch(slot, [slot])  # does not block

    assert device.lanes == 2
    assert device.slots == 3  # one is staged
    for _ in range(2):
        assert runner.running.acquire(timeout=60)
    assert not runner.running.acquire(timeout=0.05)  # the third waits for a lane
    runner.gate.set()
    assert {wait(device).slot for _ in range(3)} == {0, 1, 2}


def test_compute_threads_when_started_enter_the_runner_once_each(device: CpuDevice, runner: Doubling) -> None:
    for slot in range(3):
        device.launch(slot, [1])
    for _ in range(3):
        wait(device)
    device.close()

    assert sorted(runner.entered) == ["cpu-0", "cpu-1"]


def test_wait_when_a_thread_could_not_enter_gives_that_error() -> None:
    runner = Doubling()
    runner.broken = OSError("no such thing")
    device = CpuDevice(runner, 1)
    device.launch(0, [1])

    assert wait(device).error is runner.broken
    device.close()


def test_close_when_batches_are_launched_lets_them_end_and_then_wakes_the_waiter(
    device: CpuDevice, runner: Doubling
) -> None:
    runner.gate.clear()
    for slot in range(3):
        device.launch(slot, [slot])
    closing = threading.Thread(target=device.close)
    closing.start()
    runner.gate.set()
    closing.join(60)

    assert {wait(device).slot for _ in range(3)} == {0, 1, 2}
    assert device.wait() is None
    assert device.wait() is None
    device.close()  # a second time does nothing
    assert not [thread for thread in device._threads if thread.is_alive()]


def test_device_when_imported_imports_no_torch() -> None:
    import subprocess
    import sys
    from pathlib import Path

    import inferstream

    assert inferstream.__file__ is not None
    code = "import sys, inferstream.device.cpu, inferstream.tasks.hash; print('torch' in sys.modules)"
    env = {"PYTHONPATH": str(Path(inferstream.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "False", done.stderr


def test_device_when_20000_batches_ran_then_it_holds_no_more_than_after_the_first(device: CpuDevice) -> None:
    def batches(count: int) -> None:
        for _ in range(count):
            device.launch(0, [1.0, 2.0])
            assert wait(device).error is None

    batches(500)
    with Growth() as growth:
        batches(20_000)

    assert growth.python_bytes < 100_000  # less than a reference for each batch
    assert growth.resident_bytes < 4 << 20
