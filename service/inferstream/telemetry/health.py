"""Health and metrics over HTTP, from a thread of its own: a blocked event loop must be visible.

``/startupz``  the model is warm.  Never depends on Kafka.
``/livez``     the loop beats, no batch hangs on the device, no main task is dead.
``/readyz``    warm and not draining.  A broker outage, lag, a rebalance or no partition keep it 200: taking a
               worker out of a rollout for these would only make them worse.
``/metrics``   Prometheus, or OpenMetrics if asked for.

A probe reads facts and does nothing else; 200 or 503, with each fact as JSON in the body.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import orjson

from inferstream.errors import SettingsError
from inferstream.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

HEARTBEAT_LIMIT_S = 30.0
REQUEST_TIMEOUT_S = 5.0  # a client that sends nothing must not keep a thread


@dataclass(slots=True)
class Health:
    """The facts that the probes judge, set by the app; times are monotonic seconds.

    ``heartbeat`` is None until the event loop's first beat: loading a model is no reason to be restarted.
    ``device_busy_since`` is when the oldest batch on the device was launched, None while there is none.
    """

    device_hang_timeout_s: float = 120.0
    warm: bool = False
    draining: bool = False
    heartbeat: float | None = None
    device_busy_since: float | None = None
    dead_task: str | None = None
    started: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """The event loop turns."""
        self.heartbeat = time.monotonic()

    def startup(self) -> tuple[bool, dict[str, Any]]:
        return _verdict(
            {"warm": self.warm, "uptime_s": round(time.monotonic() - self.started, 3)},
            {"the model is not warm yet": not self.warm},
        )

    def live(self) -> tuple[bool, dict[str, Any]]:
        now = time.monotonic()
        # Read once: the loop sets them while we judge.
        heartbeat, busy_since, dead_task = self.heartbeat, self.device_busy_since, self.dead_task
        beat_age_s = None if heartbeat is None else round(now - heartbeat, 3)
        busy_s = None if busy_since is None else round(now - busy_since, 3)
        return _verdict(
            {
                "heartbeat_age_s": beat_age_s,
                "heartbeat_limit_s": HEARTBEAT_LIMIT_S,
                "device_busy_s": busy_s,
                "device_hang_timeout_s": self.device_hang_timeout_s,
                "dead_task": dead_task,
            },
            {
                "the event loop is blocked": beat_age_s is not None and beat_age_s > HEARTBEAT_LIMIT_S,
                "a batch hangs on the device": busy_s is not None and busy_s > self.device_hang_timeout_s,
                "a main task is dead": dead_task is not None,
            },
        )

    def ready(self) -> tuple[bool, dict[str, Any]]:
        warm, draining = self.warm, self.draining
        return _verdict(
            {"warm": warm, "draining": draining},
            {"the model is not warm yet": not warm, "the worker is draining": draining},
        )


class HealthServer:
    """Serves a worker's health and metrics; port 0 serves nothing."""

    def __init__(self, host: str, port: int, metrics: Metrics, health: Health) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._health = health
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve.  Raises SettingsError if the address cannot be had."""
        if self._port == 0 or self._server is not None:
            return
        try:
            family, _, _, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, address, self._metrics, self._health)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = "is in use" if error.errno == errno.EADDRINUSE else "is not ours to use"
                raise SettingsError(
                    f"telemetry.port: port {self._port} on {self._host} {why}; choose another, or 0 for none"
                ) from None
            raise SettingsError(
                f"telemetry.host: cannot listen on {self._host!r}: {error.strerror or error}"
            ) from None
        self._thread = threading.Thread(target=self._serve, args=(self._server,), name="health", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and free the port."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        # The thread sleeps until somebody connects; serve_forever would instead wake up twice a second.
        with contextlib.suppress(OSError), socket.socket(server.address_family) as waker:
            waker.settimeout(1.0)
            waker.connect(server.server_address)
        self._thread.join(1.0)
        server.server_close()

    def _serve(self, server: _Server) -> None:
        while self._server is server:
            server.handle_request()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a slow reader must not hold the process at its end

    def __init__(self, family: int, address: Any, metrics: Metrics, health: Health) -> None:
        self.address_family = family
        self.metrics = metrics
        self.health = health
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look its own name up in DNS, for seconds where there is none, and not use it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a health request ended early", exc_info=True)  # the client went away


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_TIMEOUT_S

    probes: ClassVar[dict[str, Callable[[Health], tuple[bool, dict[str, Any]]]]] = {
        "/startupz": Health.startup,
        "/livez": Health.live,
        "/readyz": Health.ready,
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        probe = self.probes.get(path)
        if probe is not None:
            good, facts = probe(self.server.health)
            self._answer(200 if good else 503, "application/json", orjson.dumps(facts) + b"\n")
        elif path == "/metrics":
            try:
                content_type, body = self.server.metrics.render(self.headers.get("Accept", ""))
            except Exception as error:
                log.warning("the metrics could not be rendered", extra={"error": repr(error)})
                self._answer(500, "text/plain", b"the metrics could not be rendered; see the log\n")
            else:
                self._answer(200, content_type, body)
        else:
            paths = ["/metrics", *self.probes]
            self._answer(
                404, "application/json", orjson.dumps({"status": "unknown path", "paths": paths}) + b"\n"
            )

    do_HEAD = do_GET

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return  # a line per probe would drown the log


def _verdict(facts: dict[str, Any], failures: dict[str, bool]) -> tuple[bool, dict[str, Any]]:
    failing = [failure for failure, is_so in failures.items() if is_so]
    return not failing, {"status": "failing" if failing else "ok", "failing": failing, **facts}
