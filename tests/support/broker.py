"""A real Apache Kafka for the tests: in a container where a Docker engine has the image, else from its jars.

``python -m tests.support.broker`` gets what a broker needs, or says in one line what is missing; done before
the tests, so that a download does not count against the first test's time.

One KRaft node, broker and controller in one process, on ports of its own, with the same properties both ways.
Not like production: one replica, a small heap, 4 partitions for the internal topics, no delay before the
first rebalance, so that a group settles at once, and transactions that are over are looked for twice a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.support.client import Kafka
from tests.support.processes import kill_group, spawn

HERE = Path(__file__).resolve().parents[1] / "kafka"
POM = HERE / "pom.xml"
LOG4J = HERE / "log4j2.properties"
IMAGE = "apache/kafka:4.1.0"  # the version that the pom names
CLUSTER_ID = "inferstreamTestsAAAAAA"  # 16 bytes in base64, as Kafka wants it
START_S = 60.0
FETCH_S = 600.0


class BrokerUnavailable(Exception):
    """No broker can be had this way; the message says why, in one line."""


# ---------------------------------------------------------------- one broker


class Listener(NamedTuple):
    """A further listener of a broker, besides the plain one that its address is."""

    name: str
    protocol: str
    port: int


class Broker(Kafka):
    """A broker that a test may stop, kill and start again; its address and its data stay."""

    def start(self) -> Broker:
        """Start and wait until it serves; BrokerUnavailable if it does not within START_S."""
        raise NotImplementedError

    def stop(self) -> None:
        """Shut down in order: clients are told, the log is closed clean."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL: no goodbye, the log is recovered at the next start."""
        raise NotImplementedError

    def remove(self) -> None:
        """Kill it and drop its data."""
        raise NotImplementedError

    def restart(self) -> None:
        """Stop in order and start again on the same data."""
        self.stop()
        self.start()


