"""An Apache Kafka of one or three nodes, each behind a proxy, whose leaders a test can move.

Every node is broker and controller, as in ``broker.py``, and has two listeners for clients: the harness uses the
plain one; the other one is advertised with the port of a :class:`~tests.support.network.Proxy`, so that what is done to
the proxy is done to the clients that come by it and to nobody else.  Of three nodes one may be away: topics have three
replicas and two have to acknowledge.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError as AIOKafkaError
from aiokafka.errors import for_code
from aiokafka.protocol.admin import AlterPartitionReassignmentsRequest
from confluent_kafka import ElectionType, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, PartitionMetadata

from tests.support.broker import BrokerUnavailable, NativeKafka, free_ports
from tests.support.client import DEADLINE_S, Kafka
from tests.support.network import Proxy

SERVES_S = 180.0
"""How long a node may take to start, and leaders to move: several nodes at once on a busy machine."""


class Ports(NamedTuple):
    plain: int
    behind_proxy: int
    proxy: int
    controller: int


class Node(NativeKafka):
    """One node of a cluster, and the proxy before it."""

    def __init__(self, folder: Path, number: int, ports: Sequence[Ports]) -> None:
        """``number`` counts from 1; ``ports`` are those of all nodes."""
        own = ports[number - 1]
        copies = str(len(ports))
        acknowledging = "2" if len(ports) > 2 else "1"
        super().__init__(
            folder,
            {
                "node.id": str(number),
                "controller.quorum.voters": ",".join(
                    f"{n}@127.0.0.1:{entry.controller}" for n, entry in enumerate(ports, 1)
                ),
                "listeners": (
                    f"PLAINTEXT://127.0.0.1:{own.plain},PROXIED://127.0.0.1:{own.behind_proxy},"
                    f"CONTROLLER://127.0.0.1:{own.controller}"
                ),
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{own.plain},PROXIED://127.0.0.1:{own.proxy}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "inter.broker.listener.name": "PLAINTEXT",
                "default.replication.factor": copies,
                "min.insync.replicas": acknowledging,
                "offsets.topic.replication.factor": copies,
                "transaction.state.log.replication.factor": copies,
                "transaction.state.log.min.isr": acknowledging,
                "share.coordinator.state.topic.replication.factor": copies,
                "share.coordinator.state.topic.min.isr": acknowledging,
                "auto.leader.rebalance.enable": "false",  # a leader stays where a test has put it
                # A killed node is missed, and comes back, after 3 s and not after 9.
                "broker.session.timeout.ms": "3000",
                "broker.heartbeat.interval.ms": "500",
                "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
            },
        )
        self.number = number
        self.bootstrap = f"127.0.0.1:{own.plain}"
        self.proxy = Proxy(own.proxy, own.behind_proxy)

    async def serves(self) -> None:
        """Wait until the node knows itself as one of the cluster's brokers."""
        admin = AdminClient(
            {"bootstrap.servers": self.bootstrap, "reconnect.backoff.max.ms": 100, "log_level": 0}
        )
        try:
            async with asyncio.timeout(SERVES_S):
                while True:
                    if not self.alive:
                        raise BrokerUnavailable(f"Kafka ended while starting; {self._log_end()}")
                    try:
                        if self.number in (await asyncio.to_thread(admin.list_topics, timeout=2)).brokers:
                            return
                    except KafkaException:
                        pass
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise BrokerUnavailable(
                f"node {self.number} does not serve after {SERVES_S:.0f} s; {self._log_end()}"
            ) from None


class Cluster(Kafka):
    """``count`` nodes, started and stopped together."""

    def __init__(self, folder: Path, count: int) -> None:
        taken = free_ports(4 * count)
        ports = [Ports(*taken[4 * n : 4 * n + 4]) for n in range(count)]
        self.nodes = [Node(folder / f"node-{n}", n, ports) for n in range(1, count + 1)]
        super().__init__(",".join(node.bootstrap for node in self.nodes))
        self.proxied = ",".join(f"127.0.0.1:{node.proxy.port}" for node in self.nodes)
        self.replicas = count
        self.changing = asyncio.Lock()  # held while a node is away or leaders move: one of three may be away

    async def start(self) -> Cluster:
        try:
            for node in self.nodes:
                await node.proxy.start()
                node.begin()
            await asyncio.gather(*(node.serves() for node in self.nodes))
        except BaseException:
            await self.remove()
            raise
        return self

    async def remove(self) -> None:
        """Kill what runs and drop the data."""
        for node in self.nodes:
            await node.proxy.stop()
            node.remove()

    async def leaders(self, topic: str) -> dict[int, int]:
        """The node that leads each partition."""
        return {n: found.leader for n, found in (await self._placed(topic)).items()}

    async def move_leaders(self, topic: str, chance: random.Random) -> None:
        """Let another replica lead every partition of the topic; returns when it does.

        The replica that shall lead is made the preferred one (AlterPartitionReassignments, KIP-455), then elected
        (ElectLeaders, KIP-183): no record is copied and no broker goes down.  For ``__consumer_offsets`` and
        ``__transaction_state`` this moves the coordinators.
        """
        heads: dict[int, int] = {}
        deadline = asyncio.get_running_loop().time() + SERVES_S
        while True:
            with contextlib.suppress(
                KafkaException, AIOKafkaError, OSError
            ):  # a controller that moves as well
                placed = await self._placed(topic)
                others = {n: [r for r in found.isrs if r != found.leader] for n, found in placed.items()}
                if not heads and all(others.values()):
                    heads = {n: chance.choice(replicas) for n, replicas in others.items()}
                if heads:
                    await self._prefer(topic, placed, heads)
                    await self._elect(topic, list(heads))
                    if await self.leaders(topic) == heads:
                        return
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"the leaders of {topic} have not moved to {heads}")
            await asyncio.sleep(0.1)

    async def _prefer(
        self, topic: str, placed: Mapping[int, PartitionMetadata], heads: Mapping[int, int]
    ) -> None:
        """Make these replicas the first of their partitions'."""
        orders = {n: [head, *(r for r in placed[n].replicas if r != head)] for n, head in heads.items()}
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            partitions = [(n, order, {}) for n, order in orders.items()]
            answer = await admin._send_request(
                AlterPartitionReassignmentsRequest(10_000, [(topic, partitions, {})], {})
            )
        finally:
            await admin.close()
        codes = {answer.error_code, *(entry[1] for name in answer.responses for entry in name[1])}
        for code in codes - {0}:
            raise for_code(code)(f"replicas of {topic}")

    async def _elect(self, topic: str, partitions: Sequence[int]) -> None:
        wanted = [TopicPartition(topic, n) for n in partitions]
        admin = self._admin()  # kept: a handle that is dropped takes its answer along
        future = admin.elect_leaders(ElectionType.PREFERRED, wanted)
        # Of KafkaError, and not of KafkaException, as confluent-kafka 2.16 says.
        answers: dict[TopicPartition, KafkaError | None] = await asyncio.to_thread(future.result, DEADLINE_S)
        for error in answers.values():
            passing = (KafkaError.ELECTION_NOT_NEEDED, KafkaError.PREFERRED_LEADER_NOT_AVAILABLE)
            if error is not None and error.code() not in passing:
                raise KafkaException(error)

    async def _placed(self, topic: str) -> dict[int, PartitionMetadata]:
        found = await asyncio.to_thread(self._admin().list_topics, topic, timeout=DEADLINE_S)
        return dict(found.topics[topic].partitions)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
