"""The environment of docker-compose.yml's Kafka as properties of a real one: complete, and its listeners right."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from tests.compose.compose import Compose
from tests.support.broker import START_S, BrokerUnavailable, free_ports, jars, java, wait_until_serving
from tests.support.processes import kill_group, spawn

LOG4J = Path(__file__).resolve().parents[1] / "kafka" / "log4j2.properties"


class Ports:
    """This machine's, in place of those in the container and of the one published."""

    def __init__(self) -> None:
        self.containers, self.host, self.controller = free_ports(3)

    def native(self, text: str, published: str) -> str:
        for old, new in (
            ("://:", "://127.0.0.1:"),
            ("kafka:19092", f"127.0.0.1:{self.containers}"),
            (":19092", f":{self.containers}"),
            (f"localhost:{published}", f"localhost:{self.host}"),
            (":9092", f":{self.host}"),
            (":9093", f":{self.controller}"),
        ):
            text = text.replace(old, new)
        return text


def properties(compose: Compose, ports: Ports, data: Path) -> str:
    """As the image's start script has it: KAFKA_LOG_DIRS is log.dirs."""
    published = compose.variables["KAFKA_PORT"]
    found = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): ports.native(value, published)
        for name, value in compose.services["kafka"]["environment"].items()
        if name.startswith("KAFKA_")
    }
    return "".join(f"{name}={value}\n" for name, value in (found | {"log.dirs": str(data)}).items())


@pytest.fixture
def ports() -> Ports:
    return Ports()


@pytest.fixture
def broker(tmp_path: Path, ports: Ports) -> Iterator[None]:
    compose = Compose()
    try:
        command = [java(), "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
        command += [f"-Dlog4j2.configurationFile={LOG4J}", "-cp", f"{jars()}/*"]
    except BrokerUnavailable as error:
        pytest.skip(str(error))
    file, log = tmp_path / "server.properties", tmp_path / "kafka.log"
    file.write_text(properties(compose, ports, tmp_path / "data"))
    cluster = compose.services["kafka"]["environment"]["CLUSTER_ID"]
    form = [*command, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(file)]
    done = subprocess.run(form, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0, done.stdout + done.stderr
    process = spawn([*command, "kafka.Kafka", str(file)], log)
    wait_until_serving(
        f"127.0.0.1:{ports.containers}", lambda: process.poll() is None, lambda: log.read_text()[-2000:]
    )
    yield
    kill_group(process)


@pytest.mark.kafka
def test_kafka_when_asked_at_a_listener_then_it_sends_the_client_on_to_the_same(
    broker: None, ports: Ports
) -> None:
    for asked in (f"127.0.0.1:{ports.containers}", f"localhost:{ports.host}"):
        admin = AdminClient({"bootstrap.servers": asked})
        [node] = admin.list_topics(timeout=20).brokers.values()
        assert f"{node.host}:{node.port}" == asked
