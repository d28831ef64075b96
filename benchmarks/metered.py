"""What a worker says of its device on its page of metrics, read from outside."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

TIMEOUT_S = 10.0
PREFIX = "inferstream_"


@dataclass(frozen=True, slots=True)
class DeviceCounters:
    """Counters since the worker's start.

    ``busy_s`` is the CPU time of its ``lanes`` compute threads, in seconds; ``padding`` the shares of its batches that
    are padding, summed.
    """

    busy_s: float
    lanes: int
    tokens: int
    batches: int
    padding: float

    @classmethod
    def parse(cls, page: str) -> DeviceCounters:
        """From Prometheus' text format; raises KeyError where a sample is missing."""
        lines = [line.split(" ") for line in page.splitlines() if line.startswith(PREFIX)]
        samples = {words[0].removeprefix(PREFIX): float(words[1]) for words in lines if len(words) == 2}
        return cls(
            busy_s=samples["device_busy_seconds_total"],
            lanes=int(samples["device_lanes"]),
            tokens=int(samples["batch_tokens_sum"]),
            batches=int(samples["batch_padding_ratio_count"]),
            padding=samples["batch_padding_ratio_sum"],
        )

    @classmethod
    def read(cls, port: int) -> DeviceCounters:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as answer:
            return cls.parse(answer.read().decode())

    def idle_since(self, before: DeviceCounters, seconds: float) -> float:
        """The share of ``seconds`` in which the compute threads did not compute."""
        return 1 - (self.busy_s - before.busy_s) / (self.lanes * seconds)

    def padding_efficiency_since(self, before: DeviceCounters) -> float:
        """The share of a batch that is not padding, on average."""
        batches = self.batches - before.batches
        return 1 - (self.padding - before.padding) / batches if batches else 1.0
