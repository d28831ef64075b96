"""From Kafka to Kafka with a real model: against the loops that people write first, and against the model alone."""

from __future__ import annotations

import asyncio
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.arena import READY_S, ROUND_S, SETTLE_S, Arena, Child, Ours, Script, Topics
from benchmarks.metered import DeviceCounters
from benchmarks.peers import environment
from benchmarks.report import Goal, Section, Spread, number, round_ratios, table
from benchmarks.scale import MODEL, Scale
from inferstream.models.files import locate
from tests.support.broker import free_ports
from tests.support.worker import merged

NAIVE = {"naive-64": 64, "naive-1000": 1000}
"""max_records of the naive loops: what one call to encode() gets, and sorts by length."""

INFINITY = {"max_records": 1000, "batch_size": 16, "lengths_via_tokenize": True}
"""What infinity-emb's engine does best with here; docs/cpu.md says what else was tried."""

INFINITY_TEXT = (
    f" `infinity`: infinity-emb's engine in the same loop with `max_records={INFINITY['max_records']}`, in an "
    f"environment of its own, batches of {INFINITY['batch_size']}."
)

GOALS = {"naive-64": 3.5, "naive-1000": 1.6, "infinity": 1.5, "engine": 0.95}
OURS = "inferstream"
MOST_DOCUMENTS = 50_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One contestant in one round; ``tokens`` are without padding.

    ``broker_cpu_s`` is None without Kafka, ``idle`` where no thread does nothing but compute.
    """

    documents: int
    seconds: float
    cpu_s: float
    broker_cpu_s: float | None
    tokens: int
    padding_efficiency: float
    idle: float | None

    @property
    def rate(self) -> float:
        return self.documents / self.seconds


class Metered(Ours):
    """Our worker, and what its own counters say of a round."""

    def __init__(self, arena: Arena, topics: Topics, changes: Mapping[str, Any]) -> None:
        [self._port] = free_ports(1)
        super().__init__(arena, OURS, topics, merged(changes, {"telemetry": {"port": self._port}}))

    async def take_turn(self, arena: Arena, texts: Sequence[str]) -> Turn:
        before = await asyncio.to_thread(DeviceCounters.read, self._port)
        done = await arena.round(self, texts)
        after = await asyncio.to_thread(DeviceCounters.read, self._port)
        return Turn(
            done.documents,
            done.seconds,
            done.worker_cpu_s,
            done.broker_cpu_s,
            after.tokens - before.tokens,
            after.padding_efficiency_since(before),
            after.idle_since(before, done.seconds),
        )


class Peer(Script):
    """Somebody else's engine in the loop of :mod:`benchmarks.naive`."""

    async def take_turn(self, arena: Arena, texts: Sequence[str]) -> Turn:
        done = await arena.round(self, texts)
        computed = await self.asked()
        tokens, padded = computed["tokens"], computed["padded_tokens"]
        efficiency = tokens / padded
        return Turn(
            done.documents, done.seconds, done.worker_cpu_s, done.broker_cpu_s, tokens, efficiency, None
        )


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
    contestants: list[Metered | Peer] = []
    turns: dict[str, list[Turn]] = {name: [] for name in (*names, OURS)}
    engines: list[dict[str, Any]] = []
    try:
        # One after the other: each measures or warms itself up undisturbed.
        alone = await engine.answer(READY_S)
        texts = arena.corpus.take(alone["documents"])
        ours = Metered(arena, await arena.topics("ours"), changes)
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
                turns[contestant.name].append(await contestant.take_turn(arena, texts))
            if "engine" in names:
                engine.send(signal.SIGUSR1)
                engines.append(await engine.answer(ROUND_S))
                turns["engine"].append(_engine_turn(engines[-1]))
            contestants.append(contestants.pop(0))  # nobody is always first
    finally:
        engine.kill()
        for contestant in contestants:
            contestant.stop()
    return _section(dtype, turns, engines, alone)


def _peer(arena: Arena, name: str, topics: Topics, dtype: str) -> Peer:
    """Raises PeerUnavailable."""
    options = {"dtype": dtype, "compression": "zstd"}
    if name in NAIVE:
        options |= {"model": MODEL, "max_records": NAIVE[name]}
        return Peer(arena, name, topics, "naive", options)
    options |= {"model": str(locate(MODEL).folder), **INFINITY}
    return Peer(arena, name, topics, "peers.infinity", options, environment("infinity"))


def _engine_turn(round_: dict[str, Any]) -> Turn:
    return Turn(
        round_["documents"],
        round_["seconds"],
        round_["process_cpu_s"],
        None,
        round_["tokens"],
        round_["padding_efficiency"],
        1 - round_["busy_s"] / (round_["lanes"] * round_["seconds"]),
    )


