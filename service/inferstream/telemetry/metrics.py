"""Every metric of a worker, in one registry of its own.

What happens is counted where it becomes true, by the methods here, from any thread.  What merely *is* (fill
of a stage, lag, credit) is not tracked: it is read when somebody scrapes, by the callbacks given to
:meth:`Metrics.observe`.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector

from inferstream.documents import Kind, Outgoing, Reason, Stage
from inferstream.tasks import ModelInfo

log = logging.getLogger(__name__)

PREFIX = "inferstream_"

# From a hash of a short text to a backlog of an hour; the steps are those of a person reading a dashboard.
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
WORK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
TOKENS = tuple(float(2**n) for n in range(6, 20))
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)

CLOSED_BY = ("tokens", "linger", "closing")
OUTCOMES = ("ok", "failed", "refused", "epoch_ended")
DEAD_LETTERS: Mapping[Stage, Sequence[Reason]] = {
    Stage.PREPARE: (
        Reason.INVALID_UTF8,
        Reason.INVALID_JSON,
        Reason.NOT_AN_OBJECT,
        Reason.MISSING_TEXT,
        Reason.INVALID_TEXT,
        Reason.INVALID_FIELD,
        Reason.INVALID_ID,
        Reason.TOMBSTONE_WITHOUT_KEY,
        Reason.TOO_LONG,
        Reason.MODEL_ERROR,
    ),
    Stage.DEVICE: (Reason.OUT_OF_MEMORY, Reason.MODEL_ERROR, Reason.PROCESS_KILLED),
    Stage.FINISH: (Reason.RESULT_TOO_LARGE, Reason.MODEL_ERROR),
    Stage.SINK: (Reason.RECORD_REFUSED,),
}
"""Which documents are refused where."""


class Sized(Protocol):
    """A model input with its length in tokens."""

    @property
    def length(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue; ``name`` is as it is scraped."""

    name: str
    type: Literal["counter", "gauge", "histogram", "info"]
    labels: tuple[str, ...]
    help: str


class Cells:
    """The buckets of one label set."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int = 1) -> None:
        """Take in ``count`` observations of the same value."""
        index = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[index] += count
            self._sum += value * count

    def observe_many(self, values: Iterable[float]) -> None:
        """Take in several values under one lock: 0.1 µs each, against 1 µs one by one."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
                self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        cumulative = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
            cumulative += count
            buckets.append(("+Inf" if bound == math.inf else str(float(bound)), cumulative))
        return buckets, total


