"""`inferstream health`: how a worker on this machine is, for a container's health check."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
from typing import Any

import typer

from inferstream.cli.common import ConfigFiles, warn
from inferstream.errors import InferstreamError, SettingsError

PROBES = ("/livez", "/readyz")
TIMEOUT_S = 5.0


def health(config: ConfigFiles = None) -> None:
    """Ask the worker on this machine whether it lives and is ready; exit 0 if both.

    It is looked for at telemetry.host and telemetry.port of the image's settings, of files and of the environment;
    what the worker itself was given as flags is not known here.  The answers go to stdout, a line each.

    \b
    inferstream health
    """
    from inferstream.settings import load_settings

    loaded = load_settings(config or (), os.environ, {}, require=False)
    warn(loaded)
    telemetry = loaded.settings.telemetry
    if telemetry.port == 0:
        raise SettingsError(f"telemetry.port: 0 [{loaded.origins['telemetry.port']}], so no worker answers")
    host = _reachable(telemetry.host)
    failing: list[str] = []
    for path in PROBES:
        status, facts = _ask(host, telemetry.port, path)
        typer.echo(json.dumps({"probe": path, **facts}))
        if status != http.client.OK:
            failing += facts.get("failing") or [f"{path} answers {status}"]
    if failing:
        raise InferstreamError("; ".join(failing))


def _reachable(host: str) -> str:
    """The address to ask a server at that listens on ``host``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _ask(host: str, port: int, path: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(json.loads(answer.read()))
    except OSError as error:
        raise InferstreamError(f"no worker answers on {host} port {port}: {error}") from error
    except (http.client.HTTPException, TypeError, ValueError) as error:
        raise InferstreamError(f"what answers on {host} port {port} is no worker: {error!r}") from error
    finally:
        connection.close()
