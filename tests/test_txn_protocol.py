"""What the protocol module refuses before it sends anything; the rest is decided by a real broker (tests/kafka)."""

from __future__ import annotations

from types import SimpleNamespace

import aiokafka
import pytest
from aiokafka.client import ConnectionGroup

from inferstream.errors import KafkaRefused, SettingsError
from inferstream.kafka import txn_protocol as module
from inferstream.kafka.txn_protocol import TransactionalProducer

NODE = 1
NEW_ENOUGH = {28: (0, 3), 9: (0, 7)}


async def test_aiokafka_when_it_is_not_a_tested_version_then_it_is_refused_naming_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aiokafka, "__version__", "0.15.0")
    with pytest.raises(SettingsError, match=r"0\.14\.0.*0\.15\.0"):
        TransactionalProducer("id", bootstrap_servers="broker:1")


@pytest.mark.parametrize(
    ("versions", "refused"),
    [
        (NEW_ENOUGH, False),
        (NEW_ENOUGH | {28: (0, 2)}, True),
        (NEW_ENOUGH | {9: (0, 6)}, True),
        ({}, True),
    ],
    ids=["Kafka 2.5", "older TxnOffsetCommit", "older OffsetFetch", "neither"],
)
async def test_brokers_when_they_cannot_keep_zombies_out_then_they_are_refused(
    versions: dict[int, tuple[int, int]], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = TransactionalProducer("id", bootstrap_servers="broker:1")

    async def coordinator(kind: object, key: str) -> int:
        return NODE

    monkeypatch.setattr(producer._sender, "_find_coordinator", coordinator)
    connection = SimpleNamespace(_versions=versions)
    monkeypatch.setattr(producer.client, "_conns", {(NODE, ConnectionGroup.COORDINATION): connection})
    try:
        if refused:
            with pytest.raises(KafkaRefused, match="KIP-447"):
                await producer._require_new_brokers()
        else:
            await producer._require_new_brokers()
    finally:
        monkeypatch.undo()
        await producer.discard()


def test_requests_when_written_then_they_are_laid_out_as_kafka_says() -> None:
    """Byte for byte against the message definitions of Apache Kafka (flexible versions, KIP-482)."""
    commit = module._TxnOffsetCommitStruct(
        "t", "g", 7, 2, 5, "m", None, [("in", [(3, 9, -1, "x", {})], {})], {}
    )
    assert commit.encode() == bytes.fromhex(
        "0274" "0267" "0000000000000007" "0002" "00000005" "026d" "00"  # ids, producer, member, no instance
        "02" "03696e" "02" "00000003" "0000000000000009" "ffffffff" "0278" "00" "00" "00"
    )  # fmt: skip
    fetch = module._OffsetFetchStruct("g", [("in", [3], {})], True, {})
    assert fetch.encode() == bytes.fromhex("02670203696e0200000003000100")
