"""The CUDA device on streams that do everything as late and in as odd an order as the events allow.

What cannot be tested here is torch.cuda itself; see tests/gpu and docs/gpu.md.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inferstream.batching import Item
from inferstream.device import Flight
from inferstream.device.cuda import Clock, CudaDevice, Marks
from inferstream.device.stage import DeviceStage
from inferstream.errors import DeviceFailed, OutOfMemory, SettingsError
from inferstream.telemetry.timeline import Timeline
from tests.support.leaks import Growth
from tests.support.streams import Choose, FakeEvent, FakeStreams, Poison, ToyForward, check_times

MAX_TOKENS, MAX_ITEMS, MAX_LENGTH = 64, 8, 16

Batch = list[Any]
pieces = st.lists(st.integers(0, 1000), min_size=1, max_size=MAX_LENGTH)
some_batches = st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=12)


def made(
    streams: FakeStreams, forward: ToyForward | None = None, *, slots: int = 3, graphs: int = 0
) -> CudaDevice:
    return CudaDevice(
        forward or ToyForward(),
        streams,
        max_tokens=MAX_TOKENS,
        max_length=MAX_LENGTH,
        max_items=MAX_ITEMS,
        slots=slots,
        graphs=graphs,
    )


def drive(device: CudaDevice, batches: Sequence[Batch], choose: Choose) -> list[Flight]:
    """Launch and wait in any order that the stage could; the flights, one per batch in order."""
    free = list(range(device.slots))
    flights: list[Flight] = []
    launched = 0
    while len(flights) < len(batches):
        may_launch = bool(free) and launched < len(batches)
        if may_launch and (launched == len(flights) or choose(2)):
            device.launch(free.pop(choose(len(free))), batches[launched])
            launched += 1
        else:
            flight = device.wait()
            assert flight is not None
            free.append(flight.slot)
            flights.append(flight)
    return flights


def wrong_rows(forward: ToyForward, batches: Sequence[Batch], flights: Sequence[Flight]) -> int:
    """How many batches did not get their own rows."""
    wrong = 0
    for items, flight in zip(batches, flights, strict=True):
        rows = None if flight.rows is None else flight.rows.tolist()
        wrong += rows != [forward.row(item) for item in items]
    return wrong


def choose_of(source: random.Random) -> Choose:
    return lambda n: source.randrange(n)


def random_batches(source: random.Random, count: int) -> list[Batch]:
    def piece() -> list[int]:
        return [source.randrange(1000) for _ in range(source.randint(1, MAX_LENGTH))]

    return [[piece() for _ in range(source.randint(1, 4))] for _ in range(count)]


# ---- order: no slot is used too early


@given(batches=some_batches, slots=st.integers(1, 4), source=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_batches_when_the_device_is_late_and_out_of_order_then_each_gets_its_own_rows(
    batches: list[Batch], slots: int, source: random.Random
) -> None:
    forward = ToyForward()
    device = made(FakeStreams(choose_of(source)), forward, slots=slots)

    flights = drive(device, batches, choose_of(source))

    assert wrong_rows(forward, batches, flights) == 0
    assert forward.torn == 0


@given(
    batches=some_batches,
    refused=st.sets(st.integers(0, 11), max_size=4),
    source=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_batches_when_some_stop_half_way_then_what_they_had_queued_sees_its_own_slot(
    batches: list[Batch], refused: set[int], source: random.Random
) -> None:
    streams, forward = FakeStreams(choose_of(source)), ToyForward()
    device = made(streams, forward)
    streams.refused = {streams.runs + n: RuntimeError(f"batch {n}") for n in refused}

    flights = drive(device, batches, choose_of(source))

    for n, (items, flight) in enumerate(zip(batches, flights, strict=True)):
        if n in refused:
            assert flight.rows is None and str(flight.error) == f"batch {n}"
        else:
            assert wrong_rows(forward, [items], [flight]) == 0
    assert forward.torn == 0


@pytest.mark.parametrize(
    "deaf",
    [
        ("compute", "h2d"),  # computes what has not arrived
        ("d2h", "compute"),  # copies out what is not computed
        ("host", "d2h"),  # takes the rows, and frees the slot, before they have landed
        ("host", "all"),  # starts while the weights are on their way
    ],
)
def test_batches_when_one_dependency_is_left_out_then_the_rows_are_wrong(deaf: tuple[str, str]) -> None:
    """The streams of these tests can tell: without this test the ones above would prove nothing."""
    assert _mistakes(()) == 0

    assert _mistakes([deaf]) > 0


def _mistakes(deaf: Collection[tuple[str, str]]) -> int:
    mistakes = 0
    for seed in range(30):
        source = random.Random(seed)
        streams, forward = FakeStreams(choose_of(source)), ToyForward(weight=0.0)
        streams.default.run(partial(setattr, forward, "weight", 2.0))
        if ("host", "all") in deaf:
            streams.deaf = frozenset(deaf)
        device = made(streams, forward)
        streams.deaf = frozenset(deaf)
        batches = random_batches(source, 10)
        flights = drive(device, batches, choose_of(source))
        streams.settle()
        forward.weight = 2.0
        mistakes += wrong_rows(forward, batches, flights) + forward.torn
    return mistakes


def test_failed_batches_when_the_slot_is_freed_at_once_then_their_kernels_read_the_next_one() -> None:
    """Why a failed batch comes back only after the end of what it had queued."""

    def torn(deaf: Collection[tuple[str, str]]) -> int:
        found = 0
        for seed in range(30):
            source = random.Random(seed)
            streams, forward = FakeStreams(choose_of(source)), ToyForward()
            device = made(streams, forward)
            streams.refused = {streams.runs + n: RuntimeError() for n in range(10)}
            streams.deaf = frozenset(deaf)
            drive(device, random_batches(source, 10), choose_of(source))
            streams.settle()
            found += forward.torn
        return found

    assert torn(()) == 0
    assert torn([("host", "d2h")]) > 0


def test_launch_when_the_slots_batch_has_not_come_back_then_it_is_refused() -> None:
    device = made(FakeStreams())
    device.launch(1, [[1]])

    with pytest.raises(ValueError, match="slot 1 holds a batch that has not come back"):
        device.launch(1, [[2]])


def test_rows_when_the_slot_is_used_again_stay_what_they_were() -> None:
    device = made(FakeStreams(), slots=1)
    device.launch(0, [[1, 2]])
    first = device.wait()
    device.launch(0, [[500, 600]])
    device.wait()

    assert first is not None and first.rows is not None
    assert first.rows.tolist() == [[3.0, 2.0, 1.0, 2.0]]


def test_device_when_warm_then_nothing_waits_for_the_whole_gpu_and_no_memory_is_taken() -> None:
    streams = FakeStreams(choose_of(random.Random(3)))
    device = made(streams)
    settled, arrays = streams.settled, len(streams.arrays)

    drive(device, random_batches(random.Random(4), 50), choose_of(random.Random(5)))

    assert settled > 0
    assert (streams.settled, len(streams.arrays)) == (settled, arrays)


# ---- time


@given(source=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_flights_when_they_land_then_busy_idle_and_spans_are_those_of_the_streams(
    source: random.Random,
) -> None:
    device = made(FakeStreams(choose_of(source)))
    marks: list[Marks] = []
    spans = device._clock.spans

    def noted(of_batch: Marks, now: float) -> Any:
        marks.append(of_batch)
        return spans(of_batch, now)

    with patch.object(device._clock, "spans", noted):
        flights = drive(device, random_batches(source, 12), choose_of(source))

    check_times(flights)
    ends = [None, *(of_batch.computed.at for of_batch in marks)]
    gaps = [
        0.0 if end is None else of_batch.began.at - end for of_batch, end in zip(marks, ends, strict=False)
    ]
    assert [flight.idle_s for flight in flights] == gaps
    assert [flight.busy_s for flight in flights] == [each.computed.at - each.began.at for each in marks]
    assert all(flight.stalled_s == 0.0 for flight in flights)


def test_flights_when_the_stream_waits_between_them_then_some_time_is_idle() -> None:
    streams = FakeStreams(choose_of(random.Random(1)))
    device = made(streams, slots=1)

    flights = drive(device, random_batches(random.Random(2), 20), choose_of(random.Random(3)))

    assert all(
        flight.idle_s > 0.0 for flight in flights[1:]
    )  # with one slot it waits for the host every time


def test_flight_when_the_one_before_failed_then_its_time_is_nobodys_idle_time() -> None:
    streams = FakeStreams(choose_of(random.Random(6)))
    device = made(streams)
    streams.refused = {streams.runs + 1: RuntimeError("half-way")}

    flights = drive(device, random_batches(random.Random(7), 4), choose_of(random.Random(8)))

    assert [flight.error is None for flight in flights] == [True, False, True, True]
    assert flights[2].idle_s == 0.0


def test_flight_when_it_is_the_first_after_warming_up_then_the_wait_for_it_is_nobodys_idle_time() -> None:
    device = made(FakeStreams())
    device.run([[1, 2]])

    [flight] = drive(device, [[[3]]], lambda n: 0)

    assert flight.idle_s == 0.0


def _marks(streams: FakeStreams, *times: float) -> Marks:
    events = []
    for time_s in times:
        event = FakeEvent(streams.h2d)
        event.at = time_s
        events.append(event)
    return Marks(*events)


def test_clock_when_batches_follow_each_other_then_their_distances_are_exact() -> None:
    streams, clock = FakeStreams(), Clock()

    first = clock.spans(_marks(streams, 10, 11, 12, 14, 15, 16), now=106.0)
    second = clock.spans(_marks(streams, 13, 14, 14, 17, 18, 19), now=109.5)  # seen half a second late

    assert [span[1:] for span in first] == [
        ("h2d", 100.0, 101.0),
        ("compute", 102.0, 104.0),
        ("d2h", 105.0, 106.0),
    ]
    assert [span[1:] for span in second] == [
        ("h2d", 103.0, 104.0),
        ("compute", 104.0, 107.0),
        ("d2h", 108.0, 109.0),
    ]


def test_clock_when_the_gpus_clock_is_ahead_then_nothing_lands_after_it_was_seen() -> None:
    streams, clock = FakeStreams(), Clock()
    clock.spans(_marks(streams, 0, 0, 0, 0, 0, 1), now=101.0)

    spans = clock.spans(_marks(streams, 1000, 1000, 1000, 1000, 1000, 1001), now=1100.9)

    assert spans[-1].end == pytest.approx(1100.9)


def test_clock_when_the_gpus_clock_is_behind_then_it_is_moved_to_the_soonest_seen() -> None:
    streams, clock = FakeStreams(), Clock()
    for n in range(Clock.WINDOW):
        spans = clock.spans(_marks(streams, n, n, n, n, n, n + 1), now=101.0 + n + (0.25 if n else 0.0))
    for n in range(Clock.WINDOW, 2 * Clock.WINDOW):
        spans = clock.spans(_marks(streams, n, n, n, n, n, n + 1), now=101.25 + n)

    assert spans[-1].end == pytest.approx(101.25 + n)


# ---- failures


def test_batch_when_packing_or_the_forward_raises_then_only_it_fails() -> None:
    streams = FakeStreams()
    device = made(streams)
    streams.refused = {streams.runs + 1: ValueError("forward")}
    batches: list[Batch] = [[[1]], [[2]], [[3], Poison(ValueError("pack"))], [[4]], [[5]]]

    flights = drive(device, batches, lambda n: n - 1)

    assert [str(flight.error) for flight in flights] == ["None", "forward", "pack", "None", "None"]
    assert streams.emptied == 1  # at warm-up


def test_batch_when_it_is_larger_than_a_slot_then_it_fails_alone() -> None:
    device = made(FakeStreams())

    flights = drive(device, [[[1]] * (MAX_ITEMS + 1), [[1]]], lambda n: 0)

    assert "larger than a staging slot" in str(flights[0].error)
    assert flights[1].error is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore advice"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    ],
)
def test_batch_when_memory_is_out_then_it_says_so_and_the_cache_is_emptied(error: Exception) -> None:
    streams = FakeStreams()
    device = made(streams)
    streams.refused = {streams.runs: error}
    emptied = streams.emptied

    first, second = drive(device, [[[1]], [[2]]], lambda n: 0)

    assert isinstance(first.error, OutOfMemory)
    assert "\n" not in str(first.error)
    assert streams.emptied == emptied + 1
    assert second.error is None


ROOT = Path(__file__).resolve().parents[1]
CHILD = {**os.environ, "PYTHONPATH": f"{ROOT / 'service'}:{ROOT}"}

POISONED = torch.AcceleratorError("CUDA error: device-side assert triggered\nSearch for it in the manual")


def test_device_when_its_context_dies_while_batches_are_in_flight_then_all_fail_and_nothing_more_is_launched() -> (
    None
):
    streams = FakeStreams()
    device = made(streams)
    device.launch(0, [[1]])
    device.launch(1, [[2]])
    streams.died = POISONED  # the kernel of batch 0, which the waiter hears of first
    runs = streams.runs
    flights = [device.wait(), device.wait()]
    streams.died = None  # were it asked again, the launch below would be seen
    device.launch(2, [[3]])
    device.launch(0, [[4]])
    flights += [device.wait(), device.wait()]

    assert [flight and flight.slot for flight in flights] == [0, 1, 2, 0]
    assert {str(flight and flight.error) for flight in flights} == {
        "fake:0 failed for good: CUDA error: device-side assert triggered"
    }
    assert all(flight and isinstance(flight.error, DeviceFailed) for flight in flights)
    assert streams.runs == runs


ABORTS = """
import os, sys
import torch
from inferstream.device.cuda import CudaDevice
from tests.support.streams import FakeStreams, ToyForward

