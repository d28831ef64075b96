"""The faults: how each is injected, what it excuses, and what it needs.

An injection returns when what it did is over or undone; that the service comes back is for the run to see.  Where
something has to be waited for it is a fact (the group lost a member, so many further results), never a time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiokafka import AIOKafkaProducer

from tests.faults.checker import source_of_result
from tests.faults.fleet import Member
from tests.faults.scene import ADMIN_S, Scene
from tests.support.cluster import Cluster, Node
from tests.support.reader import read_all

EXACTLY_ONCE = "exactly-once"
GUARANTEES = ("at-least-once", EXACTLY_ONCE)
OFFSETS_TOPIC = "__consumer_offsets"
TRANSACTIONS_TOPIC = "__transaction_state"
SLOW_S = 3.5  # of a batch: more than a revoke has for it, and less than device.hang_timeout_s

Inject = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """``workers`` run when it is injected.  ``repeats`` is how many workers' uncommitted answers one injection may
    have repeated under at-least-once; what is orderly has none, and some say it only when they do it
    (:meth:`Scene.excuse`).  ``disturbs``: brokers may be out of reach meanwhile.  ``identified`` and ``static`` are
    the workers'.  ``mixed``: it takes part in the mix.  ``recovers``: the next fault waits until every partition is
    worked on again.
    """

    name: str
    title: str
    inject: Inject
    workers: int = 2
    repeats: int = 0
    disturbs: bool = False
    brokers: int = 1
    proxied: bool = False
    under_orders: bool = False
    identified: bool = True
    static: bool = False
    guarantees: tuple[str, ...] = GUARANTEES
    mixed: bool = True
    recovers: bool = True


FAULTS: dict[str, Fault] = {}


def fault(name: str, title: str, **facts: object) -> Callable[[Inject], Inject]:
    def register(inject: Inject) -> Inject:
        FAULTS[name] = Fault(name, title, inject, **facts)  # type: ignore[arg-type]  # checked by the dataclass's users
        return inject

    return register


# ---------------------------------------------------------------- workers


@fault("kill", "kill -9", repeats=1)
async def kill(scene: Scene) -> None:
    member = await scene.pick(at_work=True)
    scene.note(f"kill -9 {member.name}")
    member.kill()


# What it left open holds its successors back until the brokers abort it: nobody comes with its transactional id.
fault(
    "kill-unidentified",
    "kill -9 without a stable transactional id",
    repeats=1,
    identified=False,
    guarantees=(EXACTLY_ONCE,),
    mixed=False,
)(kill)


@fault("static", "a static member restarts (kill -9 or SIGTERM)", static=True, mixed=False)
async def static(scene: Scene) -> None:
    member = await scene.pick(at_work=True)
    starts = member.starts
    if scene.chance.random() < 0.5:
        scene.note(f"kill -9 {member.name}")
        scene.excuse(repeats=1)
        member.kill()
    else:
        scene.note(f"SIGTERM {member.name}")
        member.terminate()
    await _started_again(scene, member, starts)


@fault("sigterm", "SIGTERM", workers=1)
async def sigterm(scene: Scene) -> None:
    member = await scene.pick(at_work=True)
    starts = member.starts
    scene.note(f"SIGTERM {member.name}")
    member.terminate()
    await _started_again(scene, member, starts)


@fault("zombie", "SIGSTOP past the session, SIGCONT", repeats=1)
async def zombie(scene: Scene) -> None:
    """Another worker if the first ends all the same: a fault at the same time may have told it to."""
    while True:
        member = await scene.pick(at_work=True)
        scene.note(f"SIGSTOP {member.name}")
        starts = member.starts
        member.freeze()

        async def missed(member: Member = member, starts: int = starts) -> bool:
            ended = not member.running or member.starts > starts
            return ended or member.name not in await scene.members()

        try:
            await scene.until(missed, f"the group to miss {member.name}")
            if member.running and member.frozen and member.starts == starts:
                if scene.fleet.running:
                    await scene.results(50, 500)  # the new owner is at work
                return
        finally:
            scene.note(f"SIGCONT {member.name}")
            member.thaw()


@fault("join", "a member joins")
async def join(scene: Scene) -> None:
    joining = scene.fleet.add()
    await scene.until(lambda: _at_work(joining), f"{joining.name} to get partitions")
    await scene.results(100, 800)
    scene.note(f"{joining.name} goes again")
    await _leave(scene, joining)


@fault("leave", "a member leaves")
async def leave(scene: Scene) -> None:
    leaving = await scene.pick(at_work=True)
    scene.note(f"{leaving.name} leaves for a while")
    await _leave(scene, leaving)
    await scene.results(100, 800)
    leaving.wanted = True


@fault("churn", "three members churning", workers=3)
async def churn(scene: Scene) -> None:
    for _ in range(5):
        member = await scene.pick()
        way = scene.chance.choice(["kill -9", "SIGTERM", "SIGTERM", "freeze"])
        scene.note(f"churn: {way} {member.name}")
        if way == "kill -9":
            scene.excuse(repeats=1)
            member.kill()
        elif way == "SIGTERM":
            member.terminate()
        else:
            member.freeze()
            await asyncio.sleep(scene.chance.uniform(0.2, 2.0))
            member.thaw()
        await scene.results(20, 200)


@fault(
    "slow-documents",
    "documents slower than a revoke, a member joins",
    repeats=1,
    under_orders=True,
    mixed=False,
)
async def slow_documents(scene: Scene) -> None:
    """What is in work when the group asks for its partitions cannot be finished in the time there is for it."""
    member, _ = await _ordered(scene, {"do": "slow", "seconds": SLOW_S})
    joining = scene.fleet.add()
    await scene.until(lambda: _at_work(joining), f"{joining.name} to get partitions")
    await scene.results(20, 200)
    scene.note(f"{joining.name} goes again")
    await _leave(scene, joining)
    member.take_order_back()


@fault("partition-added", "a partition more for a live input topic", mixed=False)
async def partition_added(scene: Scene) -> None:
    """The workers find it when they look at their metadata again, after a minute at most."""
    source = await scene.add_partition(scene.chance.choice(scene.sources))
    scene.note(f"{source[0]} has a partition {source[1]}")

    async def read() -> bool:
        return scene.feeder.committed.get(source, 0) > 0

    await scene.until(read, "the new partition to be read")


async def _leave(scene: Scene, member: Member) -> None:
    member.wanted = False
    member.terminate()
    await scene.until(lambda: _has_ended(member), f"{member.name} to end")


async def _has_ended(member: Member) -> bool:
    return not member.running


async def _at_work(member: Member) -> bool:
    return member.at_work


async def _started_again(scene: Scene, member: Member, starts: int) -> None:
    async def again() -> bool:
        return member.starts > starts

    await scene.until(again, f"{member.name} to be started again")


# ---------------------------------------------------------------- the device


async def _ordered(
    scene: Scene, order: dict[str, object], exits: frozenset[int] = frozenset()
) -> tuple[Member, int]:
    """Give a worker the order and wait until it has obeyed; another worker if that one ends first.

    Whoever gives an order takes it back: until then the worker takes no other.

    ``exits`` are the codes that obeying may end it with.  The worker comes back, and how often it had been started by
    then.
    """
    while True:
        member = await scene.pick()

        async def is_free(member: Member = member) -> bool:
            return not member.under_orders

        await scene.until(is_free, f"{member.name} to be done with its order")  # of a fault at the same time
        scene.note(f"{member.name} is told: {order}")
        starts = member.starts
        member.excused |= exits
        member.give_order(order)

        async def obeyed(member: Member = member, starts: int = starts) -> bool:
            return member.obeyed or not member.running or member.starts > starts

        await scene.until(obeyed, f"{member.name} to obey")
        if member.obeyed:
            return member, starts
        member.take_order_back()
        member.excused -= exits


@fault("device-raises", "the device raises", under_orders=True)
async def device_raises(scene: Scene) -> None:
    byte = scene.chance.randrange(256)
    scene.rules.raised.add(byte)
    member, _ = await _ordered(scene, {"do": "raise", "byte": byte})
    await scene.results(500, 1500)
    member.take_order_back()


@fault("out-of-memory", "out of device memory", under_orders=True)
async def out_of_memory(scene: Scene) -> None:
    member, _ = await _ordered(scene, {"do": "memory", "most": scene.chance.randrange(1, 4)})
    await scene.results(100, 1000)
    member.take_order_back()


@fault("poisoned-context", "a poisoned context", under_orders=True, repeats=1)
async def poisoned_context(scene: Scene) -> None:
    member, _ = await _ordered(scene, {"do": "poison"}, frozenset({5}))
    member.take_order_back()


@fault("device-hangs", "the device hangs", under_orders=True, repeats=1)
async def device_hangs(scene: Scene) -> None:
    # Either the orchestrator's probes are quicker or the worker's own watchdog.
    scene.fleet.patience = scene.chance.choice([1, 3, 1000])
    member, starts = await _ordered(scene, {"do": "hang"}, frozenset({8}))
    await _started_again(scene, member, starts)
    member.take_order_back()


# ---------------------------------------------------------------- brokers


@fault("full-partition", "partition full (record too large)")
async def full_partition(scene: Scene) -> None:
    scene.rules.refused = True
    limit = scene.chance.randrange(2000, 2600)  # a small result fits, a large one or a batch does not
    scene.note(f"max.message.bytes of the output topic is {limit}")
    await scene.set_limit(limit)
    try:
        await scene.results(100, 600)
    finally:
        scene.note("max.message.bytes of the output topic is the default again")
        await scene.set_limit(None)


@fault("topic-deleted", "output topic deleted", repeats=2, mixed=False)
async def topic_deleted(scene: Scene) -> None:
    await _delete_output(scene)
    await asyncio.sleep(scene.chance.uniform(0.5, 3.0))
    await _anew(scene)


async def _delete_output(scene: Scene) -> None:
    """The results so far are read while the workers stand still: what the topic takes along is not theirs to keep."""
    frozen = scene.fleet.running
    for member in frozen:
        member.freeze()
    try:
        await _quiet(scene)
        await _keep_results(scene)
        [future] = scene.admin.delete_topics([scene.target], operation_timeout=30).values()
        await asyncio.to_thread(future.result, ADMIN_S)
        scene.note("the output topic is deleted")
    finally:
        for member in frozen:
            member.thaw()


@fault("topic-gone", "output topic gone for good", repeats=2, mixed=False)
async def topic_gone(scene: Scene) -> None:
    """Nobody makes it anew before a worker has given up: exit code 3, after 60 s of refusals."""
    scene.fleet.excused = frozenset({3})
    exits = len(scene.fleet.exits)
    await _delete_output(scene)

    async def given_up() -> bool:
        return len(scene.fleet.exits) > exits

    try:
        await scene.until(given_up, "a worker to give up on a topic that is gone")
    finally:
        await _anew(scene)


async def _anew(scene: Scene) -> None:
    await scene.make_output()
    scene.observer.renewed(scene.target)
    scene.note("the output topic is there again")


async def _keep_results(scene: Scene) -> None:
    """Those of an open transaction may be committed with their topic gone: nobody can promise anything of them."""
    kept = await asyncio.to_thread(read_all, scene.kafka.bootstrap, scene.target)
    if scene.guarantee == EXACTLY_ONCE:
        written = await asyncio.to_thread(read_all, scene.kafka.bootstrap, scene.target, "read_uncommitted")
        open_ones = set(map(source_of_result, written)) - set(map(source_of_result, kept))
        scene.rules.unsettled |= {source for source in open_ones if source is not None}
    scene.deleted += kept


async def _quiet(scene: Scene) -> None:
    """Wait until what frozen workers had still sent is written."""
    ends: list[dict[int, int]] = []
    while len(ends) < 3 or any(end != ends[-1] for end in ends[-3:]):
        ends.append(await scene.kafka.end_offsets(scene.target, "read_uncommitted"))
        await asyncio.sleep(0.1)


@fault("fenced", "producer fenced", guarantees=(EXACTLY_ONCE,))
async def fenced(scene: Scene) -> None:
    """Another producer with the worker's transactional id, as a second live worker with it would be."""
    member = await scene.pick(at_work=True)
    scene.note(f"the transactional id of {member.name} is taken")
    member.excused.add(3)

    async def intrude() -> bool:
        intruder = AIOKafkaProducer(
            bootstrap_servers=scene.kafka.bootstrap, transactional_id=scene.transactional_id(member.name)
        )
        try:
            await intruder.start()
        finally:
            await intruder.stop()
        return True

    await scene.until(intrude, "the transactional id to be taken")


