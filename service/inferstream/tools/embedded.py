"""The embedded broker: librdkafka's mock cluster, from the library inside the confluent-kafka wheel.

It speaks the real Kafka protocol over TCP, starts in milliseconds and needs neither Java nor Docker, so the
demo and the quick tests run anywhere.  It is one in-memory broker that is also its own group coordinator.

What it is not:

* It keeps about 5 MB (or 100,000 batches) per partition and **drops the oldest silently** beyond that.
* Nothing survives the process; nothing is replicated or compacted, and there is no retention by time.
* No CreateTopics, DeleteTopics, CreatePartitions, DescribeConfigs or AlterConfigs: topics are made with
  :meth:`EmbeddedBroker.create_topic`, which fixes their partitions for good.
* A topic nobody created appears with 4 partitions as soon as a client names it and allows creation.
* No size limit: a record of any size is accepted, so nothing that tests ``MESSAGE_TOO_LARGE`` works here.
* No commit while a group is joining or syncing (a real broker accepts it while joining), and a member that
  went away without leaving delays the next rebalance by up to its session timeout.
* A follower's SyncGroup that arrives after the leader's is answered INVALID_REQUEST (42), which aiokafka
  raises: a second member may have to join again.
* No ``read_committed``: records of open and aborted transactions are visible, producers are not fenced,
  TxnOffsetCommit stores nothing.  Exactly-once is refused on this broker.
* No TLS, SASL, ACLs, quotas or throttling.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Self

from inferstream.errors import SettingsError

_PRODUCER = 0  # rd_kafka_type_t: the handle only hosts the mock cluster, its type is of no consequence
_CONF_OK = 0
_ERROR_BYTES = 512
_TOPIC_ALREADY_EXISTS = 36
DEFAULT_PARTITIONS = 4  # as many as the mock gives a topic that appears by itself
INSTALL = "pip install 'inferstream[demo]'"


def _library_path() -> Path:
    """The librdkafka that the confluent-kafka wheel carries (beside the package on Linux, inside on macOS)."""
    try:
        spec = importlib.util.find_spec("confluent_kafka")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(f"the embedded broker needs the package confluent-kafka: {INSTALL}")
    package = Path(next(iter(spec.submodule_search_locations)))
    for folder in (package.with_name("confluent_kafka.libs"), package / ".dylibs"):
        for path in sorted(folder.glob("librdkafka*")):
            return path
    raise SettingsError(
        f"the confluent-kafka in {package.parent} was built without its own librdkafka, "
        f"which the embedded broker uses; install the wheel: {INSTALL}"
    )


def _load() -> ctypes.CDLL:
    """librdkafka with the signatures of the functions used here."""
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise SettingsError(
            f"the embedded broker cannot load {path}: {error}; reinstall it: {INSTALL}"
        ) from error
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_set": (number, [pointer, text, text, text, ctypes.c_size_t]),
        "rd_kafka_new": (pointer, [number, pointer, text, ctypes.c_size_t]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_err2str": (text, [number]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, number]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_topic_create": (number, [pointer, text, number, number]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_down": (number, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_up": (number, [pointer, ctypes.c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


class EmbeddedBroker:
    """A mock cluster of one broker on a free port of 127.0.0.1; a context manager.

    >>> with EmbeddedBroker() as broker:
    ...     broker.create_topic("documents", 8)
    ...     print(broker.bootstrap)
    127.0.0.1:40123
    """

    def __init__(self, *, rebalance_delay_ms: int = 300) -> None:
        """``rebalance_delay_ms`` is how long a new group waits for more members before its first assignment."""
        self._rebalance_delay_ms = rebalance_delay_ms
        self._library: ctypes.CDLL | None = None
        self._handle: int | None = None
        self._cluster: int | None = None
        self._bootstrap = ""

    def start(self) -> None:
        """Listen.  SettingsError if confluent-kafka is missing or the mock cluster cannot be made."""
        if self._cluster is not None:
            return
        library = _load()
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        conf = library.rd_kafka_conf_new()
        # The handle itself connects to nothing; without this its log would go to our stderr.
        if library.rd_kafka_conf_set(conf, b"log_level", b"0", error, len(error)) != _CONF_OK:
            raise SettingsError(f"the embedded broker could not be configured: {error.value.decode()}")
        handle = library.rd_kafka_new(_PRODUCER, conf, error, len(error))
        if not handle:
            raise SettingsError(f"the embedded broker could not be started: {error.value.decode()}")
        cluster = library.rd_kafka_mock_cluster_new(handle, 1)
        if not cluster:
            library.rd_kafka_destroy(handle)
            raise SettingsError("the embedded broker could not be started: no mock cluster")
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, self._rebalance_delay_ms)
        self._library, self._handle, self._cluster = library, handle, cluster
        self._bootstrap = library.rd_kafka_mock_cluster_bootstraps(cluster).decode()

    def stop(self) -> None:
        """Close every connection and forget everything; harmless when not started."""
        library, handle, cluster = self._library, self._handle, self._cluster
        if library is None or cluster is None:
            return
        self._library = self._handle = self._cluster = None
        library.rd_kafka_mock_cluster_destroy(cluster)
        library.rd_kafka_destroy(handle)

    @property
    def bootstrap(self) -> str:
        """``host:port``, for ``kafka.bootstrap_servers``."""
        self._started()
        return self._bootstrap

    def create_topic(self, name: str, partitions: int = DEFAULT_PARTITIONS) -> None:
        """Create a topic; nothing happens if it exists already (its partitions stay as they are)."""
        library, cluster = self._started()
        if partitions < 1:
            raise SettingsError(f"topic {name!r}: at least one partition is needed, not {partitions}")
        code = library.rd_kafka_mock_topic_create(cluster, name.encode(), partitions, 1)
        if code not in (0, _TOPIC_ALREADY_EXISTS):
            text = library.rd_kafka_err2str(code).decode()
            raise SettingsError(f"the embedded broker did not create the topic {name!r}: {text}")

    def set_reachable(self, reachable: bool) -> None:
        """Take the broker down (connections are closed and refused) or up again, as in an outage."""
        library, cluster = self._started()
        switch = library.rd_kafka_mock_broker_set_up if reachable else library.rd_kafka_mock_broker_set_down
        switch(cluster, 1)

    def _started(self) -> tuple[ctypes.CDLL, int]:
        if self._library is None or self._cluster is None:
            raise RuntimeError("the embedded broker is not started")
        return self._library, self._cluster

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.stop()