class NativeKafka(Broker):
    """Kafka as a child process; dies with the test run, however that ends."""

    def __init__(
        self,
        folder: Path,
        overrides: Mapping[str, str] | None = None,
        listeners: Sequence[Listener] = (),
        format_options: Sequence[str] = (),
    ) -> None:
        """``folder`` takes data, properties and log; ``overrides`` are further broker properties.

        ``format_options`` go to Kafka's storage tool.
        """
        port, controller_port = free_ports(2)
        super().__init__(f"127.0.0.1:{port}")
        self.folder = folder
        self.log = folder / "broker.log"
        self._data = folder / "data"
        self._properties = folder / "server.properties"
        self._format_options = format_options
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._properties.write_text(
            properties("127.0.0.1", "127.0.0.1", port, controller_port, str(self._data), overrides, listeners)
        )

    def start(self) -> NativeKafka:
        if not self.alive:
            self.begin()
            wait_until_serving(self.bootstrap, lambda: self.alive, self._log_end)
        return self

    def begin(self) -> None:
        """Start the process and wait for nothing: a node of several serves only when the others are there."""
        if not self._data.exists():
            self._format()
        # A small heap and only the first compiler: the tests share two cores with it.
        options = ["-Xms256m", "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
        self._process = spawn([*self._java(*options), "kafka.Kafka", str(self._properties)], self.log)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            kill_group(self._process)

    def kill(self) -> None:
        if self._process is not None:
            kill_group(self._process)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._data, ignore_errors=True)

    def _format(self) -> None:
        command = [*self._java(), "kafka.tools.StorageTool", "format"]
        command += ["-t", CLUSTER_ID, "-c", str(self._properties), *self._format_options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise BrokerUnavailable(
                f"Kafka's storage cannot be formatted: {done.stdout}{done.stderr}".strip()
            )

    def _java(self, *options: str) -> list[str]:
        return [java(), *options, f"-Dlog4j2.configurationFile={LOG4J}", "-cp", f"{jars()}/*"]

    def _log_end(self) -> str:
        return f"{self.log}:\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


class ContainerKafka(Broker):
    """The same broker in a container; its port is one of this host, so that it survives a restart."""

    def __init__(
        self,
        overrides: Mapping[str, str] | None = None,
        listeners: Sequence[Listener] = (),
        format_options: Sequence[str] = (),
    ) -> None:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.docker_client import DockerClient

        [port] = free_ports(1)
        host = DockerClient().host()
        super().__init__(f"{host}:{port}")
        text = properties(host, "0.0.0.0", port, 9093, "/tmp/data", overrides, listeners)
        # Run at each start of the container; `format -g` leaves data alone that is there already.
        script = (
            'set -e; printf %s "$PROPERTIES" > /tmp/server.properties; '
            f"/opt/kafka/bin/kafka-storage.sh format -g -t {CLUSTER_ID} -c /tmp/server.properties "
            f"{shlex.join(format_options)}; "
            "exec /opt/kafka/bin/kafka-server-start.sh /tmp/server.properties"
        )
        self._container: Any = (
            DockerContainer(IMAGE)
            .with_bind_ports(port, port)
            .with_env("PROPERTIES", text)
            .with_env("KAFKA_HEAP_OPTS", "-Xms256m -Xmx512m")
            .with_kwargs(entrypoint=["bash", "-c", script])
        )
        for listener in listeners:
            self._container.with_bind_ports(listener.port, listener.port)
        self._created = False

    def start(self) -> ContainerKafka:
        if not self._created:
            self._container.start()
            self._created = True
        else:
            self._container.get_wrapped_container().start()
        wait_until_serving(self.bootstrap, lambda: True, self._log_end)
        return self

    def stop(self) -> None:
        if self._created:
            self._container.get_wrapped_container().stop(timeout=30)

    def kill(self) -> None:
        if self._created:
            self._container.get_wrapped_container().kill()

    def remove(self) -> None:
        if self._created:
            self._container.stop()
            self._created = False

    def _log_end(self) -> str:
        out, err = self._container.get_logs()
        return "\n".join((out + err).decode(errors="replace").splitlines()[-15:])


def properties(
    advertised: str,
    bind: str,
    port: int,
    controller_port: int,
    data: str,
    overrides: Mapping[str, str] | None,
    listeners: Sequence[Listener] = (),
) -> str:
    """server.properties of the one node; message.max.bytes and the timestamp type are Kafka's defaults.

    ``advertised`` and ``bind`` are hosts.
    """
    every = [Listener("PLAINTEXT", "PLAINTEXT", port), *listeners]
    tree = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": ",".join(
            [
                *(f"{entry.name}://{bind}:{entry.port}" for entry in every),
                f"CONTROLLER://127.0.0.1:{controller_port}",
            ]
        ),
        "advertised.listeners": ",".join(f"{entry.name}://{advertised}:{entry.port}" for entry in every),
        "listener.security.protocol.map": ",".join(
            [*(f"{entry.name}:{entry.protocol}" for entry in every), "CONTROLLER:PLAINTEXT"]
        ),
        "controller.listener.names": "CONTROLLER",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "default.replication.factor": "1",
        "min.insync.replicas": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
        "group.initial.rebalance.delay.ms": "0",
        **(overrides or {}),
    }
    return "".join(f"{name}={value}\n" for name, value in tree.items())