class Distribution(Collector):
    """A histogram that can take in many observations at once, which prometheus_client's cannot."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: tuple[str, ...] = ()) -> None:
        self._name = name
        self._help = help
        self._bounds = bounds
        self._names = labels
        self._cells: dict[tuple[str, ...], Cells] = {}
        if not labels:
            self.labels()

    def labels(self, *values: str) -> Cells:
        """The cells of a label set, made on first use; keep them where it matters."""
        cells = self._cells.get(values)
        if cells is None:
            if len(values) != len(self._names):
                raise ValueError(f"{self._name} has the labels {self._names}, not {len(values)} of them")
            cells = self._cells.setdefault(values, Cells(self._bounds))
        return cells

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._names)
        for values, cells in list(self._cells.items()):
            buckets, total = cells.read()
            family.add_metric(values, buckets, total)
        yield family


class Metrics:
    """The catalogue.  Methods count events; attributes are gauges that the callbacks of ``observe`` set."""

    def __init__(self) -> None:
        # Without it every counter has a second series that nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it untyped
        self.registry = CollectorRegistry()
        self.catalogue: list[Entry] = []
        self._callbacks: list[Callable[[], None]] = []
        self._scraping = threading.Lock()
        self._lagging: set[tuple[str, int]] = set()  # the partitions whose lag is shown
        self._totals: dict[Counter, float] = {}  # as last read

        self._consumed = self._counter("records_consumed_total", "Records read from the input.", "topic")
        self._lost = self._counter(
            "records_lost_total",
            "Offsets of the input whose records were deleted before they were read, passed over as input.on_lost_range "
            "is skip.",
            "topic",
        )
        self._produced = self._counter("results_produced_total", "Results acknowledged by the output topic.")
        self._dead_letters = self._counter(
            "dead_letters_total", "Dead letters acknowledged by their topic.", "reason", "stage"
        )
        self._tombstones = self._counter("tombstones_total", "Tombstones passed on to the output topic.")
        self.lag_records = self._gauge(
            "lag_records", "Records after the reading position, which are not read yet.", "topic", "partition"
        )
        self.committed_lag_records = self._gauge(
            "committed_lag_records", "Records after the committed offset.", "topic", "partition"
        )
        self._record_age = self._distribution(
            "record_age_seconds", "Age of a record, by its timestamp, when it is read.", LATENCY_S
        )
        self._end_to_end = self._distribution(
            "end_to_end_seconds",
            "From a record's timestamp to the acknowledgement of its result, tombstone or dead letter; under "
            "exactly-once, to the transaction's end.",
            LATENCY_S,
        )
        self.stage_fill_ratio = self._gauge(
            "stage_fill_ratio",
            "How full a stage is: 1 before the stage that holds the others back, near 0 behind it.",
            "stage",
        )
        self.limiting_stage = self._gauge(
            "limiting_stage",
            "Share of the last 15 s in which the stage held the others back: input (all there is was read), poll (more "
            "is there, and credit for it), else the stage with the most documents before it and in it.",
            "stage",
        )
        self._stage_seconds = self._distribution(
            "stage_seconds",
            "Time of one piece of work in a stage: a chunk of records prepared, a batch from its oldest document's "
            "waiting to its computing, finishing and publishing, a commit.",
            WORK_S,
            "stage",
        )
        self._prepare_tokens = self._counter(
            "prepare_tokens_total", "Tokens of the documents that were prepared."
        )
        self._prepare_cpu = self._counter(
            "prepare_cpu_seconds_total",
            "CPU time of decoding and tokenising; prepare_tokens_total by it is tokens per second and core.",
        )
        self._finish_cpu = self._counter(
            "finish_cpu_seconds_total", "CPU time of turning vectors into serialised results."
        )
        self.buffer_bytes = self._gauge(
            "buffer_bytes", "Bytes of the documents in flight, as credit counts them."
        )
        self.buffer_limit_bytes = self._gauge("buffer_limit_bytes", "The bound of buffer_bytes.")
        self.credit_records = self._gauge(
            "credit_records", "Records that may still be read before some are done."
        )
        self.blocked_documents = self._gauge(
            "blocked_documents", "Documents that are done and wait for an older one of their partition."
        )
        self._batch_tokens = self._distribution("batch_tokens", "Tokens of a batch, without padding.", TOKENS)
        self._batch_padding = self._distribution(
            "batch_padding_ratio",
            "Share of a batch that is padding; 0 where documents are packed.",
            RATIOS,
        )
        self._batches = self._counter("batches_total", "Batches formed, by what closed them.", "closed_by")
        self._device_busy = self._counter(
            "device_busy_seconds_total",
            "Time the device computed, summed over its lanes: time on the GPU's compute stream, or CPU time of the "
            "compute threads.",
        )
        self._device_idle = self._counter(
            "device_idle_seconds_total",
            "Time the device's lanes computed nothing although a document had been read, by what that waited for: "
            "prepare, batch (lingering included), launch, core. Idle for want of input is in none of them.",
            "waited_for",
        )
        self.device_lanes = self._gauge("device_lanes", "How many batches the device computes side by side.")
        self.device_idle_ratio = self._gauge(
            "device_idle_ratio",
            "Of the last 15 s, without those idle for want of input, the share in which the device computed nothing; "
            "NaN while there was nothing to compute.",
        )
        self.device_idle_ratio.set(math.nan)
        self._flops = self._counter(
            "model_flops_total",
            "Floating-point operations of the model's matrix products for the tokens computed, padding not counted; 0 "
            "where the model's shape does not tell.",
        )
        self._flops_utilisation = self._gauge(
            "model_flops_utilisation",
            "Of what the device can do at its peak, the share that model_flops_total took in the last 15 s, waiting "
            "for input included; only where the peak is known.",
            "device",
            "dtype",
        )
        self._commits = self._counter("commits_total", "Offset commits, by how they ended.", "outcome")
        self.last_commit_timestamp_seconds = self._gauge(
            "last_commit_timestamp_seconds",
            "Unix time of the last commit that succeeded; NaN before the first.",
        )
        self.last_commit_timestamp_seconds.set(math.nan)
        self._rebalances = self._counter(
            "rebalances_total", "Rebalances of the group this worker took part in."
        )
        self._resumed = self._counter(
            "documents_resumed_total",
            "Documents in work whose partition came back after a rebalance: they went on where they were.",
        )
        self._dropped = self._counter(
            "documents_dropped_total",
            "Documents in work that were let go with their partition, or at the end of a drain: they are read again.",
        )
        self.assigned_partitions = self._gauge("assigned_partitions", "Input partitions this worker owns.")
        self._event_loop_lag = self._distribution(
            "event_loop_lag_seconds", "How late the event loop ran a timer.", WORK_S
        )
        self.draining = self._gauge("draining", "1 while the worker finishes and leaves.")
        self.memory_limit_bytes = self._gauge(
            "memory_limit_bytes",
            "What process_resident_memory_bytes may not pass: the limit of the control group, or the machine's memory; "
            "NaN where neither can be told.",
        )
        self.memory_limit_bytes.set(math.nan)
        self._build = self._info(
            "build_info", "Versions, as labels: inferstream, aiokafka, torch, transformers."
        )
        self._model = self._info(
            "model_info",
            "The model, as labels: id, revision and dtype as in every result, and its execution.",
        )

        # A series that begins at its first event has no rate and no increase until the second.
        for stage, reasons in DEAD_LETTERS.items():
            for reason in reasons:
                self._dead_letters.labels(reason.value, stage.value)
        for outcome in OUTCOMES:
            self._commits.labels(outcome)
        for closed_by in CLOSED_BY:
            self._batches.labels(closed_by)

        self._produced_inc = self._produced.inc
        self._tombstones_inc = self._tombstones.inc
        # The process's own memory, CPU and file descriptors, under their customary names.
        ProcessCollector(registry=self.registry)

    # ---- events

    def records_consumed(self, topic: str, count: int) -> None:
        """``count`` records of ``topic`` were admitted."""
        self._consumed.labels(topic).inc(count)

    def records_lost(self, topic: str, count: int) -> None:
        """``count`` offsets of ``topic`` had been deleted before they were read."""
        self._lost.labels(topic).inc(count)

    def record_ages(self, ages_s: Iterable[float]) -> None:
        """The ages of records that were just read, in seconds."""
        self._record_age.labels().observe_many(ages_s)

    def published(self, outgoings: Iterable[Outgoing]) -> None:
        """The broker acknowledged records of ours."""
        results = 0
        for outgoing in outgoings:
            if outgoing.kind is Kind.RESULT:
                results += 1
            elif outgoing.kind is Kind.TOMBSTONE:
                self._tombstones_inc()
            elif outgoing.rejected is not None:
                self._dead_letters.labels(outgoing.rejected.reason.value, outgoing.rejected.stage.value).inc()
        if results:
            self._produced_inc(results)

    def end_to_end(self, ages_s: Iterable[float]) -> None:
        """Records were answered that long after their timestamps, in seconds."""
        self._end_to_end.labels().observe_many(ages_s)

    def stage_seconds(self, stage: str, seconds: float) -> None:
        """A stage worked that long on one piece of work."""
        self._stage_seconds.labels(stage).observe(seconds)

    def batch(self, closed_by: str, items: Sequence[Sized], cost: int) -> None:
        """A batch was formed; ``closed_by`` says why now (``tokens``, ``linger``, ``closing``).

        ``cost`` is what it takes of its budget, in tokens: what is more than the items' own is padding.
        """
        if not items:
            return
        tokens = sum(item.length for item in items)
        self._batches.labels(closed_by).inc()
        self._batch_tokens.labels().observe(tokens)
        self._batch_padding.labels().observe(1 - tokens / max(1, cost))

    def device(self, busy_s: float, idle_s: Mapping[str, float], flops: float) -> None:
        """What the device did since the start: seconds over all its lanes, idle ones by what was waited for."""
        self._raise(self._device_busy, busy_s)
        for waited_for, seconds in idle_s.items():
            self._raise(self._device_idle.labels(waited_for), seconds)
        self._raise(self._flops, flops)

    def flops_utilisation(self, device: str, dtype: str, share: float) -> None:
        """Of the peak of ``device`` (its name) in ``dtype``."""
        self._flops_utilisation.labels(device, dtype).set(share)

    def workers(self, prepared_tokens: int, prepare_cpu_s: float, finish_cpu_s: float) -> None:
        """What the worker threads did since the start."""
        self._raise(self._prepare_tokens, prepared_tokens)
        self._raise(self._prepare_cpu, prepare_cpu_s)
        self._raise(self._finish_cpu, finish_cpu_s)

    def committed(self, outcome: str) -> None:
        """A commit ended: ``ok``, or why not (``failed``, ``refused``, ``epoch_ended``)."""
        self._commits.labels(outcome).inc()
        if outcome == "ok":
            self.last_commit_timestamp_seconds.set_to_current_time()

    def rebalanced(self) -> None:
        """The group has given us another assignment."""
        self._rebalances.inc()

    def documents_resumed(self, count: int) -> None:
        """So many documents in work went on after a rebalance."""
        self._resumed.inc(count)

    def documents_dropped(self, count: int) -> None:
        """So many documents in work were let go, uncommitted."""
        self._dropped.inc(count)

    def event_loop_lag(self, seconds: float) -> None:
        """The event loop ran a timer that late."""
        self._event_loop_lag.labels().observe(seconds)

    def model(self, info: ModelInfo, **more: str) -> None:
        """Name the model; ``more`` are further labels, such as task and device."""
        self._model.info({"id": info.id, "revision": info.revision, "dtype": info.dtype, **more})

    def build(self, **versions: str) -> None:
        """Name the versions of what runs here."""
        self._build.info(versions)

    # ---- partitions

    def lags(self, lags: Mapping[tuple[str, int], tuple[int, int]]) -> None:
        """Set lag and committed lag of every owned (topic, partition); the others' are removed."""
        for topic, partition in self._lagging - lags.keys():
            self.forget_partition(topic, partition)
        for (topic, partition), (lag, committed_lag) in lags.items():
            self._lagging.add((topic, partition))
            self.lag_records.labels(topic, str(partition)).set(lag)
            self.committed_lag_records.labels(topic, str(partition)).set(committed_lag)

    def forget_partition(self, topic: str, partition: int) -> None:
        """The partition was revoked: a lag that stays behind would be somebody else's."""
        if (topic, partition) in self._lagging:
            self._lagging.remove((topic, partition))
            self.lag_records.remove(topic, str(partition))
            self.committed_lag_records.remove(topic, str(partition))

    # ---- scraping

    def observe(self, callback: Callable[[], None]) -> None:
        """Call back at every scrape, in the server's thread, to set gauges; it must only read, and quickly.

        What it raises is logged, and its gauges keep their values: the event loop may change under its eyes.
        """
        self._callbacks.append(callback)

    def refresh(self) -> None:
        """Bring the gauges up to date."""
        for callback in self._callbacks:
            try:
                callback()
            except Exception as error:
                log.warning("a metric could not be read", extra={"error": repr(error)})

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body of a scrape, in the format that the Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        with self._scraping:
            self.refresh()
            return content_type, encode(self.registry)

    def _raise(self, counter: Counter, total: float) -> None:
        """Bring a counter to what was counted elsewhere."""
        counter.inc(max(0.0, total - self._totals.get(counter, 0.0)))
        self._totals[counter] = total

    # ---- building

    def _note(
        self,
        name: str,
        type: Literal["counter", "gauge", "histogram", "info"],
        labels: tuple[str, ...],
        help: str,
    ) -> str:
        self.catalogue.append(Entry(PREFIX + name, type, labels, help))
        return PREFIX + name

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(self._note(name, "counter", labels, help), help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(self._note(name, "gauge", labels, help), help, labels, registry=self.registry)

    def _distribution(self, name: str, help: str, bounds: Sequence[float], *labels: str) -> Distribution:
        distribution = Distribution(self._note(name, "histogram", labels, help), help, bounds, labels)
        self.registry.register(distribution)
        return distribution

    def _info(self, name: str, help: str) -> Info:
        return Info(self._note(name, "info", (), help).removesuffix("_info"), help, registry=self.registry)


def catalogue() -> list[Entry]:
    """Name, type, labels and help of every metric, in the order of the flow."""
    return Metrics().catalogue
