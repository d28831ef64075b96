"""How the cluster is reached: the clients' common options, the patience at start, and what topics look like.

aiokafka tries the bootstrap servers once and logs, rather than raises, why each of them failed.  At start we
try again until ``kafka.connect_timeout_s`` and then say in one line which hosts were tried and what each said;
what cannot get better by waiting (refused authentication or rights) ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import platform
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from aiokafka import errors as kafka_errors
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    NodeNotReadyError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.admin import DescribeConfigsRequest

from inferstream.errors import KafkaRefused, SettingsError
from inferstream.kafka import renewal, unpacking
from inferstream.kafka.handshake import (
    may_speak_otherwise,
    refusal_in,
    refused_login,
    spoken_at,
    wrong_protocol,
)
from inferstream.kafka.rights import Right, TopicsRequest, lacking, lacking_elsewhere, refused_line
from inferstream.kafka.security import security_options

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka

log = logging.getLogger(__name__)
T = TypeVar("T")

METADATA_MAX_AGE_MS = 60_000  # how late new partitions and moved leaders are seen without an error telling us
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 3.0
LOG_INTERVAL_S = 10.0
FIRST_ATTEMPT_S = (
    10.0  # a host that swallows packets must not use up the time of the others; doubled each time
)
TOPIC_RESOURCE = 2


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """A topic that exists.  What only DescribeConfigs tells is None where it is not to be had (no right, or a
    broker without it, such as the embedded one).  Sizes in bytes, times in milliseconds."""

    partitions: int
    replication: int
    max_message_bytes: int | None = None
    cleanup_policy: str | None = None
    timestamp_type: str | None = None
    retention_ms: int | None = None
    configs_denied: bool = False


def client_options(kafka: Kafka) -> dict[str, Any]:
    """The keyword arguments that consumer, producer and client have in common."""
    require_fast_client()
    renewal.install()
    unpacking.install()
    if not kafka.bootstrap_servers:
        raise SettingsError("kafka.bootstrap_servers is not set: give HOST:PORT of one of the brokers")
    if kafka.bootstrap_servers == ["embedded"]:
        raise SettingsError(
            "kafka.bootstrap_servers is `embedded`, a broker inside one process that no other reaches: "
            "start `inferstream broker` and give the address it prints"
        )
    return {
        "bootstrap_servers": list(kafka.bootstrap_servers),
        "client_id": kafka.client_id or f"inferstream-{platform.node()}",
        "request_timeout_ms": kafka.request_timeout_ms,
        "metadata_max_age_ms": METADATA_MAX_AGE_MS,
        **security_options(kafka.security),
    }


def require_fast_client() -> None:
    """Raise SettingsError if aiokafka runs without its C extension: it then takes 50 times the CPU per record."""
    try:
        importlib.import_module("aiokafka.record._crecords.default_records")
    except ImportError as error:
        raise SettingsError(
            f"aiokafka is installed without its C extension ({error}), which makes it 50 times slower: "
            "reinstall it from a wheel with `pip install --force-reinstall --only-binary aiokafka aiokafka`"
        ) from error


async def start_with_retry(kafka: Kafka, start: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """Await ``start()`` again and again until it succeeds, and give its result; KafkaRefused after ``timeout_s``.

    ``start`` may be called again after it has raised or was cancelled.  InferstreamError and what is no
    matter of the connection pass through.
    """
    require_fast_client()
    deadline = time.monotonic() + timeout_s
    backoff_s, attempt_s = FIRST_BACKOFF_S, FIRST_ATTEMPT_S
    next_line = time.monotonic()
    hosts: dict[str, str] = {}
    asked: set[str] = set()
    while True:
        remaining_s = deadline - time.monotonic()
        error: Exception
        with _overheard() as heard:
            try:
                async with asyncio.timeout(max(min(attempt_s, remaining_s), 0.1)):
                    return await start()
            except (KafkaError, OSError, TimeoutError) as caught:
                error = caught
        hosts |= {host: _brief(problem) for host, problem in heard}
        for host, problem in [*heard, ("", error)]:
            if host not in asked and may_speak_otherwise(problem):
                asked.add(host)
                if (why := await _other_protocol(kafka, host)) is not None:
                    raise KafkaRefused(why) from error
            if (refusal := refusal_in(problem)) is not None:
                raise KafkaRefused(refused_login(kafka, host, refusal)) from error
        if time.monotonic() + backoff_s >= deadline:
            raise KafkaRefused(_unreachable(kafka, timeout_s, hosts, error)) from error
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + LOG_INTERVAL_S
            extra = {"hosts": _tried(kafka, hosts)} if heard else {"error": _brief(error)}
            log.warning("Kafka is not ready, trying again", extra=extra)
        await asyncio.sleep(backoff_s)
        backoff_s, attempt_s = min(backoff_s * 2, MAX_BACKOFF_S), attempt_s * 2


async def stop_client(stopping: Coroutine[Any, Any, None], timeout_s: float) -> str | None:
    """Run a client's ``stop()`` for at most ``timeout_s``; what was wrong with it, if anything.

    In a task of its own: aiokafka lets errors and cancellations of its background tasks out of ``stop()``, and
    they must not be taken for ours.
    """
    task = asyncio.create_task(stopping, name="stop-client")
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        task.cancel()
        return f"not ended within {timeout_s:g} s"
    if task.cancelled():
        return "one of its tasks was cancelled"
    error = task.exception()
    return None if error is None else repr(error)


@contextlib.asynccontextmanager
async def connected(kafka: Kafka) -> AsyncIterator[AIOKafkaClient]:
    """A bare client for requests of our own; raises what aiokafka raises when no broker answers."""
    client = AIOKafkaClient(**client_options(kafka))
    try:
        await client.bootstrap()
        yield client
    finally:
        await client.close()


async def ask(client: AIOKafkaClient, request: Any) -> Any:
    """Send a request to any broker and give its answer."""
    node = client.get_random_node()
    if node is None:
        raise NodeNotReadyError("no broker is known")
    return await client.send(node, request)


async def topic_facts(
    kafka: Kafka, topics: Sequence[str], needed: Sequence[Right] = ()
) -> dict[str, TopicFacts]:
    """Topic → what it is like; a topic that does not exist is left out, and is not created by asking.

    Raises aiokafka's KafkaError or OSError when no broker answers (see :func:`start_with_retry`), and
    KafkaRefused without the right to describe a topic or one of those that are ``needed``, as far as the brokers
    tell (Kafka 2.3 and later do).
    """
    async with connected(kafka) as client:
        return await facts_from(client, kafka, topics, needed)


async def facts_from(
    client: AIOKafkaClient, kafka: Kafka, topics: Sequence[str], needed: Sequence[Right] = ()
) -> dict[str, TopicFacts]:
    """As :func:`topic_facts`, from a client that is connected."""
    names = list(dict.fromkeys(topics))
    if not names:
        return {}
    answer = (await ask(client, TopicsRequest(names))).to_object()
    shapes: dict[str, tuple[int, int]] = {}
    operations: dict[str, int | None] = {}
    denied: list[str] = []
    for topic in answer["topics"]:
        name, problem = topic["topic"], kafka_errors.for_code(topic["error_code"])
        if problem is UnknownTopicOrPartitionError:
            continue
        if problem is TopicAuthorizationFailedError:
            denied.append(name)
            continue
        if problem is InvalidTopicError:
            raise KafkaRefused(f"topic {name}: the brokers refuse the name")
        if topic["error_code"] != 0:
            raise problem(name)  # such as a leader that is being elected: asked again
        replicas = [len(partition["replicas"]) for partition in topic["partitions"]]
        shapes[name] = len(replicas), min(replicas, default=0)
        operations[name] = topic.get("authorized_operations")
    missing = lacking(needed, denied, operations) + await lacking_elsewhere(client, needed)
    if missing:
        raise KafkaRefused(refused_line(kafka, missing))
    configs, hidden = await _configs(client, list(shapes))
    return {
        name: TopicFacts(
            partitions,
            replication,
            max_message_bytes=_number(configs[name].get("max.message.bytes")),
            cleanup_policy=configs[name].get("cleanup.policy"),
            timestamp_type=configs[name].get("message.timestamp.type"),
            retention_ms=_number(configs[name].get("retention.ms")),
            configs_denied=name in hidden,
        )
        for name, (partitions, replication) in shapes.items()
    }


async def _configs(client: AIOKafkaClient, topics: list[str]) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Topic → its configuration, empty where the brokers do not tell; and those that we have no right to ask for."""
    found: dict[str, dict[str, str]] = {name: {} for name in topics}
    hidden: set[str] = set()
    if not topics:
        return found, hidden
    keys = ["max.message.bytes", "cleanup.policy", "message.timestamp.type", "retention.ms"]
    try:
        answer = await ask(client, DescribeConfigsRequest([(TOPIC_RESOURCE, name, keys) for name in topics]))
    except IncompatibleBrokerVersion:
        return found, hidden  # a broker without DescribeConfigs, such as the embedded one
    for code, _, _, name, entries in answer.resources:
        if code == 0:
            found[name] = {entry[0]: entry[1] for entry in entries}
        elif kafka_errors.for_code(code) is TopicAuthorizationFailedError:
            hidden.add(name)
    return found, hidden


