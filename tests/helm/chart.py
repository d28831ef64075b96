"""Renders the chart with a real Helm."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.tools import ToolUnavailable, tool

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "inferstream"
MAJORS = ("helm3", "helm4")
MATRIX = {
    path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))
}
OLDEST, NEWEST = "1.27.0", "1.37.0"  # Kubernetes

# The least that renders; a test changes what it is about.
MINIMAL: Mapping[str, Any] = yaml.safe_load(MATRIX["minimal"].read_text())


@dataclass(frozen=True, slots=True)
class Objects:
    """What a release consists of, as Helm printed it and as data."""

    text: str
    all: tuple[dict[str, Any], ...]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [thing for thing in self.all if thing["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of that kind that no hook makes."""
        [thing] = [thing for thing in self.of(kind) if not is_hook(thing)]
        return thing

    @property
    def workload(self) -> dict[str, Any]:
        return self.one("StatefulSet" if self.of("StatefulSet") else "Deployment")

    @property
    def pod(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def worker(self) -> dict[str, Any]:
        return container(self.pod, "inferstream")

    @property
    def config(self) -> str:
        """The settings file that the workers read."""
        name = self.workload["metadata"]["name"]
        [found] = [thing for thing in self.of("ConfigMap") if thing["metadata"]["name"] == name]
        text: str = found["data"]["config.yaml"]
        return text


class Refused(Exception):
    """Helm refused the values; the message is what a user reads."""


def is_hook(thing: Mapping[str, Any]) -> bool:
    return "helm.sh/hook" in thing["metadata"].get("annotations", {})


def container(pod: Mapping[str, Any], name: str) -> dict[str, Any]:
    [found] = [c for c in (*pod.get("initContainers", ()), *pod["containers"]) if c["name"] == name]
    return dict(found)


def pods_of(objects: Objects) -> list[dict[str, Any]]:
    """The specifications of all pods: the worker's, the Job's, those of `helm test`."""
    templates = [objects.workload["spec"]["template"], *objects.of("Pod")]
    templates += [job["spec"]["template"] for job in objects.of("Job")]
    return [template["spec"] for template in templates]


def containers_of(objects: Objects) -> list[dict[str, Any]]:
    return [each for pod in pods_of(objects) for each in (*pod.get("initContainers", ()), *pod["containers"])]


def env_of(worker: Mapping[str, Any]) -> dict[str, Any]:
    """Name → value, or valueFrom."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in worker["env"]}


def with_values(*changes: str | Mapping[str, Any], base: Mapping[str, Any] = MINIMAL) -> dict[str, Any]:
    """The least values with changes laid over them, as `helm --values` does it; texts are YAML."""
    merged: dict[str, Any] = dict(base)
    for change in changes:
        merged = _merged(merged, yaml.safe_load(change) if isinstance(change, str) else change)
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


@functools.cache
def helm(major: str) -> Path:
    """The Helm of that major version: built from its sources, else the one on the PATH.

    Fails the test where there is no Helm at all, and skips it where there is only the other one.
    """
    reasons = []
    for name in (major, *(other for other in MAJORS if other != major)):
        try:
            return _found(name) if name == major else _skip(_found(name), major, reasons[0])
        except ToolUnavailable as error:
            reasons.append(str(error))
    pytest.fail(f"no Helm for the tests of the chart: {reasons[0]}", pytrace=False)


def _found(major: str) -> Path:
    try:
        return tool(major)
    except ToolUnavailable:
        command = shutil.which("helm")
        if command is None:
            raise
        version = subprocess.run(
            [command, "version", "--template={{.Version}}"], capture_output=True, text=True
        )
        if not version.stdout.startswith(f"v{major.removeprefix('helm')}."):
            raise
        return Path(command)


def _skip(_: Path, major: str, reason: str) -> Path:
    pytest.skip(f"no {major}: {reason}")


@functools.cache
def _template(major: str, values: str, kubernetes: str, release: str, chart: Path) -> Objects:
    done = run_helm(
        major,
        "template",
        release,
        str(chart),
        "--namespace=search",
        f"--kube-version={kubernetes}",
        "--values=-",
        stdin=values,
    )
    if done.returncode:
        raise Refused(done.stderr)
    return Objects(done.stdout, tuple(thing for thing in yaml.safe_load_all(done.stdout) if thing))


def run_helm(
    major: str, *arguments: str, stdin: str = "", environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Helm without anything of this user's: no plugins, no repositories, no cluster."""
    nothing = {f"HELM_{name}_HOME": "/nonexistent" for name in ("CONFIG", "CACHE", "DATA")}
    return subprocess.run(
        [helm(major), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **nothing, **(environ or {})},
    )


def render(
    *changes: str | Mapping[str, Any],
    base: Mapping[str, Any] = MINIMAL,
    major: str = "helm4",
    kubernetes: str = NEWEST,
    release: str = "x",
    chart: Path = CHART,
) -> Objects:
    """The objects of a release with the least values and these changes.  Raises Refused."""
    return _template(major, yaml.safe_dump(with_values(*changes, base=base)), kubernetes, release, chart)


def refusal(*changes: str | Mapping[str, Any], **options: Any) -> str:
    """What Helm says to these values, on one line; the test fails if it takes them."""
    try:
        render(*changes, **options)
    except Refused as refused:
        return re.sub(r"\s+", " ", str(refused))
    pytest.fail(f"Helm takes {changes}")
