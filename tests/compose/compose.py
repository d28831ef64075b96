"""docker-compose.yml as Docker Compose reads it, as far as this project's file needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
ENV_FILE = ROOT / ".env"
DEFAULTS = ROOT / "ops" / "image" / "defaults.yaml"

_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>[A-Za-z_]\w*)\}|(?P<odd>.?))")


def env_file() -> dict[str, str]:
    """The variables of .env: NAME=VALUE, without quotes."""
    lines = [line for line in ENV_FILE.read_text().splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


class Compose:
    """The file with the variables of .env filled in, or others in their place; ``used`` names those it uses."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self.variables = env_file() | dict(variables or {})
        self.used: set[str] = set()
        self.raw: dict[str, Any] = yaml.safe_load(FILE.read_text())
        self.tree: dict[str, Any] = self._filled_in(self.raw)

    @cached_property
    def services(self) -> dict[str, dict[str, Any]]:
        return dict(self.tree["services"])

    @cached_property
    def own_services(self) -> dict[str, dict[str, Any]]:
        """Those that run this project's image."""
        image = self.variables["INFERSTREAM_IMAGE"]
        return {name: service for name, service in self.services.items() if service["image"] == image}

    def names(self) -> dict[str, list[str]]:
        """Name in the network → the services that answer to it."""
        found: dict[str, list[str]] = {}
        for name, service in self.services.items():
            networks = service.get("networks", {})
            aliases = networks.get("default", {}).get("aliases", [])
            for each in (name, *aliases):
                found.setdefault(each, []).append(name)
        return found

    def host_path(self, service: str, path: str) -> Path | None:
        """The file of the checkout that a service sees under the path; None if no mount shows it one."""
        for source, target in self.binds(service):
            if path == target or path.startswith(f"{target}/"):
                return source / path.removeprefix(target).lstrip("/")
        return None

    def binds(self, service: str) -> list[tuple[Path, str]]:
        """(file or folder of the checkout, path in the container), the deepest first."""
        entries = [volume.split(":") for volume in self.services[service].get("volumes", [])]
        found = [(ROOT / source, target) for source, target, *_ in entries if source.startswith(".")]
        return sorted(found, key=lambda bind: -len(bind[1]))

    def _filled_in(self, node: Any) -> Any:
        if isinstance(node, dict):
            return {name: self._filled_in(value) for name, value in node.items()}
        if isinstance(node, list):
            return [self._filled_in(value) for value in node]
        return _VARIABLE.sub(self._value, node) if isinstance(node, str) else node

    def _value(self, found: re.Match[str]) -> str:
        if found["escaped"]:
            return "$"
        if found["name"] is None:
            raise ValueError(f"{FILE.name}: only ${{NAME}} is understood here, not {found[0]!r}")
        self.used.add(found["name"])
        return self.variables[found["name"]]