class Guard:
    def __del__(self):
        os.abort()  # as PyTorch's host allocator does, that cannot record an event on a dead stream

class Streams(FakeStreams):
    def array(self, *size, dtype, pinned=False):
        made = torch.zeros(size, dtype=dtype)
        if pinned:
            made.guard = Guard()
        return made

    def run_unwaited(self, work):
        self.died = self.waits  # as a hidden fault in a kernel of the warm-up
        super().run_unwaited(work)

def life():
    streams = Streams()
    WARMED_UP
    device = CudaDevice(ToyForward(), streams, max_tokens=512, max_length=16, max_items=64, graphs=2, vocabulary=9)
    device.launch(0, [[1]])
    streams.died = torch.AcceleratorError("CUDA error: device-side assert triggered")
    return device.wait().error

try:
    error = life()
except Exception as failed:
    error = failed
print(type(error).__name__, flush=True)
del error
sys.exit(5)
"""


@pytest.mark.parametrize("warmed_up", ["pass", "streams.waits = torch.AcceleratorError('CUDA error: ECC')"])
def test_process_when_the_context_died_then_its_end_frees_no_pinned_memory(warmed_up: str) -> None:
    command = [sys.executable, "-c", ABORTS.replace("WARMED_UP", warmed_up)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=CHILD)

    assert (done.stdout, done.returncode) == ("DeviceFailed\n", 5), done.stderr[-2000:]


def test_device_when_the_launcher_hears_of_the_death_first_then_batches_before_it_fail_too() -> None:
    streams = FakeStreams()
    device = made(streams)
    device.launch(0, [[1]])
    streams.died = POISONED
    device.launch(1, [[2]])
    streams.died = None

    flights = [device.wait(), device.wait()]

    assert all(flight and isinstance(flight.error, DeviceFailed) for flight in flights)


def test_error_when_the_context_lives_on_then_it_is_the_batchs_own() -> None:
    streams = FakeStreams()
    device = made(streams)
    streams.refused = {streams.runs: torch.AcceleratorError("CUDA error: invalid configuration argument")}

    first, second = drive(device, [[[1]], [[2]]], lambda n: 0)

    assert isinstance(first.error, torch.AcceleratorError)
    assert second.error is None


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            SettingsError,
            "model.max_length: a document of 16 tokens",
        ),
        (
            POISONED,
            DeviceFailed,
            "fake:0 failed while it was warmed up: CUDA error: device-side assert triggered",
        ),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_start_when_warming_up_raises_then_it_says_what_to_do(
    error: Exception, kind: type[Exception], text: str
) -> None:
    streams = FakeStreams()
    streams.refused = dict.fromkeys(range(100), error)  # smaller batches do not fit either

    with pytest.raises(kind, match=text):
        made(streams)


# ---- memory


@pytest.mark.parametrize(("free", "fitting"), [(1 << 30, MAX_TOKENS), (2000, 25), (1, MAX_LENGTH)])
def test_max_tokens_when_memory_is_measured_is_what_fits_but_never_less_than_a_document(
    free: int, fitting: int
) -> None:
    streams = FakeStreams()
    streams.free = free
    streams.bytes_per_run = 4096  # of a batch of 64 tokens: 64 a token

    assert made(streams).max_tokens == fitting


class Limited(ToyForward):
    """Runs out of memory above so many tokens."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def pack(self, items: Any, slab: Any, capacity: Any = None) -> Any:
        if sum(map(len, items)) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().pack(items, slab, capacity)


