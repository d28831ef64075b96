"""What two settings cannot be together, and what does nothing beside another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inferstream.settings.keys import SETTINGS, show, value_of
from inferstream.settings.tree import Settings

COMMIT_SHARE = 0.25  # a commit may take this share of delivery.revoke_timeout_s
REBALANCE_SHARE = 0.6  # and both together this share of the rebalance, which others need as well

# What only exactly-once looks at.
OF_TRANSACTIONS = ("kafka.transactional_id", "delivery.transaction_timeout_ms")
TRANSACTION_SHARE = 3  # a tick may take a third of the transaction's timeout, and ending it half of it

REFUSED_CHOICES = ("OAUTHBEARER",)  # known, so that they are refused with a reason

_PASSWORD_VARIABLE = SETTINGS["kafka.security.password"].variable


@dataclass(frozen=True, slots=True)
class Conflict:
    """Settings that cannot be had together; ``text`` says why and what to do."""

    keys: tuple[str, ...]
    text: str


def conflicts(settings: Settings) -> Iterator[Conflict]:
    """All that is wrong with a tree whose values are each right by itself."""
    yield from _timeouts(settings)
    yield from _topics(settings)
    yield from _guarantee(settings)
    yield from _security(settings)


def _timeouts(settings: Settings) -> Iterator[Conflict]:
    kafka, delivery = settings.kafka, settings.delivery
    revoke_ms = delivery.revoke_timeout_s * 1000 * (1 + COMMIT_SHARE)
    if revoke_ms >= REBALANCE_SHARE * kafka.rebalance_timeout_ms:
        longest = REBALANCE_SHARE * kafka.rebalance_timeout_ms / 1000 / (1 + COMMIT_SHARE)
        yield Conflict(
            ("delivery.revoke_timeout_s", "kafka.rebalance_timeout_ms"),
            "finishing what a revoked partition holds and committing it would take more than 0.6 of the "
            f"rebalance, and the group would throw this worker out: delivery.revoke_timeout_s must be below "
            f"{longest:g}, or kafka.rebalance_timeout_ms above {revoke_ms / REBALANCE_SHARE:g}",
        )
    if kafka.request_timeout_ms <= kafka.rebalance_timeout_ms:
        yield Conflict(
            ("kafka.request_timeout_ms", "kafka.rebalance_timeout_ms"),
            "joining a group is one request that is answered when the rebalance ends: "
            "kafka.request_timeout_ms must be above kafka.rebalance_timeout_ms "
            f"({kafka.rebalance_timeout_ms})",
        )
    if kafka.heartbeat_interval_ms * 3 > kafka.session_timeout_ms:
        yield Conflict(
            ("kafka.heartbeat_interval_ms", "kafka.session_timeout_ms"),
            "two lost heartbeats must not end the session: kafka.heartbeat_interval_ms must be at most a "
            f"third of kafka.session_timeout_ms ({kafka.session_timeout_ms // 3})",
        )
    if settings.batch.linger_ms * 2 >= delivery.revoke_timeout_s * 1000:
        yield Conflict(
            ("batch.linger_ms", "delivery.revoke_timeout_s"),
            "a revoked partition would spend its time waiting for batches to fill: batch.linger_ms must "
            f"be below half of delivery.revoke_timeout_s ({delivery.revoke_timeout_s * 500:g} ms)",
        )


def _topics(settings: Settings) -> Iterator[Conflict]:
    inputs, output, dead_letters = settings.input.topics, settings.output.topic, settings.dead_letter.topic
    if output and output in inputs:
        yield Conflict(
            ("output.topic", "input.topics"),
            f"results must not go to an input topic ({output}): each would be read again, for ever",
        )
    if dead_letters and dead_letters in inputs:
        yield Conflict(
            ("dead_letter.topic", "input.topics"),
            f"dead letters must not go to an input topic ({dead_letters}): each would be read again",
        )
    if output and output == dead_letters:
        yield Conflict(
            ("dead_letter.topic", "output.topic"),
            f"results and dead letters must go to different topics (both are {output})",
        )


def _guarantee(settings: Settings) -> Iterator[Conflict]:
    if settings.delivery.guarantee != "exactly-once":
        return
    delivery = settings.delivery
    if delivery.commit_interval_ms * TRANSACTION_SHARE > delivery.transaction_timeout_ms:
        yield Conflict(
            ("delivery.commit_interval_ms", "delivery.transaction_timeout_ms"),
            "a transaction lasts for a commit interval, and the broker would abort it while it is being committed: "
            "delivery.commit_interval_ms must be at most a third of delivery.transaction_timeout_ms "
            f"({delivery.transaction_timeout_ms // TRANSACTION_SHARE})",
        )
    if settings.delivery.order == "none":
        yield Conflict(
            ("delivery.order", "delivery.guarantee"),
            "exactly-once needs delivery.order: partition, as a transaction commits one offset per partition",
        )
    if settings.kafka.bootstrap_servers == ["embedded"]:
        yield Conflict(
            ("kafka.bootstrap_servers", "delivery.guarantee"),
            "the embedded broker cannot do exactly-once, as it gives no read_committed: use a real Kafka",
        )


def _security(settings: Settings) -> Iterator[Conflict]:
    security = settings.kafka.security
    sasl = security.protocol.startswith("SASL_")
    tls = security.protocol.endswith("SSL")
    if security.mechanism in REFUSED_CHOICES:
        yield _about(
            "mechanism",
            text=f"{security.mechanism} is not in this version, as Kafka's client takes tokens only from code: use "
            "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or a client certificate",
        )
        return
    if security.password is not None and security.password_file is not None:
        yield _about(
            "password", "password_file", text="give one of the two; which one is the right one is not known"
        )
    for name in ("mechanism", "username", "password", "password_file"):
        if not sasl and getattr(security, name) is not None:
            yield _about(
                name,
                "protocol",
                text="is for a protocol with SASL: set protocol to SASL_SSL, or leave it out",
            )
    if sasl and security.mechanism is None:
        yield _about("protocol", "mechanism", text="needs a mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512")
    if sasl and security.username is None:
        yield _about("protocol", "username", text="needs a username")
    if sasl and security.password is None and security.password_file is None:
        yield _about(
            "protocol", "password_file", text=f"needs a password: set password_file, or {_PASSWORD_VARIABLE}"
        )
    for name in ("ca_file", "cert_file", "key_file", "key_password_file"):
        if not tls and getattr(security, name) is not None:
            yield _about(
                name,
                "protocol",
                text="is for a protocol with TLS: set protocol to SSL or SASL_SSL, or leave it out",
            )
    for name, other in (
        ("cert_file", "key_file"),
        ("key_file", "cert_file"),
        ("key_password_file", "key_file"),
    ):
        if tls and getattr(security, name) is not None and getattr(security, other) is None:
            yield _about(name, other, text=f"needs kafka.security.{other}")
    if security.protocol != "PLAINTEXT" and settings.kafka.bootstrap_servers == ["embedded"]:
        yield Conflict(
            ("kafka.security.protocol", "kafka.bootstrap_servers"),
            "the embedded broker speaks PLAINTEXT alone: use a real Kafka",
        )


def _about(*names: str, text: str) -> Conflict:
    return Conflict(tuple(f"kafka.security.{name}" for name in names), text)


def without_effect(settings: Settings) -> Iterator[Conflict]:
    """What is set and does nothing: that deserves a word, but breaks nothing."""
    if settings.delivery.guarantee == "at-least-once":
        for key in OF_TRANSACTIONS:
            if value_of(settings, key) != SETTINGS[key].default:
                yield Conflict((key,), f"{show(value_of(settings, key))} has no effect under at-least-once")