def _node(scene: Scene, chance: random.Random | None = None) -> Node:
    return (chance or scene.chance).choice(_cluster(scene).nodes)


def _cluster(scene: Scene) -> Cluster:
    assert isinstance(scene.kafka, Cluster), "this fault needs brokers of its own"
    return scene.kafka


async def broker_killed(scene: Scene) -> None:
    node = _node(scene)
    async with _cluster(scene).changing:
        scene.note(f"kill -9 broker {node.number}")
        node.kill()
        await asyncio.sleep(scene.chance.uniform(0, 2))
        node.begin()
        await node.serves()
        scene.note(f"broker {node.number} serves again")


async def broker_restarted(scene: Scene) -> None:
    node = _node(scene)
    async with _cluster(scene).changing:
        scene.note(f"broker {node.number} shuts down")
        await asyncio.to_thread(node.stop)
        node.begin()
        await node.serves()
        scene.note(f"broker {node.number} serves again")


for _name, _title, _inject in (
    ("broker-killed", "broker killed and restarted", broker_killed),
    ("broker-restarted", "clean broker restart", broker_restarted),
):
    fault(_name, f"{_title} (of 1)", repeats=2, mixed=False)(_inject)
    fault(f"{_name}-3", f"{_title} (of 3)", repeats=2 * (_inject is broker_killed), brokers=3, disturbs=True)(
        _inject
    )