@pytest.mark.parametrize(("most", "fitting"), [(63, 32), (32, 32), (16, 16)])
def test_max_tokens_when_the_probe_does_not_fit_then_a_smaller_one_is_tried(most: int, fitting: int) -> None:
    streams = FakeStreams()

    device = made(streams, Limited(most))

    assert device.max_tokens == fitting
    assert streams.emptied > 0
    assert len(device.run([[1] * MAX_LENGTH] * 4)) == 4  # as the warm-up: more than a batch, so in several


def test_device_when_not_even_one_document_fits_then_it_is_refused() -> None:
    with pytest.raises(SettingsError, match="a document of 16 tokens does not fit the memory of fake:0"):
        made(FakeStreams(), Limited(15))


def test_max_tokens_when_a_document_may_be_longer_than_the_budget_is_at_least_the_document() -> None:
    device = CudaDevice(ToyForward(), FakeStreams(), max_tokens=8, max_length=32, max_items=4)

    assert device.max_tokens == 32
    assert device.run([list(range(32))]).shape == (1, 4)


def test_device_when_20000_batches_ran_then_it_holds_no_more_than_after_the_first() -> None:
    forward = ToyForward()
    device = made(FakeStreams(), forward)
    batches: list[Batch] = [[[1, 2]]] * 20

    def batches_of_20(times: int) -> None:
        for _ in range(times):
            drive(device, batches, lambda n: n - 1)
            forward.packed.clear()

    batches_of_20(20)
    with Growth() as growth:
        batches_of_20(1000)

    assert growth.python_bytes < 100_000  # less than a reference for each batch
    assert growth.resident_bytes < 4 << 20


