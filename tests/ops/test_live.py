"""The dashboards and the rules on a real Prometheus that scrapes a real worker, on the embedded broker.

Skipped where there is no Prometheus: neither the pinned one was built, nor is one on the PATH.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka import AIOKafkaProducer

from tests.helm.tools import present
from tests.kafka.test_killed_in_the_middle import documents, until
from tests.ops.test_dashboards import DASHBOARDS
from tests.ops.test_rules import FOLDER, RECORDED
from tests.support.broker import free_ports
from tests.support.grafana import in_prometheus, queries_of
from tests.support.processes import kill_group, spawn
from tests.support.worker import Worker, settings

SOURCE = "documents"

# Panels that have nothing to show here, and why.
EMPTY_ON_A_CPU = {
    "device: share of the peak A": "only of GPUs is it known what they can do at most",
}


class Prometheus:
    """A Prometheus of our own, which scrapes one worker every second."""

    def __init__(self, folder: Path, command: Path, target: int) -> None:
        [port] = free_ports(1)
        config = folder / "prometheus.yml"
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(FOLDER / "rules.yml")],
                    "scrape_configs": [
                        {"job_name": "inferstream", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
                    ],
                }
            )
        )
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        self._log = folder / "prometheus.log"
        self.process = spawn(
            [
                str(command),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            self._log,
        )

    def api(self, path: str, **parameters: str) -> Any:
        """The data that Prometheus answers with; None while it is not ready yet."""
        assert self.process.poll() is None, self._log.read_text()
        try:
            url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it has not read its files yet
                return None
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        except OSError:
            return None

    def has_data(self, query: str) -> bool:
        """Whether there is a number, which a NaN is not."""
        found = self.api("query", query=query)
        return found is not None and any(not math.isnan(float(one["value"][1])) for one in found["result"])


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[int], Prometheus]]:
    command = present("prometheus")
    if command is None:
        pytest.skip("no prometheus: `python -m tests.helm.tools prometheus` builds it; Debian has a package")
    started: list[Prometheus] = []

    def start(target: int) -> Prometheus:
        started.append(Prometheus(tmp_path, command, target))
        return started[-1]

    yield start
    for one in started:
        kill_group(one.process)


@pytest.mark.embedded
async def test_panels_when_a_real_run_is_scraped_then_each_has_data(
    launch: Callable[..., Worker], prometheus: Callable[[int], Prometheus]
) -> None:
    [port] = free_ports(1)
    changes = {"telemetry": {"port": port}, "delivery": {"commit_interval_ms": 200}}
    worker = launch(settings("embedded", SOURCE, "results", "scraped", changes))
    scraping = prometheus(port)

    async def listening() -> str | None:
        found = re.search(r"^bootstrap=(\S+)", worker.stdout_text(), re.MULTILINE)
        return found and found[1]

    flowing = asyncio.create_task(flow(await until(listening, 30, "the broker")))
    missing = {
        f"{name}: {panel['title']} {target['refId']}": in_prometheus(query, "15s")
        for name, dashboard in DASHBOARDS.items()
        for panel, target, query in queries_of(dashboard)
    }
    missing |= {name: name for name in RECORDED}
    assert missing.keys() >= EMPTY_ON_A_CPU.keys()

    async def all_have_data() -> bool:
        assert not flowing.done(), flowing.exception()
        for title, query in list(missing.items()):
            if await asyncio.to_thread(scraping.has_data, query):
                del missing[title]
        return missing.keys() <= EMPTY_ON_A_CPU.keys()

    async def only_dead_letters_alarm() -> bool:
        alerts = scraping.api("alerts")["alerts"]
        names = {alert["labels"]["alertname"] for alert in alerts}
        critical = {
            alert["labels"]["alertname"] for alert in alerts if alert["labels"]["severity"] == "critical"
        }
        return "InferstreamDeadLetters" in names and not critical

    try:
        await until(all_have_data, 60, "every panel to have data")
        # One document in twenty is bad; what is not yet known at the start is no alarm for long.
        await until(only_dead_letters_alarm, 30, "the alert for dead letters, and no critical one")
    except AssertionError as error:
        raise AssertionError(f"{error}; no data in {sorted(missing.keys() - EMPTY_ON_A_CPU)}") from error
    finally:
        flowing.cancel()
    assert missing.keys() == EMPTY_ON_A_CPU.keys()
    groups = scraping.api("rules")["groups"]
    assert {rule["health"] for each in groups for rule in each["rules"]} == {"ok"}


async def flow(bootstrap: str) -> None:
    """Documents without end: most good, some bad, some tombstones."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        while True:
            for key, value in (*documents(18), (b"bad", b"no json"), (b"gone", None)):
                await producer.send(SOURCE, value, key=key)
            await asyncio.sleep(0.2)