def wait_until_serving(bootstrap: str, alive: Callable[[], bool], log_end: Callable[[], str]) -> None:
    """Poll with real metadata requests: a port that listens may belong to a node that is still fenced."""
    admin = AdminClient(
        {
            "bootstrap.servers": bootstrap,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 100,
            "log_level": 0,
        }
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if not alive():
            raise BrokerUnavailable(f"Kafka ended while starting; {log_end()}")
        with contextlib.suppress(KafkaException):
            if admin.list_topics(timeout=0.5).brokers:
                return
        time.sleep(0.05)
    raise BrokerUnavailable(f"Kafka at {bootstrap} does not serve after {START_S:.0f} s; {log_end()}")


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below the range that outgoing connections take theirs from.

    From that range, a client that keeps connecting to a stopped broker's port would one day get the very port
    as its own, be connected to itself, and keep the broker from starting again.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise BrokerUnavailable("no free port between 20000 and 32000")


# ---------------------------------------------------------------- where it comes from


def jars_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferstream"
    return cache / f"kafka-{hashlib.sha256(POM.read_bytes()).hexdigest()[:16]}"


def jars() -> Path:
    """The folder of Kafka's jars, fetched by Maven once and kept in the cache folder under the pom's hash."""
    folder = jars_folder()
    cache = folder.parent
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "kafka.lock"):
        if folder.exists():  # another test run has fetched them while we waited
            return folder
        # Fetched beside it and renamed: a fetch that is broken off leaves no half-filled folder behind.
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as temporary:
            shutil.copy(POM, temporary)
            command = [maven(), "-q", "-B", "-f", f"{temporary}/pom.xml", "dependency:copy-dependencies"]
            command += ["-DincludeScope=runtime", f"-DoutputDirectory={temporary}/libs"]
            print("fetching Kafka's jars (54 MB, once)", file=sys.stderr, flush=True)
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S)
            except subprocess.TimeoutExpired as error:
                raise BrokerUnavailable(f"Maven got no Kafka within {FETCH_S:.0f} s") from error
            if done.returncode:
                said = (done.stdout + done.stderr).strip().splitlines() or ["nothing said"]
                raise BrokerUnavailable(f"Maven cannot fetch Kafka: {said[0]}")
            os.rename(f"{temporary}/libs", folder)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def java() -> str:
    """The java command, 17 or later; BrokerUnavailable tells what to install."""
    home = os.environ.get("JAVA_HOME")
    command = shutil.which(f"{home}/bin/java" if home else "java") or shutil.which("java")
    if command is None:
        raise BrokerUnavailable("Java is missing (Debian: apt-get install openjdk-17-jre-headless)")
    said = subprocess.run([command, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < 17:
        raise BrokerUnavailable(
            f"Java 17 or later is needed, {command} is {version[1] if version else 'unknown'} "
            "(Debian: apt-get install openjdk-17-jre-headless)"
        )
    return command


def maven() -> str:
    command = shutil.which("mvn")
    if command is None:
        raise BrokerUnavailable("Maven is missing (Debian: apt-get install maven)")
    return command


def docker() -> Any:
    """A client of the Docker engine; BrokerUnavailable if none answers."""
    import docker as library

    try:
        client = library.from_env(timeout=5)
        client.ping()
    except Exception as error:  # the library lets errors of several layers through
        raise BrokerUnavailable("no Docker engine answers") from error
    return client


def image() -> None:
    """See that the engine has the image, or gets it."""
    client = docker()
    try:
        if not client.images.list(name=IMAGE):
            client.api.timeout = 60  # between two pieces of the download, not for all of it
            client.images.pull(IMAGE)
    except Exception as error:
        raise BrokerUnavailable(f"the Docker engine cannot obtain {IMAGE}") from error
    finally:
        client.close()


def create_broker(
    folder: Path,
    overrides: Mapping[str, str] | None = None,
    listeners: Sequence[Listener] = (),
    format_options: Sequence[str] = (),
) -> Broker:
    """A started broker, by the first way that works; BrokerUnavailable names what each way lacks."""
    try:
        image()
        return _started(lambda: ContainerKafka(overrides, listeners, format_options))
    except BrokerUnavailable as no_container:
        try:
            return _started(lambda: NativeKafka(folder, overrides, listeners, format_options))
        except BrokerUnavailable as no_native:
            raise BrokerUnavailable(f"no Kafka for the tests: {no_container}; {no_native}") from no_native


def _started(make: Callable[[], Broker]) -> Broker:
    """Make and start a broker; nothing of it is left if that fails."""
    broker: Broker | None = None
    try:
        broker = make()
        return broker.start()
    except BaseException as error:
        if broker is not None:
            with contextlib.suppress(Exception):
                broker.remove()
        if isinstance(error, Exception) and not isinstance(error, BrokerUnavailable):
            # The engine's libraries let errors of several layers through; the first line says enough.
            raise BrokerUnavailable(f"Kafka does not start: {str(error).splitlines()[:1]}") from error
        raise


def obtain() -> str:
    """Get the image or the jars, so that a broker can be started at once; says which it will be."""
    if bootstrap := os.environ.get("INFERSTREAM_TEST_BOOTSTRAP"):
        return f"the Kafka at {bootstrap}"
    try:
        image()
        return f"Kafka in a container ({IMAGE})"
    except BrokerUnavailable as no_container:
        try:
            java()
            jars()
            return "Kafka from its jars"
        except BrokerUnavailable as no_native:
            raise BrokerUnavailable(
                f"a real Kafka needs Docker, or Java 17 and Maven: {no_container}; {no_native}"
            ) from None


def main() -> int:
    try:
        print(f"tests run against {obtain()}", flush=True)
    except BrokerUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