def test_allocator_when_it_emptied_its_cache_by_itself_then_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams = FakeStreams()
    device = made(streams)
    batches: list[Batch] = [[[1, 2]]] * 300
    drive(device, batches, lambda n: n - 1)
    quiet = "allocator" not in caplog.text
    streams.retries = 3

    drive(device, batches * 3, lambda n: n - 1)

    [line] = [record for record in caplog.records if "allocator" in record.message]
    assert quiet and line.retries == 3  # type: ignore[attr-defined]  # from extra


# ---- graphs


@given(batches=some_batches, source=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_batches_when_they_run_as_graphs_then_each_gets_its_own_rows(
    batches: list[Batch], source: random.Random
) -> None:
    streams, forward = FakeStreams(choose_of(source)), ToyForward()
    device = CudaDevice(
        forward, streams, max_tokens=512, max_length=MAX_LENGTH, max_items=64, graphs=4, vocabulary=1000
    )
    forward.packed.clear()
    replays = sum(graph.replays for graph in streams.graphs)

    flights = drive(device, batches, choose_of(source))

    assert wrong_rows(forward, batches, flights) == 0
    assert forward.torn == 0
    assert None not in forward.packed  # every batch was small enough
    assert sum(graph.replays for graph in streams.graphs) == replays + len(batches)


def test_graphs_when_one_gives_other_rows_then_there_are_none_and_batches_run_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams, forward = FakeStreams(), ToyForward()
    streams.break_graph = lambda work: lambda: None  # replays nothing: the outbox keeps what was in it

    device = CudaDevice(forward, streams, max_tokens=512, max_length=MAX_LENGTH, graphs=4, vocabulary=1000)
    rows = device.run([[5, 6]])

    assert rows.tolist() == [[11.0, 2.0, 5.0, 6.0]]
    assert len(streams.graphs) == 1
    [line] = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert line == "no CUDA graphs: batches are launched kernel by kernel, which is slower"


def recorded(streams: FakeStreams, forward: ToyForward, max_tokens: int, graphs: int) -> CudaDevice:
    return CudaDevice(
        forward,
        streams,
        max_tokens=max_tokens,
        max_length=MAX_LENGTH,
        max_items=64,
        graphs=graphs,
        vocabulary=1000,
    )


def test_graphs_when_recorded_are_so_from_the_largest_to_the_smallest() -> None:
    streams, forward = FakeStreams(), ToyForward()
    captured: list[int] = []
    streams.break_graph = lambda work: captured.append(forward.packed[-1].tokens) or work

    device = recorded(streams, forward, 2048, 4)

    assert captured == [2048, 768, 512, 256]
    assert [each.tokens for each in device._graphs.shapes] == [256, 512, 768, 2048]


def test_batches_when_they_are_full_then_they_run_as_the_budgets_graph() -> None:
    streams, forward = FakeStreams(), ToyForward()
    device = recorded(streams, forward, 1000, 2)
    full: Batch = [[n] * 15 for n in range(60)]
    forward.packed.clear()

    [flight] = drive(device, [full], lambda n: 0)

    assert wrong_rows(forward, [full], [flight]) == 0
    assert [each.tokens for each in forward.packed] == [1000]


def test_graphs_when_memory_holds_less_than_two_of_the_largest_then_smaller_ones_are_recorded() -> None:
    streams, forward = FakeStreams(), ToyForward()
    streams.bytes_per_run = 992  # of a batch of 992 tokens: one each
    streams.free = 2400  # of which 80 % are planned with

    device = recorded(streams, forward, 1000, 10)

    assert [each.tokens for each in device._graphs.shapes] == [256, 512, 768]
    assert device.max_tokens == 1000


def test_graphs_when_the_forward_waits_for_the_gpu_then_nothing_is_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams, forward = FakeStreams(), ToyForward()
    streams.waits = RuntimeError("called a synchronizing CUDA operation")

    device = recorded(streams, forward, 1024, 4)

    assert streams.graphs == []
    assert device.run([[5, 6]]).tolist() == [[11.0, 2.0, 5.0, 6.0]]
    [line] = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert line.message == "no CUDA graphs: batches are launched kernel by kernel, which is slower"
    assert "synchronizing" in line.why  # type: ignore[attr-defined]  # from extra


@pytest.mark.parametrize(
    ("error", "kept", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), [256, 768, 2048], "fewer CUDA graphs than planned"),
        (
            RuntimeError("operation not permitted when stream is capturing"),
            [],
            "no CUDA graphs: batches are launched kernel by kernel, which is slower",
        ),
    ],
)
def test_graphs_when_one_cannot_be_recorded_then_others_are_kept_only_if_memory_was_out(
    caplog: pytest.LogCaptureFixture, error: Exception, kept: list[int], said: str
) -> None:
    streams, forward = FakeStreams(), ToyForward()
    asked: list[None] = []

    def refuse_the_third(work: Any) -> Any:
        asked.append(None)
        if len(asked) == 3:
            raise error
        return work

    streams.break_graph = refuse_the_third
    device = recorded(streams, forward, 2048, 4)
    replays = sum(graph.replays for graph in streams.graphs)
    items = [[5] * 15] * 48
    rows = device.run(items)

    assert [each.tokens for each in device._graphs.shapes] == kept
    assert rows.tolist() == [forward.row(item) for item in items]
    assert sum(graph.replays for graph in streams.graphs) == replays + bool(kept)
    [line] = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert line.message == said
    assert getattr(line, "graphs", 0) == len(kept)