def _section(
    dtype: str, turns: Mapping[str, Sequence[Turn]], engines: list[dict[str, Any]], alone: dict[str, Any]
) -> Section:
    section = Section(f"Throughput, all-MiniLM-L6-v2 in {dtype}")
    rates = {name: [turn.rate for turn in done] for name, done in turns.items()}
    ratios = {name: round_ratios(rates[OURS], rates[name]) for name in rates if name != OURS}
    if dtype == "float32":
        section.goals += [
            Goal.of_rounds(f"{OURS} / {name}, {dtype}", found, GOALS[name], True)
            for name, found in ratios.items()
        ]
    else:
        spreads = {f"{OURS} / {name}, {dtype}": Spread.of(found) for name, found in ratios.items()}
        rows = [[name, number(spread.median), spread.range] for name, spread in spreads.items()]
        section.text.append(table(["", "measured", "lowest – highest"], rows))
    head = ["", "documents/s", "lowest – highest", "padding efficiency", "device idle"]
    head += ["its CPU ms/document", "broker's CPU ms/document"]
    documents = turns[OURS][0].documents
    section.text += [
        table(head, [[name, *_row(done)] for name, done in turns.items()]),
        f"{documents:,} documents a round, {len(rates[OURS])} rounds. `naive-64`: aiokafka `getmany(max_records=64)`, "
        "sentence-transformers `encode`, send, commit; `naive-1000`: the same with 1,000. `engine`: this project's "
        "device stage from text in memory, without Kafka." + (INFINITY_TEXT if "infinity" in turns else ""),
        "Padding efficiency is the share of the tokens computed that are not padding: counted in the model's forward "
        "for the others, by its own counters (of the batches as formed) for ours and the engine. "
        + tokens_text(turns)
        + " Device idle is 1 - CPU time of the compute threads ÷ (their number × time of the round), from the moment "
        "the backlog appears to its last result: what the system gives to others on the same cores, the broker among "
        "them, is idle too. The other loops compute in no threads of their own (–).",
    ]
    if "engine" in ratios:
        section.text.append(engine_text(Spread.of(ratios["engine"])))
    if engines:
        last = engines[-1]
        stages = ", ".join(f"{stage} {number(us)}" for stage, us in last["cpu_us"].items())
        section.text.append(
            f"The engine: {last['lanes']} compute threads, {number(last['tokens_per_s'])} tokens/s in the last round; "
            f"CPU µs/document: {stages}."
        )
    section.data = {
        "documents": documents,
        "ratios": ratios,
        "rates": rates,
        "rounds": {name: [asdict(turn) for turn in done] for name, done in turns.items()},
        "engine": {"calibration": alone, "rounds": engines},
    }
    return section


def _row(turns: Sequence[Turn]) -> list[str]:
    rate = Spread.of([turn.rate for turn in turns])
    idle = [turn.idle for turn in turns if turn.idle is not None]
    broker_s = [turn.broker_cpu_s / turn.documents for turn in turns if turn.broker_cpu_s is not None]
    return [
        number(rate.median),
        rate.range,
        f"{statistics.median(turn.padding_efficiency for turn in turns):.1%}",
        f"{statistics.median(idle):.1%}" if idle else "–",
        number(statistics.median(turn.cpu_s / turn.documents for turn in turns) * 1e3),
        number(statistics.median(broker_s) * 1e3) if broker_s else "–",
    ]


def tokens_text(turns: Mapping[str, Sequence[Turn]]) -> str:
    """Whether all computed the same tokens, so that documents/s and useful tokens/s give the same ratios."""
    each = {name: {turn.tokens / turn.documents for turn in done} for name, done in turns.items()}
    if len(set.union(*each.values())) == 1:
        [tokens] = each[OURS]
        return (
            f"All computed the same {number(tokens)} useful tokens a document, so documents/s and useful tokens/s give "
            "the same ratios."
        )
    counted = ", ".join(
        f"{name} {' or '.join(f'{tokens:.2f}' for tokens in sorted(found))}" for name, found in each.items()
    )
    return f"All take the same documents, but counted other tokens a document ({counted}): ratios are of documents/s."


def engine_text(ratio: Spread) -> str:
    """What the rounds can say of Kafka's cost; it cannot speed the engine up."""
    if ratio.lowest > 1.0:
        return (
            "Kafka cannot speed the engine up: all rounds above 1.00 mean that what the machine did meanwhile was "
            "worth more than Kafka's cost, and this run does not say what that is."
        )
    if ratio.covers(1.0):
        return (
            "Kafka cannot speed the engine up: a round of 1.00 or more shows what the machine did meanwhile, so "
            "Kafka's cost is of the size of that noise."
        )
    return "Kafka's cost is what the ratio to the engine lacks of 1.00, in every round."
