"""Reads dashboards as Grafana does, as far as queries are concerned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something; rows are only headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(dashboard: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Panel, target and query of everything that is asked for."""
    for panel in panels_of(dashboard):
        for target in panel["targets"]:
            yield panel, target, target["expr"]


def in_prometheus(query: str, window: str = "5m") -> str:
    """The query as Prometheus gets it when all workers are chosen."""
    for name, value in {
        "$namespace": ".*",
        "$job": ".*",
        "$instance": ".*",
        "$__rate_interval": window,
        "$__range": window,
    }.items():
        query = query.replace(name, value)
    return query