def test_graphs_when_a_failed_recording_spoils_those_before_it_then_there_are_none() -> None:
    streams, forward = FakeStreams(), ToyForward()
    spoiled = []

    def record(work: Any) -> Any:
        if len(streams.graphs) == 2:
            spoiled.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None if spoiled else work()

    streams.break_graph = record
    device = recorded(streams, forward, 2048, 4)
    assert spoiled
    replays = sum(graph.replays for graph in streams.graphs)

    assert device.run([[5, 6]]).tolist() == [[11.0, 2.0, 5.0, 6.0]]
    assert sum(graph.replays for graph in streams.graphs) == replays


def test_graphs_when_recording_runs_out_of_memory_then_each_is_tried_and_there_are_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streams, forward = FakeStreams(), ToyForward()
    refused: list[None] = []

    def refuse(work: Any) -> Any:
        refused.append(None)
        raise torch.OutOfMemoryError("CUDA out of memory")

    streams.break_graph = refuse
    device = recorded(streams, forward, 2048, 4)
    forward.packed.clear()

    assert device.run([[5, 6]]).tolist() == [[11.0, 2.0, 5.0, 6.0]]
    assert forward.packed == [None]  # eagerly
    assert len(refused) == 4
    assert streams.emptied >= 4
    assert "no CUDA graphs" in caplog.text


