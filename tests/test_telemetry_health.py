"""The probes: when each is 200 or 503, what it says, and that a blocked event loop is seen."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from inferstream.errors import SettingsError
from inferstream.telemetry.health import Health, HealthServer
from inferstream.telemetry.metrics import Metrics


def free_port(family: socket.AddressFamily = socket.AF_INET, host: str = "127.0.0.1") -> int:
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(health: Health, metrics: Metrics | None = None, host: str = "127.0.0.1") -> Iterator[int]:
    port = free_port(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    server = HealthServer(host, port, metrics or Metrics(), health)
    server.start()
    try:
        yield port
    finally:
        server.stop()


def get(port: int, path: str, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read()


def probe(port: int, path: str) -> tuple[int, dict[str, Any]]:
    status, body = get(port, path)
    return status, json.loads(body)


def test_probes_when_the_model_is_loading_then_the_worker_lives_and_is_not_ready() -> None:
    with serving(Health()) as port:
        assert probe(port, "/livez")[0] == 200
        assert probe(port, "/startupz")[0] == 503
        status, facts = probe(port, "/readyz")

    assert status == 503
    assert facts == {
        "status": "failing",
        "failing": ["the model is not warm yet"],
        "warm": False,
        "draining": False,
    }


def test_probes_when_the_model_is_warm_then_all_are_good_and_say_each_fact() -> None:
    health = Health(device_hang_timeout_s=60, warm=True)
    health.beat()
    health.device_busy_since = time.monotonic() - 2

    with serving(health) as port:
        startup, ready, (status, live) = (
            probe(port, "/startupz"),
            probe(port, "/readyz"),
            probe(port, "/livez"),
        )

    assert (startup[0], ready[0], status) == (200, 200, 200)
    assert startup[1].pop("uptime_s") >= 0
    assert startup[1] == {"status": "ok", "failing": [], "warm": True}
    assert ready[1] == {"status": "ok", "failing": [], "warm": True, "draining": False}
    assert live.pop("heartbeat_age_s") < 5
    assert live.pop("device_busy_s") == pytest.approx(2, abs=1)
    assert live == {
        "status": "ok",
        "failing": [],
        "heartbeat_limit_s": 30.0,
        "device_hang_timeout_s": 60,
        "dead_task": None,
    }


def test_readyz_when_the_worker_drains_then_only_it_fails() -> None:
    health = Health(warm=True, draining=True)
    health.beat()

    with serving(health) as port:
        assert probe(port, "/readyz") == (
            503,
            {"status": "failing", "failing": ["the worker is draining"], "warm": True, "draining": True},
        )
        assert probe(port, "/livez")[0] == 200
        assert probe(port, "/startupz")[0] == 200


@pytest.mark.parametrize(
    ("facts", "failing"),
    [
        ({"heartbeat": -31.0}, "the event loop is blocked"),
        ({"device_busy_since": -121.0}, "a batch hangs on the device"),
        ({"dead_task": "settle"}, "a main task is dead"),
    ],
)
def test_livez_when_one_fact_is_bad_then_it_fails_and_names_it(facts: dict[str, Any], failing: str) -> None:
    health = Health(warm=True)
    health.beat()
    for name, value in facts.items():
        setattr(health, name, value if isinstance(value, str) else time.monotonic() + value)

    with serving(health) as port:
        status, said = probe(port, "/livez")
        assert probe(port, "/readyz")[0] == 200

    assert (status, said["failing"]) == (503, [failing])


@pytest.mark.parametrize("facts", [{"heartbeat": -29.0}, {"device_busy_since": -119.0}])
def test_livez_when_a_limit_is_near_then_it_is_good(facts: dict[str, float]) -> None:
    health = Health(warm=True)
    for name, value in facts.items():
        setattr(health, name, time.monotonic() + value)

    with serving(health) as port:
        assert probe(port, "/livez")[0] == 200


async def test_livez_when_the_event_loop_is_blocked_then_it_answers_all_the_same() -> None:
    health = Health(warm=True)
    health.heartbeat = time.monotonic() - 30.9
    with serving(health) as port:
        asking = asyncio.get_running_loop().run_in_executor(None, probe, port, "/livez")
        time.sleep(0.3)  # noqa: ASYNC251  # this is the blocked loop
        assert asking.done() or (await asking)[0] == 503
        assert asking.result()[0] == 503


def test_metrics_when_scraped_then_they_are_the_registrys() -> None:
    metrics = Metrics()
    metrics.records_consumed("documents", 3)

    with serving(Health(), metrics) as port:
        status, body = get(port, "/metrics")

    assert status == 200
    assert b'inferstream_records_consumed_total{topic="documents"} 3.0' in body


def test_server_when_the_path_is_unknown_then_it_names_those_there_are() -> None:
    with serving(Health()) as port:
        status, said = probe(port, "/health?x=1")

    assert status == 404
    assert said["paths"] == ["/metrics", "/startupz", "/livez", "/readyz"]


def test_server_when_asked_with_a_query_or_head_then_it_answers() -> None:
    with serving(Health()) as port:
        assert get(port, "/livez?verbose=1")[0] == 200
        assert get(port, "/livez", method="HEAD") == (200, b"")


def test_server_when_a_client_hangs_then_others_are_answered() -> None:
    with serving(Health()) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET /li")
        assert get(port, "/livez")[0] == 200


def test_server_when_a_client_leaves_then_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(Health()) as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as rude:
                rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                rude.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert get(port, "/livez")[0] == 200

    assert capfd.readouterr().err == ""


def test_server_when_the_host_is_ipv6_then_it_serves_there() -> None:
    try:
        with serving(Health(), host="::1") as port:
            assert get(port, "/livez", host="::1")[0] == 200
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


def test_server_when_the_port_is_in_use_then_the_setting_is_named() -> None:
    with (
        serving(Health()) as port,
        pytest.raises(SettingsError, match=rf"telemetry\.port: port {port} .* in use"),
    ):
        HealthServer("127.0.0.1", port, Metrics(), Health()).start()


def test_server_when_the_host_is_none_of_ours_then_the_setting_is_named() -> None:
    with pytest.raises(SettingsError, match=r"telemetry\.host"):
        HealthServer("192.0.2.1", free_port(), Metrics(), Health()).start()


def test_server_when_the_port_is_0_then_nothing_is_served() -> None:
    server = HealthServer("192.0.2.1", 0, Metrics(), Health())

    server.start()
    server.stop()


def test_server_when_stopped_then_the_port_is_free() -> None:
    with serving(Health()) as port:
        pass

    server = HealthServer("127.0.0.1", port, Metrics(), Health())
    server.start()
    server.stop()
