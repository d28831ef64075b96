"""Reads the worker's own metrics, over HTTP as a Prometheus would."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 2.0
_STAGE_FILL = "inferstream_stage_fill_ratio"
_STAGE_SECONDS = "inferstream_stage_seconds_sum"
_PADDING_SUM = "inferstream_batch_padding_ratio_sum"
_PADDING_COUNT = "inferstream_batch_padding_ratio_count"
_BUSY = "inferstream_device_busy_seconds_total"
_IDLE = "inferstream_device_idle_ratio"
_WORKED = frozenset(("prepare", "finish"))  # other stages wait, or are the device's own time
_BLOCKED = "inferstream_blocked_documents"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the demo shows of one scrape.

    ``fills`` (0 to 1) and ``seconds`` (worked so far) are by stage, in the worker's order; ``padding`` is the
    mean share of padding in a batch and ``busy`` the share in which the device computed of the recent time in which
    it could, both None while there is nothing to tell; ``busy_s`` adds up what the device computes side by side.
    ``blocked`` documents are done and wait for an older one of their partition.
    """

    fills: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    padding: float | None = None
    busy: float | None = None
    busy_s: float = 0.0
    blocked: float = 0.0


def parse(text: str) -> Reading:
    """Read the text format of Prometheus; metrics that are not there are left out."""
    fills: dict[str, float] = {}
    seconds: dict[str, float] = {}
    plain: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == _STAGE_FILL:
                fills[sample.labels["stage"]] = sample.value
            elif sample.name == _STAGE_SECONDS and sample.labels["stage"] in _WORKED:
                seconds[sample.labels["stage"]] = sample.value
            elif not sample.labels:
                plain[sample.name] = sample.value
    batches = plain.get(_PADDING_COUNT, 0.0)
    idle = plain.get(_IDLE, math.nan)
    return Reading(
        fills,
        seconds,
        plain[_PADDING_SUM] / batches if batches else None,
        None if math.isnan(idle) else 1 - idle,
        plain.get(_BUSY, 0.0),
        plain.get(_BLOCKED, 0.0),
    )


async def scrape(port: int) -> Reading | None:
    """The metrics of the worker on 127.0.0.1; None while it does not answer."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                # HTTP/1.0: the answer ends with the connection, there is nothing to decode.
                writer.write(b"GET /metrics HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        return None
    return parse(body.decode(errors="replace"))