# ---- behind the stage, with its threads


class Outcomes:
    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}
        self.failed: dict[int, BaseException] = {}
        self.memory: list[int] = []
        self.dead: list[BaseException] = []
        self.changed = asyncio.Event()

    def batch_done(self, items: Sequence[Item], rows: np.ndarray) -> None:
        self.rows |= {item.index: row.tolist() for item, row in zip(items, rows, strict=True)}

    def item_failed(self, item: Item, error: BaseException) -> None:
        self.failed[item.index] = error

    def out_of_memory(self, items: Sequence[Item]) -> None:
        self.memory.append(len(items))

    def device_failed(self, error: BaseException) -> None:
        self.dead.append(error)
        self.changed.set()

    def slot_freed(self) -> None:
        self.changed.set()


def items_of(batch: Batch, first: int) -> list[Item]:
    return [Item(None, first + n, len(piece), 0.0, piece) for n, piece in enumerate(batch)]


async def through(stage: DeviceStage, outcomes: Outcomes, batches: Sequence[list[Item]]) -> None:
    """All batches, and the halves of those that failed."""
    waiting = list(batches)
    while waiting or not stage.idle:
        while stage.free_slots and (items := stage.next_retry() or (waiting.pop(0) if waiting else None)):
            stage.launch(items)
        outcomes.changed.clear()
        async with asyncio.timeout(20):
            await outcomes.changed.wait()
        if outcomes.dead:
            return


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.mark.usefixtures("no_threads_left")
@pytest.mark.parametrize("seed", range(5))
async def test_stage_when_batches_fail_and_run_out_of_memory_then_every_document_gets_its_end(
    seed: int,
) -> None:
    source = random.Random(seed)
    streams, forward = FakeStreams(choose_of(source)), ToyForward()
    device = made(streams, forward)
    streams.refused = {
        streams.runs + 3: torch.OutOfMemoryError("CUDA out of memory"),
        streams.runs + 5: OSError(),
    }
    outcomes = Outcomes()
    stage = DeviceStage(device, outcomes, asyncio.get_running_loop(), Timeline())
    batches: list[Batch] = random_batches(source, 20)
    batches[7] = [[1], Poison(ValueError("bad")), [2], [3]]
    numbered = [items_of(batch, 10 * n) for n, batch in enumerate(batches)]

    await through(stage, outcomes, numbered)
    stage.close(5)

    expected = {item.index: forward.row(item.payload) for items in numbered for item in items}
    single = set(outcomes.failed) - {71}  # a batch of one that was refused has no half to be tried again
    assert set(outcomes.rows) | set(outcomes.failed) == set(expected)
    assert len(single) <= 2 and str(outcomes.failed[71]) == "bad"
    assert all(outcomes.rows[index] == expected[index] for index in outcomes.rows)
    assert len(outcomes.memory) == 1


