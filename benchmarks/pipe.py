"""The pipe: what is left without a model.  `builtin:hash` against the smallest possible aiokafka loop."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from benchmarks.arena import SETTLE_S, Arena, Contestant, Ours, Round, Script, rounds_table
from benchmarks.report import Goal, Section, round_ratios
from benchmarks.scale import Scale

HASH = {"model": {"id": "builtin:hash"}}
OURS, SMALLEST = "inferstream", "smallest loop"
GOAL = 0.5


async def run(arena: Arena, scale: Scale) -> Section:
    texts = arena.corpus.take(scale.pipe_documents)
    rounds: dict[str, list[Round]] = {OURS: [], SMALLEST: []}
    contestants: list[Contestant] = [Ours(arena, OURS, await arena.topics("pipe"), HASH)]
    try:
        contestants.append(
            Script(arena, SMALLEST, await arena.topics("smallest"), "smallest", {"compression": "zstd"})
        )
        for contestant in contestants:
            await contestant.ready(arena)
        await asyncio.sleep(SETTLE_S)
        for contestant in contestants:  # what is paid once is paid here
            await arena.round(contestant, texts[: len(texts) // 10])
        for _ in range(scale.rounds):
            for contestant in contestants:
                rounds[contestant.name].append(await arena.round(contestant, texts))
            contestants.reverse()
    finally:
        for contestant in contestants:
            contestant.stop()
    ratios = round_ratios([r.rate for r in rounds[OURS]], [r.rate for r in rounds[SMALLEST]])
    goal = Goal.of_rounds(f"{OURS} / {SMALLEST}", ratios, GOAL, True)
    section = Section("The pipe: builtin:hash from Kafka to Kafka", [goal])
    section.text += [
        rounds_table("", rounds),
        f"{len(texts):,} documents a round. The smallest loop writes the same results with `getmany`, "
        "`orjson.loads`, the same vector, `orjson.dumps`, `send_batch` and `commit`: no validation, no bounds, no dead "
        "letters, one poll after the other.",
    ]
    section.data = {
        "ratios": ratios,
        "rounds": {name: [asdict(r) for r in done] for name, done in rounds.items()},
    }
    return section