@fault("leader-moved", "leaders moved", brokers=3, disturbs=True)
async def leader_moved(scene: Scene) -> None:
    topic = scene.chance.choice([*scene.sources, scene.target, scene.target, scene.dead_letters])
    await _move_leaders(scene, topic)


@fault("coordinator-moved", "coordinators moved", brokers=3, disturbs=True)
async def coordinator_moved(scene: Scene) -> None:
    for topic in [OFFSETS_TOPIC, *([TRANSACTIONS_TOPIC] if scene.guarantee == EXACTLY_ONCE else [])]:
        await _move_leaders(scene, topic)


async def _move_leaders(scene: Scene, topic: str) -> None:
    async with _cluster(scene).changing:
        await _cluster(scene).move_leaders(topic, scene.chance)
    scene.note(f"the leaders of {topic} have moved")


# ---------------------------------------------------------------- the network


@fault("cut", "connections cut", proxied=True, disturbs=True)
async def cut(scene: Scene) -> None:
    for node in _cluster(scene).nodes:
        scene.note(f"{node.proxy.cut()} connections to broker {node.number} are cut")


@fault("half-open", "connections half-open", repeats=2, proxied=True, disturbs=True)
async def half_open(scene: Scene) -> None:
    for node in _cluster(scene).nodes:
        scene.note(f"{node.proxy.silence()} connections to broker {node.number} are half-open")