@pytest.mark.usefixtures("no_threads_left")
async def test_stage_when_the_context_dies_then_it_says_so_and_ends() -> None:
    streams = FakeStreams()
    device = made(streams)
    outcomes = Outcomes()
    stage = DeviceStage(device, outcomes, asyncio.get_running_loop(), Timeline())
    await through(stage, outcomes, [items_of([[1]], 0)])
    streams.died = POISONED

    await through(stage, outcomes, [items_of([[n]], n) for n in range(1, 9)])
    stage.close(5)

    assert isinstance(outcomes.dead[0], DeviceFailed) and outcomes.dead[0].exit_code == 5
    assert set(outcomes.rows) == {0} and not outcomes.failed


class Slow:
    """A device that takes a batch when it is let, and notes what it is asked."""

    name, slots, lanes, padded, max_tokens = "slow", 3, 1, False, None

    def __init__(self) -> None:
        self.let = threading.Event()
        self.closed = threading.Event()
        self.asked: list[str] = []

    def launch(self, slot: int, items: Sequence[Any]) -> None:
        self.let.wait(20)
        self.asked.append("launch")

    def wait(self) -> Flight | None:
        self.closed.wait(20)
        return None

    def close(self) -> None:
        self.asked.append("close")
        self.closed.set()


@pytest.mark.usefixtures("no_threads_left")
async def test_close_when_batches_wait_for_the_launcher_then_the_device_is_closed_after_them() -> None:
    device = Slow()
    stage = DeviceStage(device, Outcomes(), asyncio.get_running_loop(), Timeline())
    for n in range(3):
        stage.launch(items_of([[n]], n))

    closing = asyncio.create_task(asyncio.to_thread(stage.close, 20))
    await asyncio.sleep(0.05)  # a close that does not wait for the launcher would have come by now
    device.let.set()
    await closing

    assert device.asked == ["launch"] * 3 + ["close"]


async def test_stage_when_the_device_hangs_then_the_watchdog_sees_it_and_closing_goes_on() -> None:
    streams = FakeStreams()
    device = made(streams)
    outcomes = Outcomes()
    stage = DeviceStage(device, outcomes, asyncio.get_running_loop(), Timeline())
    streams.hanging = threading.Event()
    before = time.monotonic()
    stage.launch(items_of([[1]], 0))
    await asyncio.sleep(0.05)

    since = stage.busy_since()
    await asyncio.to_thread(stage.close, 0.1)

    assert since is not None and before <= since <= time.monotonic()
    assert not outcomes.rows and not outcomes.failed
    [waiter] = [thread for thread in threading.enumerate() if thread.name == "device-waiter"]
    assert waiter.daemon  # it does not hold up the end of the process
    streams.hanging.set()
    waiter.join(5)
    assert not waiter.is_alive()


def test_close_when_batches_are_launched_then_they_end_first_and_wait_is_woken() -> None:
    device = made(FakeStreams())
    device.launch(0, [[1]])
    device.launch(1, [[2]])
    device.close()

    ended = [device.wait() for _ in range(4)]

    assert [flight and flight.slot for flight in ended] == [0, 1, None, None]
