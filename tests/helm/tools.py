"""The programs that judge the chart and the rules, built from pinned sources by Go and kept in the cache folder.

``python -m tests.helm.tools`` builds what `make test` needs, ``--cluster`` what `make test-cluster` needs as well, so
that it does not count against a test's time; with a NAME it builds that one and prints its path.  What is fetched is
held to Go's public checksum database.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BUILD_S = 1800.0
KUBERNETES = "1.36.3"
ETCD = "3.6.8"  # what this Kubernetes is built against


class ToolUnavailable(Exception):
    """A tool cannot be had here; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A command: its Go package, and the modules (path → version) that its sources come from."""

    package: str
    modules: Mapping[str, str]
    ldflags: str = "-s -w"
    tags: str = ""

    @property
    def key(self) -> str:
        """What a build is known by in the cache."""
        parts = (self.package, sorted(self.modules.items()), self.ldflags, *filter(None, [self.tags]))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# Both from one set of dependencies, so that what is common to them is compiled once.
HELM = {"helm.sh/helm/v3": "v3.22.0", "helm.sh/helm/v4": "v4.3.1"}
PROMETHEUS = {"github.com/prometheus/prometheus": "v0.313.5"}
CLUSTER = {"k8s.io/kubernetes": f"v{KUBERNETES}", "go.etcd.io/etcd/server/v3": f"v{ETCD}"}
_MAJOR, _MINOR, _ = KUBERNETES.split(".")
_VERSION = "k8s.io/component-base/version"

TOOLS = {
    "helm3": Tool("helm.sh/helm/v3/cmd/helm", HELM),
    "helm4": Tool("helm.sh/helm/v4/cmd/helm", HELM),
    "kube-score": Tool(
        "github.com/zegl/kube-score/cmd/kube-score", {"github.com/zegl/kube-score": "v1.20.0"}
    ),
    "helm-docs": Tool(
        "github.com/norwoodj/helm-docs/cmd/helm-docs", {"github.com/norwoodj/helm-docs": "v1.14.2"}
    ),
    # Without the discovery of every cloud, which is most of it, and without the pages for a browser, which npm builds.
    "prometheus": Tool("github.com/prometheus/prometheus/cmd/prometheus", PROMETHEUS, tags="remove_all_sd"),
    "promtool": Tool("github.com/prometheus/prometheus/cmd/promtool", PROMETHEUS, tags="remove_all_sd"),
    "etcd": Tool("go.etcd.io/etcd/server/v3", CLUSTER),
    # Without a version of its own, Helm would hold the chart's kubeVersion against 0.0.0.
    "kube-apiserver": Tool(
        "k8s.io/kubernetes/cmd/kube-apiserver",
        CLUSTER,
        f"-s -w -X {_VERSION}.gitVersion=v{KUBERNETES} -X {_VERSION}.gitMajor={_MAJOR} -X {_VERSION}.gitMinor={_MINOR}",
    ),
}
# Of these two any version on the PATH will do, and none is built then.
FOR_RULES = ("promtool", "prometheus")
FOR_TESTS = ("helm3", "helm4", "kube-score", "helm-docs", *FOR_RULES)
FOR_CLUSTER = ("kube-apiserver", "etcd")

# Modules that hold custom resource definitions → the files of those that the chart makes.
CRDS = {
    "github.com/kedacore/keda/v2@v2.21.0": (
        "config/crd/bases/keda.sh_scaledobjects.yaml",
        "config/crd/bases/keda.sh_triggerauthentications.yaml",
    ),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
    ),
}


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferstream" / "tools"


@functools.cache
def tool(name: str) -> Path:
    """The command of that name, built once per machine.  Raises ToolUnavailable."""
    wanted = TOOLS[name]
    path = cache() / f"{name}-{wanted.key}"
    if path.exists():
        return path
    cache().mkdir(parents=True, exist_ok=True)
    with _locked(cache() / "lock"):
        if not path.exists():  # another test run may have built it while we waited
            _build(name, wanted, path)
    return path


def present(name: str) -> Path | None:
    """The command of that name if it is here: on the PATH, or built before."""
    path = cache() / f"{name}-{TOOLS[name].key}"
    if path.exists():
        return path
    found = shutil.which(name)
    return Path(found) if found else None


@functools.cache
def crd_files() -> tuple[Path, ...]:
    """The custom resource definitions of KEDA and the Prometheus operator.  Raises ToolUnavailable."""
    return tuple(_downloaded(module) / name for module, names in CRDS.items() for name in names)


def _build(name: str, wanted: Tool, path: Path) -> None:
    print(
        f"building {name} ({', '.join(f'{m} {v}' for m, v in wanted.modules.items())}, once)",
        file=sys.stderr,
        flush=True,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as temporary:
        Path(temporary, "go.mod").write_text(_go_mod(wanted.modules))
        command = [
            "build",
            "-mod=mod",
            "-trimpath",
            f"-ldflags={wanted.ldflags}",
            f"-tags={wanted.tags}",
            "-o",
            "built",
            wanted.package,
        ]
        _go(command, Path(temporary))
        os.rename(f"{temporary}/built", path)
    print(f"built {name} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _go_mod(modules: Mapping[str, str]) -> str:
    lines = ["module tools", "go 1.26.0"]
    lines += [f"require {module} {version}" for module, version in modules.items()]
    if version := modules.get("k8s.io/kubernetes"):
        # Kubernetes' own go.mod replaces its parts by folders of its repository; as modules they are v0.MINOR.PATCH.
        go_mod = _downloaded(f"k8s.io/kubernetes@{version}") / "go.mod"
        parts = re.findall(r"^\s*(k8s\.io/\S+) => \./staging", go_mod.read_text(), re.MULTILINE)
        lines += [f"replace {part} => {part} v0.{version.removeprefix('v1.')}" for part in parts]
    return "\n".join(lines) + "\n"


def _downloaded(module: str) -> Path:
    """The folder of a module's sources, in Go's own cache."""
    return Path(json.loads(_go(["mod", "download", "-json", module], cache()))["Dir"])


def _go(arguments: list[str], folder: Path) -> str:
    command = shutil.which("go")
    if command is None:
        raise ToolUnavailable(
            "Go is missing (1.26 or later), which builds the tools that judge the chart and the rules"
        )
    folder.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"}
    try:
        done = subprocess.run(
            [command, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=BUILD_S
        )
    except subprocess.TimeoutExpired as error:
        raise ToolUnavailable(f"go {arguments[0]} was not done within {BUILD_S:.0f} s") from error
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines() or ["nothing said"]
        raise ToolUnavailable(f"go {' '.join(arguments)}: {said[-1]}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    arguments = sys.argv[1:]
    names = [name for name in arguments if name in TOOLS]
    wanted = names or (*FOR_TESTS, *(FOR_CLUSTER if "--cluster" in arguments else ()))
    try:
        paths = [(not names and name in FOR_RULES and present(name)) or tool(name) for name in wanted]
        crd_files()
    except ToolUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*(paths if names else (f"chart and rules are judged by {', '.join(wanted)}",)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
