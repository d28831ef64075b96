"""docker-compose.yml at work without containers: its commands, environments and Prometheus files, on a real Kafka.

On the same run, the dashboards are asked for all that they show.  What is not the file's own: the broker's address, the
ports, the names of topics and group (the broker is shared with other tests), and folders of this machine in place of
those in containers.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from aiokafka import AIOKafkaProducer

from tests.compose.compose import DEFAULTS, ROOT, Compose
from tests.helm.tools import present
from tests.ops.test_dashboards import DASHBOARDS
from tests.ops.test_rules import RECORDED
from tests.support.broker import free_ports
from tests.support.client import Kafka, unique
from tests.support.grafana import in_prometheus, queries_of
from tests.support.processes import kill_group, spawn

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]

DEADLINE_S = 120.0  # for each step: on a busy machine, loading torch takes most of a minute
SERVER = "kafka:19092"
TARGET = "inferstream:9464"

# Panels that have nothing to show here, and why.
EMPTY_ON_A_CPU = {
    "device: share of the peak A": "only of GPUs is it known what they can do at most",
}


class Stack:
    """The services of the file, as processes of this machine that end with the test."""

    def __init__(self, folder: Path, kafka: Kafka) -> None:
        self.compose = Compose(
            {
                "INPUT_TOPIC": unique("documents"),
                "OUTPUT_TOPIC": unique("embeddings"),
                "GROUP_ID": unique("embedder"),
            }
        )
        self.bootstrap = kafka.bootstrap
        self.telemetry_port, self.prometheus_port = free_ports(2)
        self._folder = folder
        self._addresses = {SERVER: kafka.bootstrap, TARGET: f"127.0.0.1:{self.telemetry_port}"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, service: str) -> None:
        """Start a service with its own command and environment."""
        command = [self._native(service, part) for part in self.compose.services[service]["command"]]
        self._start(service, [sys.executable, "-m", "inferstream", *command], self._environ(service))

    async def done(self, service: str) -> str:
        """What the service wrote to stdout, once it has ended well."""
        process = self._processes[service]
        code = await asyncio.to_thread(process.wait, DEADLINE_S)
        assert code == 0, f"{service} ended with {code}: {self.said(service)}"
        return (self._folder / f"{service}.out").read_text()

    async def healthy(self, service: str) -> None:
        """Wait for the service's own health check."""
        kind, *command = self.compose.services[service]["healthcheck"]["test"]
        assert [kind, command[0]] == ["CMD", "inferstream"]

        def check() -> bool:
            asked = [sys.executable, "-m", *command]
            return subprocess.run(asked, env=self._environ(service), capture_output=True).returncode == 0

        await self._until(check, service)

    async def end(self, service: str) -> int:
        """SIGTERM, as Compose sends it; the exit code."""
        self._processes[service].terminate()
        return await asyncio.to_thread(self._processes[service].wait, DEADLINE_S)

    async def start_prometheus(self, program: Path) -> None:
        """Prometheus with the file's own options, and copies of its files with this machine's addresses."""
        mounted = self._folder / "prometheus"
        mounted.mkdir()
        for source, _ in self.compose.binds("prometheus"):
            text = source.read_text()
            for name, address in self._addresses.items():
                text = text.replace(name, address)
            (mounted / source.name).write_text(text)
        options = [
            option.replace("/etc/prometheus", str(mounted)).replace("=/prometheus", f"={self._folder}/tsdb")
            for option in self.compose.services["prometheus"]["command"]
        ]
        listen = f"--web.listen-address=127.0.0.1:{self.prometheus_port}"
        self._start("prometheus", [str(program), *options, listen], os.environ)
        await self._until(lambda: self._get("/-/ready") is not None, "prometheus")

    def prometheus(self, path: str, **query: str) -> Any:
        """The data that its API answers with."""
        body = self._get(f"/api/v1/{path}?{urllib.parse.urlencode(query)}")
        assert body is not None, self.said("prometheus")
        return json.loads(body)["data"]

    def has_data(self, query: str) -> bool:
        """Whether Prometheus has a number for it, which a NaN is not."""
        found = self.prometheus("query", query=query)["result"]
        return any(not math.isnan(float(one["value"][1])) for one in found)

    async def sees(self, what: Callable[[], bool]) -> None:
        await self._until(what, "prometheus")

    def said(self, service: str) -> str:
        return (self._folder / f"{service}.log").read_text()[-2000:]

    def close(self) -> None:
        for process in self._processes.values():
            kill_group(process)

    def _start(self, service: str, command: list[str], environ: Mapping[str, str]) -> None:
        out, log = self._folder / f"{service}.out", self._folder / f"{service}.log"
        self._processes[service] = spawn(command, log, environ, out)

    def _native(self, service: str, text: str) -> str:
        found = self.compose.host_path(service, text)
        return str(found) if found else self._addresses.get(text, text)

    def _environ(self, service: str) -> dict[str, str]:
        own = self.compose.services[service]["environment"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("INFERSTREAM_")}
        return {
            **inherited,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "service"), str(ROOT)]),
            **{name: self._native(service, value) for name, value in own.items()},
            "INFERSTREAM_CONFIG": str(DEFAULTS),  # where the image has it, it needs no naming
            "INFERSTREAM_TELEMETRY__PORT": str(self.telemetry_port),
        }

    def _get(self, path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.prometheus_port}{path}", timeout=5
            ) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it has not read its files yet
                return None
            raise AssertionError(f"{path}: {error.read().decode()}") from None
        except OSError:
            return None

    async def _until(self, condition: Callable[[], bool], service: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not await asyncio.to_thread(condition):
                code = self._processes[service].poll()
                assert code is None, f"{service} ended with {code}: {self.said(service)}"
                await asyncio.sleep(0.2)


@pytest.fixture
async def stack(tmp_path: Path, kafka: Kafka) -> AsyncIterator[Stack]:
    running = Stack(tmp_path, kafka)
    yield running
    running.close()


async def test_services_when_started_in_their_order_then_results_come_out_and_prometheus_sees_the_worker(
    stack: Stack,
) -> None:
    compose = stack.compose
    documents = [json.loads(line) for line in (ROOT / "examples" / compose.variables["DOCUMENTS"]).open()]
    stack.start("topics")
    made = await stack.done("topics")
    stack.start("inferstream")
    stack.start("publish")
    await stack.done("publish")
    stack.start("consume")
    results = [json.loads(line) for line in (await stack.done("consume")).splitlines()]
    await stack.healthy("inferstream")

    partitions = compose.variables["PARTITIONS"]
    assert f"{compose.variables['INPUT_TOPIC']}: created: {partitions} partitions" in made
    assert len(results) == int(compose.variables["RESULTS"])
    schema = jsonschema_rs.validator_for(json.loads((ROOT / "schemas/result.v1.json").read_text()))
    subjects = {document["id"]: document["metadata"] for document in documents}
    for result in results:
        assert schema.is_valid(result), result
        assert result["metadata"] == subjects[result["id"]]
        assert result["output"]["dimensions"] == 384

    program = present("prometheus")
    if program is not None:
        await stack.start_prometheus(program)
        await prometheus_sees_the_worker(stack, len(documents))
        await every_panel_has_data(stack)
    assert await stack.end("inferstream") == 0
    if program is None:
        pytest.skip(
            "all but Prometheus was well, and there is none: `python -m tests.helm.tools prometheus` builds it; Debian "
            "has a package"
        )


async def prometheus_sees_the_worker(stack: Stack, documents: int) -> None:
    def counted() -> bool:
        vector = stack.prometheus("query", query="inferstream_results_produced_total")["result"]
        return bool(vector) and float(vector[0]["value"][1]) == documents

    def evaluated() -> bool:
        groups = stack.prometheus("rules")["groups"]
        return all(rule["health"] != "unknown" for group in groups for rule in group["rules"])

    await stack.sees(counted)
    await stack.sees(evaluated)

    targets = stack.prometheus("targets")["activeTargets"]
    assert [(t["labels"]["job"], t["health"]) for t in targets] == [("inferstream", "up")]
    groups = stack.prometheus("rules")["groups"]
    mounted = yaml.safe_load((ROOT / "ops/prometheus/rules.yml").read_text())["groups"]
    assert {group["name"] for group in groups} == {group["name"] for group in mounted}
    assert [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"] == []


async def every_panel_has_data(stack: Stack) -> None:
    """While documents of all kinds are read: each query of each dashboard, and each recording rule."""
    missing = {
        f"{name}: {panel['title']} {target['refId']}": in_prometheus(query, "15s")
        for name, dashboard in DASHBOARDS.items()
        for panel, target, query in queries_of(dashboard)
    }
    missing |= {name: name for name in RECORDED}
    assert missing.keys() >= EMPTY_ON_A_CPU.keys()
    flowing = asyncio.create_task(flow(stack))

    def all_have_data() -> bool:
        assert not flowing.done(), flowing.exception()
        for title in [title for title, query in missing.items() if stack.has_data(query)]:
            del missing[title]
        return missing.keys() <= EMPTY_ON_A_CPU.keys()

    def only_dead_letters_alarm() -> bool:
        alerts = [alert["labels"] for alert in stack.prometheus("alerts")["alerts"]]
        critical = {alert["alertname"] for alert in alerts if alert["severity"] == "critical"}
        return not critical and "InferstreamDeadLetters" in {alert["alertname"] for alert in alerts}

    try:
        await stack.sees(all_have_data)
        # Many documents are bad; what is not yet known at the start is no alarm for long.
        await stack.sees(only_dead_letters_alarm)
    except TimeoutError:
        raise AssertionError(f"no data in {sorted(missing.keys() - EMPTY_ON_A_CPU)}") from None
    finally:
        flowing.cancel()
    assert missing.keys() == EMPTY_ON_A_CPU.keys()


async def flow(stack: Stack) -> None:
    """Documents without end: most good, some bad, some tombstones."""
    good = [(b"good", json.dumps({"id": n, "text": f"document {n}"}).encode()) for n in range(4)]
    async with AIOKafkaProducer(bootstrap_servers=stack.bootstrap) as producer:
        while True:
            for key, value in (*good, (b"bad", b"no json"), (b"gone", None)):
                await producer.send(stack.compose.variables["INPUT_TOPIC"], value, key=key)
            await asyncio.sleep(0.2)
