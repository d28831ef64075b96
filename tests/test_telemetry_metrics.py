"""The metrics: the published names, what each event counts, and what a scrape reads."""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferstream.documents import Kind, Outgoing, Reason, Rejected, Stage
from inferstream.tasks import ModelInfo
from inferstream.telemetry.metrics import DEAD_LETTERS, Cells, Distribution, Metrics, catalogue

PUBLISHED = [
    "records_consumed_total{topic}",
    "records_lost_total{topic}",
    "results_produced_total",
    "dead_letters_total{reason,stage}",
    "tombstones_total",
    "lag_records{topic,partition}",
    "committed_lag_records{topic,partition}",
    "record_age_seconds",
    "end_to_end_seconds",
    "stage_fill_ratio{stage}",
    "limiting_stage{stage}",
    "stage_seconds{stage}",
    "prepare_tokens_total",
    "prepare_cpu_seconds_total",
    "finish_cpu_seconds_total",
    "buffer_bytes",
    "buffer_limit_bytes",
    "credit_records",
    "blocked_documents",
    "batch_tokens",
    "batch_padding_ratio",
    "batches_total{closed_by}",
    "device_busy_seconds_total",
    "device_idle_seconds_total{waited_for}",
    "device_lanes",
    "device_idle_ratio",
    "model_flops_total",
    "model_flops_utilisation{device,dtype}",
    "commits_total{outcome}",
    "last_commit_timestamp_seconds",
    "rebalances_total",
    "documents_resumed_total",
    "documents_dropped_total",
    "assigned_partitions",
    "event_loop_lag_seconds",
    "draining",
    "memory_limit_bytes",
    "build_info",
    "model_info",
]


@dataclass
class Item:
    length: int


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"inferstream_{name}", labels)


def test_catalogue_then_it_is_the_published_one() -> None:
    written = [
        entry.name.removeprefix("inferstream_") + (f"{{{','.join(entry.labels)}}}" if entry.labels else "")
        for entry in catalogue()
    ]

    assert written == PUBLISHED
    assert all(entry.help.endswith(".") or ";" in entry.help for entry in catalogue())


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_render_then_every_series_is_in_the_catalogue_or_the_processes_own(accept: str) -> None:
    metrics = Metrics()
    metrics.model(ModelInfo("a", "1", "float32"), task="embed")
    metrics.build(version="0.1.0")
    metrics.stage_seconds("prepare", 0.1)

    content_type, body = metrics.render(accept)

    assert content_type.startswith("application/openmetrics-text" if accept else "text/plain")
    names = set(re.findall(r"^([a-z_]+)", body.decode(), re.MULTILINE))
    known = {entry.name for entry in catalogue()}
    for name in names:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in known or name in known or name.startswith("process_"), name
    assert not [name for name in names if name.endswith("_created")]
    assert {entry.name for entry in catalogue() if not entry.labels} <= {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in names
    }


def test_render_when_nothing_has_happened_then_what_alerts_count_is_0_and_not_missing() -> None:
    metrics = Metrics()

    assert {reason for reasons in DEAD_LETTERS.values() for reason in reasons} == set(Reason)
    assert sample(metrics, "dead_letters_total", reason="process_killed", stage="device") == 0
    assert sample(metrics, "commits_total", outcome="failed") == 0
    assert sample(metrics, "batches_total", closed_by="tokens") == 0


def test_published_when_records_are_acknowledged_then_each_kind_has_its_counter() -> None:
    metrics = Metrics()
    rejected = Rejected(Reason.TOO_LONG, "too long", Stage.PREPARE)

    metrics.published([Outgoing(Kind.RESULT, None, b"{}", ())])
    metrics.published([Outgoing(Kind.TOMBSTONE, b"k", None, ())])
    metrics.published([Outgoing(Kind.DEAD_LETTER, None, b"x", (), rejected)])

    assert sample(metrics, "results_produced_total") == 1
    assert sample(metrics, "tombstones_total") == 1
    assert sample(metrics, "dead_letters_total", reason="too_long", stage="prepare") == 1


def test_batch_when_one_is_formed_then_its_tokens_and_padding_are_taken_in() -> None:
    metrics = Metrics()

    metrics.batch("linger", [Item(10), Item(30)], 60)
    metrics.batch("linger", [], 0)

    assert sample(metrics, "batches_total", closed_by="linger") == 1
    assert sample(metrics, "batch_tokens_sum") == 40
    assert sample(metrics, "batch_padding_ratio_sum") == pytest.approx(20 / 60)


