"""From Kafka to Kafka with a real model: against the loops that people write first, and against the model alone."""

from __future__ import annotations

import asyncio
import signal
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.arena import READY_S, ROUND_S, SETTLE_S, Arena, Child, Contestant, Ours, Round, Script, Topics
from benchmarks.peers import environment
from benchmarks.report import Goal, Section, median_ratio, number, table
from benchmarks.scale import MODEL, Scale
from inferstream.models.files import locate

NAIVE = {"naive-64": 64, "naive-1000": 1000}
"""max_records of the naive loops: what one call to encode() gets, and sorts by length."""

INFINITY = {"max_records": 1000, "batch_size": 16, "lengths_via_tokenize": True}
"""What infinity-emb's engine does best with here; docs/cpu.md says what else was tried."""

INFINITY_TEXT = (
    f" `infinity`: infinity-emb's engine in the same loop with `max_records={INFINITY['max_records']}`, in an "
    f"environment of its own, batches of {INFINITY['batch_size']}."
)

GOALS = {"naive-64": 2.5, "naive-1000": 1.3, "infinity": 1.5, "engine": 0.92}
OURS = "inferstream"
MOST_DOCUMENTS = 50_000


async def run(arena: Arena, scale: Scale, names: Sequence[str], dtype: str) -> Section:
    """``names``: which of naive-64, naive-1000, infinity and engine to compare with.  Goals are for float32."""
    changes = {"model": {"id": MODEL, "dtype": dtype}}
    engine = Child(
        arena.folder / f"engine-{dtype}",
        "engine",
        {
            "config": str(arena.config(Topics("documents", "results", f"engine-{dtype}"), changes)),
            "texts": str(arena.texts_file()),
            "seconds": scale.round_s if dtype == "float32" else scale.round_s / 2,
            "least": scale.least_documents,
            "most": MOST_DOCUMENTS,
        },
    )
    contestants: list[Contestant] = []
    rates: dict[str, list[float]] = {name: [] for name in (*names, OURS)}
    rounds: dict[str, list[Round]] = {name: [] for name in rates}
    engines: list[dict[str, Any]] = []
    try:
        # One after the other: each measures or warms itself up undisturbed.
        alone = await engine.answer(READY_S)
        texts = arena.corpus.take(alone["documents"])
        ours = Ours(arena, OURS, await arena.topics("ours"), changes)
        contestants.append(ours)
        await ours.ready(arena)
        for name in names:
            if name != "engine":
                peer = _peer(arena, name, await arena.topics(name), dtype)
                contestants.append(peer)
                await peer.ready(arena)
        await asyncio.sleep(SETTLE_S)
        for _ in range(scale.rounds):
            for contestant in contestants:
                done = await arena.round(contestant, texts)
                rounds[contestant.name].append(done)
                rates[contestant.name].append(done.rate)
            if "engine" in names:
                engine.send(signal.SIGUSR1)
                engines.append(await engine.answer(ROUND_S))
                rates["engine"].append(engines[-1]["rate"])
            contestants.append(contestants.pop(0))  # nobody is always first
    finally:
        engine.kill()
        for contestant in contestants:
            contestant.stop()
    return _section(dtype, len(texts), rates, rounds, engines, alone)


def _peer(arena: Arena, name: str, topics: Topics, dtype: str) -> Script:
    """Somebody else's engine in the loop of :mod:`benchmarks.naive`.  Raises PeerUnavailable."""
    options = {"dtype": dtype, "compression": "zstd"}
    if name in NAIVE:
        options |= {"model": MODEL, "max_records": NAIVE[name]}
        return Script(arena, name, topics, "naive", options)
    options |= {"model": str(locate(MODEL).folder), **INFINITY}
    return Script(arena, name, topics, "peers.infinity", options, environment("infinity"))


def _section(
    dtype: str,
    documents: int,
    rates: dict[str, list[float]],
    rounds: dict[str, list[Round]],
    engines: list[dict[str, Any]],
    alone: dict[str, Any],
) -> Section:
    section = Section(f"Throughput, all-MiniLM-L6-v2 in {dtype}")
    ratios = {name: median_ratio(rates[OURS], rates[name]) for name in rates if name != OURS}
    if dtype == "float32":
        section.goals += [
            Goal(f"{OURS} / {name}, {dtype}", ratios[name], GOALS[name], True) for name in ratios
        ]
    else:
        section.text.append(
            table(["", "measured"], [[f"{OURS} / {name}, {dtype}", number(ratios[name])] for name in ratios])
        )
    rows = []
    for name, values in rates.items():
        row = [name, number(statistics.median(values)), f"{number(min(values))} – {number(max(values))}"]
        if rounds[name]:
            row += [
                number(statistics.median(r.worker_cpu_s / r.documents for r in rounds[name]) * 1e3),
                number(statistics.median(r.broker_cpu_s / r.documents for r in rounds[name]) * 1e3),
            ]
        else:
            row += [
                number(statistics.median(e["process_cpu_s"] / e["documents"] for e in engines) * 1e3),
                "–",
            ]
        rows.append(row)
    head = ["", "documents/s", "lowest – highest", "its CPU ms/document", "broker's CPU ms/document"]
    section.text.append(table(head, rows))
    section.text.append(
        f"{documents:,} documents a round, {len(rates[OURS])} rounds. `naive-64`: aiokafka `getmany(max_records=64)`, "
        "sentence-transformers `encode`, send, commit; `naive-1000`: the same with 1,000. `engine`: this project's "
        "device stage from text in memory, without Kafka." + (INFINITY_TEXT if "infinity" in rates else "")
    )
    if engines:
        last = engines[-1]
        stages = ", ".join(f"{stage} {number(us)}" for stage, us in last["cpu_us"].items())
        section.text.append(
            f"The engine: {last['lanes']} compute threads, {number(last['tokens_per_s'])} tokens/s, device busy "
            f"{last['busy_s'] / last['lanes'] / last['seconds']:.1%}, batches as formed "
            f"{last['padding_efficiency']:.0%} tokens and the rest padding; CPU µs/document: {stages}."
        )
    section.data = {
        "documents": documents,
        "ratios": ratios,
        "rates": rates,
        "rounds": {name: [vars_of(r) for r in done] for name, done in rounds.items() if done},
        "engine": {"calibration": alone, "rounds": engines},
    }
    return section


def vars_of(round_: Round) -> dict[str, float]:
    return {
        "documents": round_.documents,
        "seconds": round_.seconds,
        "worker_cpu_s": round_.worker_cpu_s,
        "broker_cpu_s": round_.broker_cpu_s,
    }
