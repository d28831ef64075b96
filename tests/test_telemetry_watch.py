"""The gauges that are set at every beat: read from the parts of a worker, which are played here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from inferstream.credit import Credit
from inferstream.device.peaks import Peak
from inferstream.device.usage import Usage
from inferstream.lanes import Lane
from inferstream.telemetry import watch as watching
from inferstream.telemetry.health import Health
from inferstream.telemetry.metrics import Metrics
from inferstream.telemetry.watch import Watch


class Parts:
    """A worker with two lanes, of which everything is set by hand; ``beat`` lets a second pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak: Peak | None = None) -> None:
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(watching, "time", clock)
        self.lanes = [Lane("a", partition, 1, 0) for partition in range(2)]
        self.credit: Credit[Any] = Credit(10, 1 << 20, 1 << 20, 0.5)
        for lane in self.lanes:
            self.credit.open_lane(lane)
        self.usage = Usage()
        self.stage = SimpleNamespace(
            usage=self.usage, flops=0.0, lanes=1, idle=True, fill_ratio=0.0, busy_since=lambda: None
        )
        self.waiting = {"prepare": 0, "device": 0, "finish": 0, "publish": 0, "commit": 0}
        self.lags = {("a", 0): (0, 0), ("a", 1): (0, 0)}
        self.pipeline = SimpleNamespace(
            stage=self.stage,
            credit=self.credit,
            blocked_documents=0,
            unprepared=0,
            finishing=2,
            uncommitted=50,
            max_uncommitted=100,
            prepared_tokens=700,
            waiting=self.waiting,
            window=SimpleNamespace(tokens=0),
            workers=SimpleNamespace(cpu_s=[0.25, 0.5]),
        )
        source = SimpleNamespace(lags=lambda: self.lags, lanes=self.lanes)
        self.metrics = Metrics()
        self.watch = Watch(Health(), self.metrics)
        self.watch.follow(self.pipeline, source, SimpleNamespace(queued=0), peak)

    def beat(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            self.watch.beat()

    def sample(self, name: str, **labels: str) -> Any:
        self.metrics.refresh()
        return self.metrics.registry.get_sample_value(f"inferstream_{name}", labels)


def test_idle_ratio_when_nothing_came_then_it_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch)

    parts.beat(3)

    assert math.isnan(parts.sample("device_idle_ratio"))


def test_idle_ratio_when_documents_waited_then_only_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch)
    parts.beat()
    parts.usage.busy_s, parts.usage.idle_s["launch"], parts.usage.idle_s["prepare"] = 3.0, 0.5, 0.5
    parts.beat()

    assert parts.sample("device_idle_ratio") == 0.25
    assert parts.sample("device_idle_seconds_total", waited_for="launch") == 0.5
    assert parts.sample("device_busy_seconds_total") == 3.0
    assert parts.sample("device_lanes") == 1


def test_idle_ratio_when_a_batch_takes_longer_than_the_window_then_the_last_one_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch)
    parts.beat()
    parts.usage.busy_s, parts.usage.idle_s["core"] = 1.0, 1.0
    parts.stage.idle = False
    parts.beat(40)
    assert parts.sample("device_idle_ratio") == 0.5

    parts.stage.idle = True
    parts.beat()

    assert math.isnan(parts.sample("device_idle_ratio"))


def test_flops_utilisation_when_the_peak_is_known_then_it_is_the_share_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch, Peak("NVIDIA H200", "bfloat16", 1000.0))
    parts.beat()
    parts.stage.flops = 600.0
    parts.beat()

    share = parts.sample("model_flops_utilisation", device="NVIDIA H200", dtype="bfloat16")

    assert share == pytest.approx(0.6)
    assert parts.sample("model_flops_total") == 600


def test_flops_utilisation_when_the_peak_is_not_known_then_there_is_no_such_series(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch)
    parts.beat(2)

    assert b"inferstream_model_flops_utilisation{" not in parts.metrics.render()[1]


def test_limiting_stage_when_a_backlog_stands_before_the_device_then_it_is_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch)
    parts.lags["a", 0] = (1000, 1000)
    parts.credit.take(parts.lanes[0], 100, 5)  # its share
    parts.waiting |= {"device": 4, "publish": 1}

    parts.beat(3)

    assert parts.sample("limiting_stage", stage="device") == 1
    assert parts.sample("limiting_stage", stage="input") == 0


def test_limiting_stage_when_there_is_credit_for_what_is_behind_then_reading_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch)
    parts.beat()
    parts.lags["a", 0] = (1000, 1000)
    parts.credit.take(parts.lanes[1], 100, 5)  # the other one, which has nothing to read
    parts.waiting["device"] = 5
    parts.beat()

    assert parts.sample("limiting_stage", stage="input") == 0.5
    assert parts.sample("limiting_stage", stage="poll") == 0.5


def test_beat_then_the_stages_behind_the_device_have_a_fill_ratio_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch)
    parts.beat()

    assert parts.sample("stage_fill_ratio", stage="finish") == 0.2
    assert parts.sample("stage_fill_ratio", stage="commit") == 0.5
    assert parts.sample("prepare_tokens_total") == 700
    assert parts.sample("prepare_cpu_seconds_total") == 0.5
    assert parts.sample("finish_cpu_seconds_total") == 0.25
