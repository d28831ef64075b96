"""What exactly-once costs: the same worker with `at-least-once` and with `exactly-once`, both on a tick of 100 ms.

On `builtin:hash` the worker does little else than what the guarantee is about, so its cost shows at its largest; the
real model is what it costs in earnest.  A round ends when the group's offsets cover the backlog: under exactly-once
that is when its results are visible, and under at-least-once nothing earlier tells that all of them are safe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from benchmarks.arena import PARTITIONS, ROUND_S, SETTLE_S, Arena, Contestant, Ours, Round, rounds_table
from benchmarks.machine import cpu_seconds
from benchmarks.report import Goal, Section, round_ratios
from benchmarks.scale import MODEL, Scale

HASH = "builtin:hash"
AT_LEAST_ONCE, EXACTLY_ONCE = "at-least-once", "exactly-once"
TICK_MS = 100
LOOK_S = 0.02  # the clock of a round: small against its seconds
GOAL = 0.9


async def run(arena: Arena, scale: Scale) -> Section:
    section = Section("Exactly-once, from Kafka to Kafka")
    for model, documents in ((HASH, scale.pipe_documents // 2), (MODEL, scale.guarantee_documents)):
        name = "builtin:hash" if model == HASH else "all-MiniLM-L6-v2"
        rounds = await _rounds(arena, scale.rounds, model, documents)
        ratios = round_ratios([r.rate for r in rounds[EXACTLY_ONCE]], [r.rate for r in rounds[AT_LEAST_ONCE]])
        goal = Goal.of_rounds(f"{EXACTLY_ONCE} / {AT_LEAST_ONCE}, {name}", ratios, GOAL, True)
        section.goals.append(goal)
        section.text += [rounds_table(name, rounds), f"{documents:,} documents a round."]
        section.data[model] = {
            "ratios": ratios,
            "rounds": {guarantee: [asdict(r) for r in done] for guarantee, done in rounds.items()},
        }
    section.text.append(
        "A round is timed from the moment the backlog appears until the group's offsets cover it; both with "
        f"`delivery.commit_interval_ms: {TICK_MS}`, and one broker with one replica on the same machine."
    )
    return section


async def _rounds(arena: Arena, count: int, model: str, documents: int) -> dict[str, list[Round]]:
    """The rounds of each guarantee, in turns."""
    texts = arena.corpus.take(documents)
    rounds: dict[str, list[Round]] = {AT_LEAST_ONCE: [], EXACTLY_ONCE: []}
    contestants: list[Contestant] = []
    try:
        for guarantee in rounds:
            changes = {
                "model": {"id": model, "dtype": "float32"},
                "delivery": {"guarantee": guarantee, "commit_interval_ms": TICK_MS},
            }
            topics = await arena.topics(f"{guarantee}-{model.partition(':')[0]}")
            contestants.append(Ours(arena, guarantee, topics, changes))
            await contestants[-1].ready(arena)  # each measures its threads undisturbed
        await asyncio.sleep(SETTLE_S)
        for contestant in contestants:  # what is paid once is paid here
            await _round(arena, contestant, texts[: len(texts) // 10])
        for _ in range(count):
            for contestant in contestants:
                rounds[contestant.name].append(await _round(arena, contestant, texts))
            contestants.reverse()
    finally:
        for contestant in contestants:
            contestant.stop()
    return rounds


async def _round(arena: Arena, contestant: Contestant, texts: Sequence[str]) -> Round:
    """Give the contestant a backlog and wait until its group's offsets cover it."""
    topics = contestant.topics
    partitions = [TopicPartition(topics.source, n) for n in range(PARTITIONS)]
    consumer = AIOKafkaConsumer(bootstrap_servers=arena.bootstrap, enable_auto_commit=False)
    admin = AIOKafkaAdminClient(bootstrap_servers=arena.bootstrap)
    await consumer.start()
    await admin.start()
    try:
        appeared = await arena.backlog(topics.source, texts)
        worker, broker = cpu_seconds(contestant.pid), arena.broker_cpu_s()
        ends = await consumer.end_offsets(partitions)  # the last offset of each is the backlog's marker
        deadline = time.monotonic() + ROUND_S
        while True:
            offsets = await admin.list_consumer_group_offsets(topics.group)
            if all(tp in offsets and offsets[tp].offset >= end - 1 for tp, end in ends.items()):
                break
            contestant.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{contestant.name} did not finish a round in {ROUND_S:.0f} s")
            await asyncio.sleep(LOOK_S)
        finished = time.time()
        worker, broker = cpu_seconds(contestant.pid) - worker, arena.broker_cpu_s() - broker
    finally:
        await consumer.stop()
        await admin.close()
    return Round(len(texts), finished - appeared, worker, broker)
