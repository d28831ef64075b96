"""`inferstream health`: what a container's health check says of the worker beside it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from inferstream.cli.health import health
from inferstream.errors import InferstreamError, SettingsError
from inferstream.telemetry.health import Health, HealthServer
from inferstream.telemetry.metrics import Metrics


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    monkeypatch.setenv("INFERSTREAM_TELEMETRY__PORT", str(free))
    monkeypatch.setenv("INFERSTREAM_TELEMETRY__HOST", "0.0.0.0")
    return free


@pytest.fixture
def state(port: int) -> Iterator[Health]:
    """What the worker at the port says of itself."""
    facts = Health()
    server = HealthServer("127.0.0.1", port, Metrics(), facts)
    server.start()
    yield facts
    server.stop()


def test_health_when_the_worker_is_warm_then_both_probes_are_shown(
    state: Health, capsys: pytest.CaptureFixture[str]
) -> None:
    state.warm = True
    state.beat()

    health()

    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(answer["probe"], answer["status"]) for answer in answers] == [
        ("/livez", "ok"),
        ("/readyz", "ok"),
    ]


def test_health_when_the_model_loads_then_it_says_so(state: Health) -> None:
    with pytest.raises(InferstreamError, match="the model is not warm yet") as failure:
        health()
    assert failure.value.exit_code == 1


def test_health_when_a_task_is_dead_then_it_fails_though_the_worker_is_ready(state: Health) -> None:
    state.warm = True
    state.dead_task = "poll"

    with pytest.raises(InferstreamError, match="a main task is dead"):
        health()


def test_health_when_nothing_listens_then_it_names_host_and_port(port: int) -> None:
    with pytest.raises(InferstreamError, match=rf"no worker answers on 127\.0\.0\.1 port {port}"):
        health()


def test_health_when_the_worker_serves_none_then_it_names_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFERSTREAM_TELEMETRY__PORT", "0")

    with pytest.raises(SettingsError, match=r"telemetry\.port: 0 \[env INFERSTREAM_TELEMETRY__PORT\]"):
        health()


def test_health_when_something_else_answers_then_it_says_so(port: int) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: object) -> None:
            return

    with HTTPServer(("127.0.0.1", port), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InferstreamError, match="is no worker"):
            health()
        server.shutdown()