def test_committed_when_one_succeeds_then_its_time_is_known() -> None:
    metrics = Metrics()
    metrics.committed("failed")
    before = sample(metrics, "last_commit_timestamp_seconds")
    assert before is not None
    assert math.isnan(before)

    metrics.committed("ok")

    assert sample(metrics, "commits_total", outcome="failed") == 1
    assert sample(metrics, "commits_total", outcome="ok") == 1
    assert sample(metrics, "last_commit_timestamp_seconds") == pytest.approx(time.time(), abs=5)


def test_lags_when_a_partition_is_lost_then_its_series_are_removed() -> None:
    metrics = Metrics()
    metrics.lags({("a", 0): (5, 7), ("a", 1): (6, 8)})

    metrics.lags({("a", 1): (0, 1), ("b", 0): (2, 2)})

    assert sample(metrics, "lag_records", topic="a", partition="0") is None
    assert sample(metrics, "committed_lag_records", topic="a", partition="0") is None
    assert sample(metrics, "lag_records", topic="a", partition="1") == 0
    assert sample(metrics, "committed_lag_records", topic="b", partition="0") == 2


def test_forget_partition_when_it_is_revoked_then_its_series_are_removed() -> None:
    metrics = Metrics()
    metrics.lags({("a", 0): (5, 7), ("a", 1): (6, 8)})

    metrics.forget_partition("a", 0)
    metrics.forget_partition("a", 0)
    metrics.forget_partition("never", 9)

    assert sample(metrics, "lag_records", topic="a", partition="0") is None
    assert sample(metrics, "lag_records", topic="a", partition="1") == 6


def test_totals_when_they_are_read_twice_then_the_counters_are_what_was_counted() -> None:
    metrics = Metrics()
    metrics.device(100.0, {"launch": 1.0, "core": 0.0}, 4e9)
    metrics.workers(500, 0.25, 0.125)

    for _ in range(2):
        metrics.device(101.5, {"launch": 1.0, "core": 3.0}, 9e9)
        metrics.workers(900, 0.5, 0.125)

    assert sample(metrics, "device_busy_seconds_total") == 101.5
    assert sample(metrics, "device_idle_seconds_total", waited_for="launch") == 1.0
    assert sample(metrics, "device_idle_seconds_total", waited_for="core") == 3.0
    assert sample(metrics, "model_flops_total") == 9e9
    assert sample(metrics, "prepare_tokens_total") == 900
    assert sample(metrics, "prepare_cpu_seconds_total") == 0.5
    assert sample(metrics, "finish_cpu_seconds_total") == 0.125


def test_render_when_a_callback_sets_a_gauge_then_the_scrape_has_it() -> None:
    metrics = Metrics()
    metrics.observe(lambda: metrics.credit_records.set(17))

    assert b"inferstream_credit_records 17.0" in metrics.render()[1]


def test_render_when_a_callback_raises_then_the_scrape_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()

    def broken() -> None:
        raise RuntimeError("dictionary changed size during iteration")

    metrics.observe(broken)
    metrics.observe(lambda: metrics.credit_records.set(17))

    assert b"inferstream_credit_records 17.0" in metrics.render()[1]
    assert "a metric could not be read" in caplog.text


def test_metrics_when_two_workers_are_made_in_one_process_then_they_do_not_share() -> None:
    one, two = Metrics(), Metrics()
    one.records_consumed("a", 3)

    assert sample(one, "records_consumed_total", topic="a") == 3
    assert sample(two, "records_consumed_total", topic="a") is None


def test_events_when_counted_from_several_threads_then_none_is_lost() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(1_000):
            metrics.stage_seconds("finish", 0.002)
            metrics.record_ages([0.1, 0.2])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sample(metrics, "stage_seconds_count", stage="finish") == 4_000
    assert sample(metrics, "record_age_seconds_count") == 8_000


@given(st.lists(st.floats(0, 10), max_size=20), st.lists(st.floats(0, 10), max_size=5))
def test_cells_of_any_values_then_they_count_as_prometheus_says(
    many: list[float], single: list[float]
) -> None:
    cells = Cells((1.0, 2.5, 5.0))
    cells.observe_many(many)
    for value in single:
        cells.observe(value, 2)

    buckets, total = cells.read()

    everything = [*many, *single, *single]
    assert buckets == [
        (name, sum(value <= bound for value in everything))
        for name, bound in (("1.0", 1), ("2.5", 2.5), ("5.0", 5), ("+Inf", math.inf))
    ]
    assert total == pytest.approx(sum(everything))


def test_distribution_when_labels_are_missing_then_it_raises() -> None:
    with pytest.raises(ValueError, match="stage"):
        Distribution("a", "b", (1.0,), ("stage",)).labels()