def _number(text: str | None) -> int | None:
    return int(text) if text is not None else None


@contextlib.contextmanager
def _overheard() -> Iterator[list[tuple[str, BaseException]]]:
    """(host, error) of each host that aiokafka fails to reach meanwhile; they are kept out of the log."""
    heard: list[tuple[str, BaseException]] = []

    def listen(record: logging.LogRecord) -> bool:
        match record.args:
            case (str() as host, int() as port, BaseException() as error):
                heard.append((f"{host}:{port}", error))
                return False
            case (int() as node, BaseException() as error):
                heard.append((f"broker {node}", error))
                return False
        return True

    logger = logging.getLogger("aiokafka")
    logger.addFilter(listen)
    try:
        yield heard
    finally:
        logger.removeFilter(listen)


def _tried(kafka: Kafka, hosts: dict[str, str]) -> str:
    return ", ".join(
        f"{host} ({hosts[host]})" if host in hosts else host
        for host in dict.fromkeys([*kafka.bootstrap_servers, *hosts])
    )


def _unreachable(kafka: Kafka, timeout_s: float, hosts: dict[str, str], error: Exception) -> str:
    last = "" if hosts or isinstance(error, KafkaConnectionError) else f"; last: {_brief(error)}"
    return (
        f"no Kafka broker of kafka.bootstrap_servers answered within {timeout_s:g} s "
        f"(kafka.connect_timeout_s): tried {_tried(kafka, hosts)}{last}"
    )


async def _other_protocol(kafka: Kafka, host: str) -> str | None:
    """The line for a port that speaks another protocol than ours, or None."""
    name, _, port = host.rpartition(":")
    if not port.isdecimal():
        return None
    spoken = await spoken_at(name.strip("[]"), int(port), kafka.security)
    return wrong_protocol(kafka, host, spoken) if spoken is not None else None


def _brief(error: BaseException) -> str:
    """What went wrong, in a few words on one line."""
    if isinstance(error, socket.gaierror):
        return "host name not found"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    name, text = type(error).__name__, " ".join(str(error).split())
    if not text or text.startswith(name):
        return text or name
    return f"{name}: {text}"
