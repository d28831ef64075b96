"""The Grafana dashboards: flow (where it is held back), device, delivery.

One panel is one call of :func:`graph`, :func:`number` or :func:`table`; what is the same in all of them (selection,
data source, layout) is written once, here.  ``@`` in a query stands for the chosen workers; where a matcher is needed
besides, it is ``{stage="publish",@}``.  Queries name raw metrics alone, so they work without the recording rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Panel = dict[str, Any]

WORKERS = 'namespace=~"$namespace",job=~"$job",instance=~"$instance"'
# A worker's name in a legend: the pod, where there is one, is what kubectl wants; the instance is what is chosen by.
WORKER = "{{pod}} {{instance}}"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
SCHEMA_VERSION = 39  # Grafana 10.4; later ones migrate it themselves

ANSWERED = (
    "sum(rate(inferstream_results_produced_total{@}[$__rate_interval]))"
    " + sum(rate(inferstream_tombstones_total{@}[$__rate_interval]))"
    " + sum(rate(inferstream_dead_letters_total{@}[$__rate_interval]))"
)
# A partition that has just moved may be shown by two workers until the next scrape.
LAG = "sum(max by (namespace, job, topic, partition) (inferstream_lag_records{@}))"
COMMITTED_LAG = "sum(max by (namespace, job, topic, partition) (inferstream_committed_lag_records{@}))"
OCCUPIED = (
    "(rate(inferstream_device_busy_seconds_total{@}[$__rate_interval]) + ignoring (waited_for)"
    ' rate(inferstream_device_idle_seconds_total{waited_for="core",@}[$__rate_interval]))'
    " / inferstream_device_lanes{@}"
)


def quantile(q: float, metric: str, by: str = "") -> str:
    """The quantile of a histogram over the chosen workers, per label set of ``by``."""
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{@}}[$__rate_interval])))"


def mean(metric: str) -> str:
    """The mean of what a histogram observed."""
    return (
        f"sum(rate({metric}_sum{{@}}[$__rate_interval])) / sum(rate({metric}_count{{@}}[$__rate_interval]))"
    )


def graph(
    title: str,
    about: str,
    queries: dict[str, str],
    *,
    unit: str = "short",
    width: int = 8,
    stack: bool = False,
    highest: float | None = None,
    line_at: float | None = None,
) -> Panel:
    """Lines over time.  ``queries``: legend → query; ``line_at`` draws the threshold of an alert."""
    defaults: dict[str, Any] = {
        "unit": unit,
        "min": 0,
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 60 if stack else 8,
            "showPoints": "never",
            "stacking": {"mode": "normal" if stack else "none"},
        },
    }
    if highest is not None:
        defaults["max"] = highest
    if line_at is not None:
        defaults["thresholds"] = _thresholds(line_at)
        defaults["custom"]["thresholdsStyle"] = {"mode": "dashed"}
    return {
        "type": "timeseries",
        "title": title,
        "description": about,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": _targets(queries),
        "gridPos": {"h": 8, "w": width},
    }


def number(
    title: str, about: str, query: str, *, unit: str = "short", width: int = 4, red_at: float | None = None
) -> Panel:
    """One number as of now."""
    defaults: dict[str, Any] = {"unit": unit}
    if red_at is not None:
        defaults["thresholds"] = _thresholds(red_at)
    return {
        "type": "stat",
        "title": title,
        "description": about,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value" if red_at is not None else "none",
            "graphMode": "area",
            "textMode": "auto",
        },
        "targets": _targets({"": query}),
        "gridPos": {"h": 4, "w": width},
    }


def table(title: str, about: str, query: str, *, width: int = 12) -> Panel:
    """The labels of what is there now."""
    targets = [{**target, "instant": True, "format": "table"} for target in _targets({"": query})]
    return {
        "type": "table",
        "title": title,
        "description": about,
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {"showHeader": True},
        "transformations": [
            {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True, "__name__": True}}}
        ],
        "targets": targets,
        "gridPos": {"h": 6, "w": width},
    }


def row(title: str, *panels: Panel) -> list[Panel]:
    return [
        {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"h": 1, "w": COLUMNS}},
        *panels,
    ]


def dashboard(name: str, title: str, about: str, rows: Sequence[list[Panel]]) -> dict[str, Any]:
    """What Grafana loads from a file."""
    return {
        "uid": f"inferstream-{name}",
        "title": f"inferstream: {title}",
        "description": about,
        "tags": ["inferstream"],
        "editable": True,
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "timezone": "",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "links": [
            {
                "type": "dashboards",
                "title": "inferstream",
                "tags": ["inferstream"],
                "keepTime": True,
                "includeVars": True,
                "asDropdown": False,
            }
        ],
        "annotations": {"list": []},
        "templating": {"list": _variables()},
        "panels": list(_laid_out(panel for panels in rows for panel in panels)),
    }


def _thresholds(red_at: float) -> dict[str, Any]:
    return {
        "mode": "absolute",
        "steps": [{"color": "green", "value": None}, {"color": "red", "value": red_at}],
    }


def _targets(queries: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "refId": chr(ord("A") + n),
            "datasource": SOURCE,
            "expr": query.replace("@", WORKERS),
            "legendFormat": legend or "__auto",
        }
        for n, (legend, query) in enumerate(queries.items())
    ]


def _variables() -> list[dict[str, Any]]:
    known = {
        "namespace": "inferstream_build_info",
        "job": 'inferstream_build_info{namespace=~"$namespace"}',
        "instance": 'inferstream_build_info{namespace=~"$namespace",job=~"$job"}',
    }
    return [
        {"type": "datasource", "name": "datasource", "label": "data source", "query": "prometheus"},
        *(
            {
                "type": "query",
                "name": label,
                "label": label,
                "datasource": SOURCE,
                "query": {"query": f"label_values({series}, {label})", "refId": label},
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",  # also what has no such label: outside of Kubernetes there is no namespace
                "current": {"text": "All", "value": "$__all"},
            }
            for label, series in known.items()
        ),
    ]


def _laid_out(panels: Iterator[Panel]) -> Iterator[Panel]:
    """Numbers the panels and puts them side by side, a new line where the width is used up."""
    x = y = height = 0
    for number, panel in enumerate(panels, start=1):
        size = panel["gridPos"]
        if x + size["w"] > COLUMNS:
            x, y, height = 0, y + height, 0
        yield {"id": number, "datasource": SOURCE, **panel, "gridPos": {"x": x, "y": y, **size}}
        x += size["w"]
        height = max(height, size["h"])


def flow() -> dict[str, Any]:
    at_a_glance = row(
        "At a glance",
        number("workers", "Workers that are scraped.", "count(inferstream_build_info{@})"),
        number(
            "answered",
            "Results, tombstones and dead letters that the brokers have acknowledged, a second.",
            ANSWERED,
            unit="cps",
        ),
        number("not read yet", "Records after the reading positions of all workers.", LAG),
        number(
            "until the backlog is done",
            "What is not done, at the present pace and if nothing came any more.",
            f"{COMMITTED_LAG} / ({ANSWERED})",
            unit="s",
        ),
        number(
            "end to end, p99",
            "From a record's timestamp to the acknowledgement of its outcome.",
            quantile(0.99, "inferstream_end_to_end_seconds"),
            unit="s",
        ),
        number(
            "dead letters",
            "Share of the documents that got a dead letter instead of a result.",
            f"sum(rate(inferstream_dead_letters_total{{@}}[$__rate_interval])) / ({ANSWERED})",
            unit="percentunit",
            red_at=0.01,
        ),
    )
    held_back = row(
        "Where it is held back",
        graph(
            "held back by",
            "Share of the time in which each stage held the others back, over all workers. input: all there is was "
            "read, nothing is held back. device: as it should be under a backlog. Anything else: see the manual's "
            "decision path.",
            {"{{stage}}": "avg by (stage) (inferstream_limiting_stage{@})"},
            unit="percentunit",
            width=12,
            stack=True,
            highest=1,
        ),
        graph(
            "how full each stage is",
            "The fullest worker of each stage. Queues fill up before what is slow and are empty behind it. buffer at 1 "
            "is back-pressure: nothing more is read until something is done.",
            {"{{stage}}": "max by (stage) (inferstream_stage_fill_ratio{@})"},
            unit="percentunit",
            width=12,
            highest=1,
        ),
        graph(
            "read and answered",
            "Both rise and fall together but for what is held; a gap that stays is a backlog inside a worker.",
            {
                "read": "sum(rate(inferstream_records_consumed_total{@}[$__rate_interval]))",
                "answered": ANSWERED,
            },
            unit="cps",
        ),
        graph(
            "lag by topic",
            "not read: records after the reading position. not committed: after the committed offset, which is what a "
            "restart would read again. Both are unknown while no worker owns the partition.",
            {
                "{{topic}} not read": "sum by (topic) (max by (namespace, job, topic, partition) "
                "(inferstream_lag_records{@}))",
                "{{topic}} not committed": "sum by (topic) (max by (namespace, job, topic, partition) "
                "(inferstream_committed_lag_records{@}))",
            },
        ),
        graph(
            "the ten partitions that lag most",
            "One that stands out has a slow document at its head, a key that is too frequent, or a broker of its own.",
            {
                "{{topic}} {{partition}}": "topk(10, max by (namespace, job, topic, partition) "
                "(inferstream_lag_records{@}))"
            },
        ),
        graph(
            "age when read, and end to end",
            "By the records' timestamps: what the readers of the results feel.",
            {
                "read p50": quantile(0.5, "inferstream_record_age_seconds"),
                "read p99": quantile(0.99, "inferstream_record_age_seconds"),
                "answered p50": quantile(0.5, "inferstream_end_to_end_seconds"),
                "answered p99": quantile(0.99, "inferstream_end_to_end_seconds"),
            },
            unit="s",
        ),
        graph(
            "work of each stage",
            "How many of it run at a time, over all workers: seconds of work a second. Of wait it is batches that wait "
            "to be computed.",
            {"{{stage}}": "sum by (stage) (rate(inferstream_stage_seconds_sum{@}[$__rate_interval]))"},
        ),
        graph(
            "one piece of work of each stage, p95",
            "A chunk of records prepared, a batch computed, finished, published, a commit.",
            {"{{stage}}": quantile(0.95, "inferstream_stage_seconds", "stage")},
            unit="s",
        ),
    )
    held = row(
        "What is held",
        graph(
            "bytes held and their bound",
            "The bound is buffer.max_bytes; the worker that holds most. At it nothing is read: so memory is bounded.",
            {
                "held": "max(inferstream_buffer_bytes{@})",
                "bound": "max(inferstream_buffer_limit_bytes{@})",
            },
            unit="bytes",
        ),
        graph(
            "credit and blocked documents",
            "credit: records that may still be read. blocked: done, and waiting for an older one of their partition.",
            {
                "credit": "sum(inferstream_credit_records{@})",
                "blocked": "sum(inferstream_blocked_documents{@})",
            },
        ),
        graph(
            "partitions of each worker",
            "Partitions are all that spreads work over workers; one with none has nothing to do.",
            {WORKER: "inferstream_assigned_partitions{@}"},
        ),
    )
    process = row(
        "The processes",
        graph(
            "memory, of what it may have",
            "Resident memory over the control group's limit, or the machine's memory.",
            {WORKER: "process_resident_memory_bytes{@} / inferstream_memory_limit_bytes{@}"},
            unit="percentunit",
            highest=1,
            line_at=0.9,
        ),
        graph(
            "cores in use",
            "CPU seconds of the process a second.",
            {
                WORKER: "rate(process_cpu_seconds_total{@}[$__rate_interval]) "
                "and on (namespace, job, instance) inferstream_build_info{@}"
            },
        ),
        graph(
            "how late the event loop runs, p99",
            "Past 1 s heartbeats and commits suffer; past 30 s the worker counts as dead.",
            {WORKER: quantile(0.99, "inferstream_event_loop_lag_seconds", "pod, instance")},
            unit="s",
            line_at=1,
        ),
        graph(
            "up for",
            "Since the process was started; a saw-tooth is a worker that dies again and again.",
            {
                WORKER: "(time() - process_start_time_seconds{@}) "
                "and on (namespace, job, instance) inferstream_build_info{@}"
            },
            unit="s",
        ),
        graph(
            "draining",
            "1 from SIGTERM to the end, for at most delivery.drain_timeout_s.",
            {WORKER: "inferstream_draining{@}"},
            highest=1,
        ),
        table(
            "versions",
            "Of inferstream and of what it runs on; two lines while a new one is rolled out.",
            "count by (inferstream, aiokafka, torch, transformers) (inferstream_build_info{@})",
            width=8,
        ),
    )
    return dashboard(
        "flow",
        "flow",
        "What holds the service back, read from left to right and from top to bottom.",
        [at_a_glance, held_back, held, process],
    )


def device() -> dict[str, Any]:
    use = row(
        "Is it used",
        graph(
            "occupied",
            "Share of the time in which a worker's lanes had a batch. Under a backlog it belongs above 0.9; add "
            "workers when the lag grows all the same.",
            {WORKER: OCCUPIED},
            unit="percentunit",
            width=12,
            highest=1,
            line_at=0.8,
        ),
        graph(
            "idle although documents had been read",
            "Of the last 15 s, without those for want of input. No number while there was nothing to compute.",
            {WORKER: "inferstream_device_idle_ratio{@}"},
            unit="percentunit",
            width=12,
            highest=1,
        ),
        graph(
            "idle, by what was waited for",
            "Share of the lanes' time. prepare: decoding and tokenising; batch: forming one, the linger included; "
            "launch: packing and copying; core: the batch had begun and its thread had no core.",
            {
                "{{waited_for}}": "sum by (waited_for) "
                "(rate(inferstream_device_idle_seconds_total{@}[$__rate_interval])) "
                "/ scalar(sum(inferstream_device_lanes{@}))"
            },
            unit="percentunit",
            stack=True,
        ),
        graph(
            "lanes",
            "Batches that a device computes side by side: compute threads on a CPU, 1 on a GPU.",
            {WORKER: "inferstream_device_lanes{@}"},
        ),
        graph(
            "batches waiting and computing",
            "window: prepared tokens that wait, of buffer.max_tokens. device: staging slots that are taken.",
            {"{{stage}}": 'max by (stage) (inferstream_stage_fill_ratio{stage=~"window|device",@})'},
            unit="percentunit",
            highest=1,
        ),
    )
    batches = row(
        "Batches",
        graph(
            "batches, by what closed them",
            "tokens: the budget was reached, as it should be under a backlog. linger: there was nothing more to wait "
            "for. closing: a drain or a revoked partition.",
            {"{{closed_by}}": "sum by (closed_by) (rate(inferstream_batches_total{@}[$__rate_interval]))"},
            unit="cps",
            stack=True,
        ),
        graph(
            "tokens of a batch",
            "Without padding. Far below batch.max_tokens under a backlog: the budget was lowered after running out of "
            "memory, or preparing is the bottleneck.",
            {
                "p50": quantile(0.5, "inferstream_batch_tokens"),
                "p95": quantile(0.95, "inferstream_batch_tokens"),
                "mean": mean("inferstream_batch_tokens"),
            },
        ),
        graph(
            "padding",
            "Share of a batch that is padding; 0 where documents are packed. High: raise buffer.max_tokens.",
            {"mean": mean("inferstream_batch_padding_ratio")},
            unit="percentunit",
            highest=1,
        ),
        graph(
            "time of a batch, p95",
            "wait: from its oldest document's being prepared to its launch; h2d, d2h and launch only on a GPU.",
            {
                "{{stage}}": "histogram_quantile(0.95, sum by (le, stage) (rate(inferstream_stage_seconds_bucket"
                '{stage=~"wait|launch|h2d|compute|d2h",@}[$__rate_interval])))'
            },
            unit="s",
        ),
        graph(
            "tokens",
            "prepared: tokenised. computed: in batches, without padding.",
            {
                "prepared": "sum(rate(inferstream_prepare_tokens_total{@}[$__rate_interval]))",
                "computed": "sum(rate(inferstream_batch_tokens_sum{@}[$__rate_interval]))",
            },
            unit="cps",
        ),
        graph(
            "CPU around the device",
            "Cores that decoding, tokenising and serialising take, over all workers.",
            {
                "prepare": "sum(rate(inferstream_prepare_cpu_seconds_total{@}[$__rate_interval]))",
                "finish": "sum(rate(inferstream_finish_cpu_seconds_total{@}[$__rate_interval]))",
            },
        ),
    )
    model = row(
        "The model",
        graph(
            "floating-point operations",
            "Of the model's matrix products, padding not counted; 0 where the model's shape does not tell.",
            {WORKER: "rate(inferstream_model_flops_total{@}[$__rate_interval])"},
            unit="flops",
        ),
        graph(
            "share of the peak",
            "Of what the maker's data sheet says, waiting for input included. Only on GPUs whose peak is known.",
            {f"{WORKER} {{{{device}}}} {{{{dtype}}}}": "inferstream_model_flops_utilisation{@}"},
            unit="percentunit",
            highest=1,
        ),
        table(
            "models",
            "What computes; two lines are two models in one selection.",
            "count by (id, revision, dtype, execution) (inferstream_model_info{@})",
            width=8,
        ),
    )
    return dashboard(
        "device",
        "device",
        "Whether the device is used, and what it waits for when not.",
        [use, batches, model],
    )


def delivery() -> dict[str, Any]:
    outcomes = row(
        "Outcomes",
        number(
            "results",
            "In the time shown.",
            "sum(increase(inferstream_results_produced_total{@}[$__range]))",
        ),
        number(
            "dead letters",
            "In the time shown.",
            "sum(increase(inferstream_dead_letters_total{@}[$__range]))",
        ),
        number(
            "tombstones",
            "In the time shown.",
            "sum(increase(inferstream_tombstones_total{@}[$__range]))",
        ),
        number(
            "lost to retention",
            "Offsets passed over, their records deleted before they were read: input.on_lost_range is skip.",
            "sum(increase(inferstream_records_lost_total{@}[$__range])) or vector(0)",
            red_at=1,
        ),
        number(
            "documents that killed a worker",
            "In the time shown; see the runbook of InferstreamDocumentKillsWorker.",
            'sum(increase(inferstream_dead_letters_total{reason="process_killed",@}[$__range]))',
            red_at=1,
        ),
        number(
            "oldest last commit",
            "Of all workers. It grows while there is nothing to commit: look at what is not committed as well.",
            "time() - min(inferstream_last_commit_timestamp_seconds{@})",
            unit="s",
        ),
        graph(
            "outcomes",
            "Acknowledged by the brokers; under exactly-once, committed.",
            {
                "results": "sum(rate(inferstream_results_produced_total{@}[$__rate_interval]))",
                "tombstones": "sum(rate(inferstream_tombstones_total{@}[$__rate_interval]))",
                "dead letters": "sum(rate(inferstream_dead_letters_total{@}[$__rate_interval]))",
            },
            unit="cps",
        ),
        graph(
            "dead letters, by reason and stage",
            "The reasons stand in docs/contract.md; `inferstream dead-letters list` shows the documents.",
            {
                "{{reason}} in {{stage}}": "sum by (reason, stage) "
                "(rate(inferstream_dead_letters_total{@}[$__rate_interval])) > 0"
            },
            unit="cps",
            stack=True,
        ),
        graph(
            "share of dead letters",
            "Of all that was answered.",
            {
                "dead letters": f"sum(rate(inferstream_dead_letters_total{{@}}[$__rate_interval])) / ({ANSWERED})"
            },
            unit="percentunit",
            line_at=0.01,
        ),
    )
    commits = row(
        "Commits",
        graph(
            "commits, by how they ended",
            "ok, failed (tried again on the next tick), refused (a right is missing), epoch_ended (the partitions have "
            "gone to another worker; usual in a rebalance).",
            {"{{outcome}}": "sum by (outcome) (rate(inferstream_commits_total{@}[$__rate_interval]))"},
            unit="cps",
        ),
        graph(
            "time of a commit",
            "An OffsetCommit, or under exactly-once ending a transaction.",
            {
                "p50": 'histogram_quantile(0.5, sum by (le) (rate(inferstream_stage_seconds_bucket{stage="commit",@}'
                "[$__rate_interval])))",
                "p95": 'histogram_quantile(0.95, sum by (le) (rate(inferstream_stage_seconds_bucket{stage="commit",@}'
                "[$__rate_interval])))",
            },
            unit="s",
        ),
        graph(
            "not committed",
            "Records after the committed offset, by worker: what a restart would read again.",
            {WORKER: "sum by (pod, instance) (inferstream_committed_lag_records{@})"},
        ),
        graph(
            "written and not committed",
            "Of delivery.max_uncommitted_documents; at 1 writing waits for a commit.",
            {WORKER: 'inferstream_stage_fill_ratio{stage="commit",@}'},
            unit="percentunit",
            highest=1,
        ),
        graph(
            "waiting to be published",
            "Of buffer.max_documents. Full: the output topic is slow or out of reach.",
            {WORKER: 'inferstream_stage_fill_ratio{stage="publish",@}'},
            unit="percentunit",
            highest=1,
        ),
        graph(
            "time of publishing a batch of results",
            "From handing it to the producer to the brokers' acknowledgement.",
            {
                "p50": 'histogram_quantile(0.5, sum by (le) (rate(inferstream_stage_seconds_bucket{stage="publish",@}'
                "[$__rate_interval])))",
                "p95": 'histogram_quantile(0.95, sum by (le) (rate(inferstream_stage_seconds_bucket{stage="publish",@}'
                "[$__rate_interval])))",
            },
            unit="s",
        ),
    )
    group = row(
        "The group",
        graph(
            "rebalances",
            "Of the group, in the last 15 minutes, as each worker saw them. In each, all workers stop reading. A "
            "worker that is replaced is two.",
            {WORKER: "increase(inferstream_rebalances_total{@}[15m])"},
            line_at=4,
        ),
        graph(
            "work over a rebalance",
            "Documents in work when it came: those that went on, and those let go, which are read again.",
            {
                "went on": "sum(increase(inferstream_documents_resumed_total{@}[15m]))",
                "let go": "sum(increase(inferstream_documents_dropped_total{@}[15m]))",
            },
        ),
        graph(
            "partitions",
            "Owned by any worker. Below the partitions of the input topics: some are with nobody.",
            {
                "owned": "sum(inferstream_assigned_partitions{@})",
                "workers that own none": "count(inferstream_assigned_partitions{@} == 0) or vector(0)",
            },
        ),
        graph(
            "end to end",
            "By the records' timestamps.",
            {
                "p50": quantile(0.5, "inferstream_end_to_end_seconds"),
                "p95": quantile(0.95, "inferstream_end_to_end_seconds"),
                "p99": quantile(0.99, "inferstream_end_to_end_seconds"),
            },
            unit="s",
        ),
    )
    return dashboard(
        "delivery",
        "delivery",
        "What came of the documents, what is committed, and how the group is.",
        [outcomes, commits, group],
    )


DASHBOARDS: dict[str, Callable[[], dict[str, Any]]] = {"flow": flow, "device": device, "delivery": delivery}
