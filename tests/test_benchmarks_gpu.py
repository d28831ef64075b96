"""The GPU benchmarks as far as a machine without a GPU can run them."""

from __future__ import annotations

import random
import threading

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.encode import encode
from benchmarks.gpu.feed import batched, busy_in_python, feed, fixed, kernel_seconds, mixed
from benchmarks.gpu.feeders import feeders
from benchmarks.gpu.models import BERT, MINILM
from inferstream.device.cuda import CudaDevice
from tests.support.streams import FakeStreams, ToyForward


def test_benchmark_when_there_is_no_gpu_says_so_in_a_line_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert main(["engine"]) == 2

    out, err = capsys.readouterr()
    assert out == "" and err.startswith("benchmarks.gpu: there is no CUDA device here (torch ")
    assert err.count("\n") == 1


def test_feed_when_a_device_is_fed_counts_what_it_did() -> None:
    device = CudaDevice(
        ToyForward(), FakeStreams(random.Random(1).randrange), max_tokens=64, max_length=16, max_items=8
    )

    fed = feed(device, fixed(16, 64, 3, 100), seconds=0.2)

    assert fed.documents == 4 * fed.batches > 0
    assert fed.tokens == 64 * fed.batches
    assert fed.seconds >= 0.2 and fed.busy_s > 0 and 0 <= fed.idle_ratio < 1 and fed.latency_s > 0


def test_busy_thread_when_it_ends_then_it_is_gone() -> None:
    with busy_in_python():
        [thread] = [each for each in threading.enumerate() if each.name == "bench-busy"]

    assert not thread.is_alive()


@pytest.mark.embedded
def test_feeders_when_two_workers_answer_then_their_rates_are_summed() -> None:
    section = feeders(0.2, "cpu", workers=(1, 2), documents=500, model="builtin:hash")

    rates = section.data["documents_per_s"]
    assert list(rates) == ["1", "2"] and all(rate > 0 for rate in rates.values())
    assert section.data["enough"] in (1, 2)
    assert "workers" in section.markdown()


@pytest.mark.embedded
def test_feeders_when_a_worker_cannot_start_then_it_says_what_the_worker_said() -> None:
    with pytest.raises(RuntimeError, match="the workers did not get through: exit codes"):
        feeders(0.2, "cpu", workers=(1,), documents=10, model="/no/such/folder")


@pytest.mark.model
def test_encode_when_measured_beside_the_engine_then_every_row_has_a_rate() -> None:
    section = encode(0.1, "cpu", documents=24, dtype="float32", sizes=(8, 24))

    rates = section.data["documents_per_s"]
    assert list(rates)[-1] == "engine" and len(rates) == 3
    assert all(rate > 0 for rate in rates.values())


class Event:
    """As Kineto's: times in nanoseconds."""

    def __init__(self, device: str, stream: int, start: int, end: int, note: bool = False) -> None:
        self.device_type = lambda: f"DeviceType.{device}"
        self.device_resource_id = lambda: stream
        self.start_ns = lambda: start
        self.duration_ns = lambda: end - start
        self.is_user_annotation = lambda: note


def test_kernel_seconds_of_a_profile_then_they_are_what_is_covered_on_the_stream_with_the_most() -> None:
    events = [
        Event("CUDA", 7, 500, 900),
        Event("CUDA", 7, 100, 300),
        Event("CUDA", 7, 200, 400),
        Event("CUDA", 7, 250, 260),
        Event("CUDA", 7, 0, 5000, note=True),
        Event("CUDA", 13, 100, 700),
        Event("CPU", 1, 0, 9000),
    ]

    assert kernel_seconds(events) == pytest.approx(700e-9)
    assert kernel_seconds([]) == 0.0


def test_batches_when_formed_for_a_benchmark_are_full_and_within_the_budget() -> None:
    documents = mixed(2000, 512, 100)

    packed, padded = batched(documents, 4096, padded=False), batched(documents, 4096, padded=True)

    assert all(4096 - 512 <= sum(map(len, items)) <= 4096 for items in packed)
    assert all(len(items) * max(map(len, items)) <= 4096 for items in padded)
    assert len(padded) >= len(packed) > 20


def test_flops_when_counted_are_those_of_the_known_shapes() -> None:
    assert MINILM.flops_per_token(128) == pytest.approx(22.41e6, rel=0.01)
    assert BERT.flops_per_token(128) == pytest.approx(174.6e6, rel=0.01)