@fault("slow-broker", "slow broker", proxied=True, disturbs=True)
async def slow_broker(scene: Scene) -> None:
    proxy = _node(scene).proxy
    proxy.delay_s = scene.chance.uniform(0.05, 0.4)
    proxy.bytes_per_s = scene.chance.choice([None, 500_000, 2_000_000])
    scene.note(f"slow by {proxy.delay_s:.2f} s, {proxy.bytes_per_s} bytes/s")
    try:
        await scene.results(100, 800)
    finally:
        proxy.delay_s, proxy.bytes_per_s = 0.0, None
        scene.note("as quick as before")


# ---------------------------------------------------------------- all of them


async def at_random(scene: Scene) -> None:
    """One to three of the faults that the mix has, at the same time, on whoever it hits."""
    several = [entry for entry in FAULTS.values() if entry.mixed and scene.guarantee in entry.guarantees]
    chosen = scene.chance.sample(several, scene.chance.randrange(1, 4))
    scene.note("at once: " + ", ".join(entry.name for entry in chosen))
    repeats = sum(entry.repeats for entry in chosen)
    if len(chosen) > 1:  # what is orderly alone need not be so when another fault meets it
        repeats = max(repeats, len(scene.fleet.running))
    scene.excuse(repeats=repeats)
    scene.fleet.unheard |= any(entry.disturbs for entry in chosen)
    try:
        async with asyncio.TaskGroup() as together:
            for entry in chosen:
                together.create_task(_delayed(scene, entry))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def _delayed(scene: Scene, entry: Fault) -> None:
    await asyncio.sleep(scene.chance.uniform(0, 1))
    await entry.inject(scene)


FAULTS["random"] = Fault(
    "random",
    "all of these at random",
    at_random,
    workers=3,
    brokers=3,
    proxied=True,
    under_orders=True,
    mixed=False,
    recovers=False,
)

# For `make test`: what needs no broker of its own, on one scene each, so that the workers start only once.
SLICES: dict[str, tuple[str, ...]] = {
    "slice-offsets": (
        "kill",
        "device-raises",
        "sigterm",
        "full-partition",
        "poisoned-context",
        "join",
        "out-of-memory",
        "zombie",
        "leave",
    ),
    "slice-transactions": (
        "fenced",
        "kill",
        "device-raises",
        "join",
        "poisoned-context",
        "zombie",
        "sigterm",
        "out-of-memory",
        "full-partition",
    ),
}
