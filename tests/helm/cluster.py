"""A real Kubernetes API server with its etcd, and nothing else: no node, so no pod runs and no controller acts.

It admits or refuses as any cluster does: schemas, defaults, Pod Security, custom resource definitions, field ownership.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helm.tools import ToolUnavailable, crd_files, tool
from tests.support.broker import free_ports
from tests.support.processes import kill_group, spawn

START_S = 90.0
# Plural names of what the chart makes, where adding an s is not enough.
PLURALS = {"NetworkPolicy": "networkpolicies"}


class Answer(Exception):
    """An answer other than 2xx: its code and what the server says."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Cluster:
    """The API server; ``kubeconfig`` is for Helm.  Raises ToolUnavailable if it cannot be had."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._token = secrets.token_hex(16)
        self._certificates = folder / "certificates"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> Cluster:
        etcd, server = tool("etcd"), tool("kube-apiserver")
        openssl = shutil.which("openssl")
        if openssl is None:
            raise ToolUnavailable("openssl is missing, which makes the key for service accounts")
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "service-accounts.key"
        subprocess.run([openssl, "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f"{self._token},test,test,system:masters\n")
        etcd_port, peer_port, self._port = free_ports(3)
        etcd_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
        self._spawn(
            "etcd",
            etcd,
            f"--data-dir={self.folder}/etcd",
            "--unsafe-no-fsync",
            f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
        )
        self._spawn(
            "kube-apiserver",
            server,
            f"--etcd-servers={etcd_url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self._certificates}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=AlwaysAllow",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            # Its controller, which makes the namespaces' accounts, does not run.
            "--disable-admission-plugins=ServiceAccount",
        )
        self._await_ready()
        self._write_kubeconfig()
        return self

    def stop(self) -> None:
        for process in reversed(self._processes):
            kill_group(process)

    def install_crds(self) -> None:
        """The definitions of KEDA and the Prometheus operator; returns once they are served."""
        for path in crd_files():
            # As JSON, since the server's own YAML reader is not asked here.
            definition = yaml.load(path.read_text(), _BaseLoader)
            self.call(
                "PATCH",
                f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{definition['metadata']['name']}"
                "?fieldManager=test&force=true",
                path.read_bytes(),
                "application/apply-patch+yaml",
            )
            self._await_established(definition["metadata"]["name"])

    def create(self, thing: Mapping[str, Any], namespace: str | None = None, dry_run: bool = False) -> Any:
        """Create an object, with unknown and doubled fields refused.  Raises Answer."""
        query = f"?fieldValidation=Strict{'&dryRun=All' if dry_run else ''}"
        return self.call("POST", f"{path_of(thing, namespace)}{query}", json.dumps(thing).encode())

    def get(self, thing: Mapping[str, Any], namespace: str | None = None) -> Any:
        """The object of that kind and name as the server has it.  Raises Answer."""
        return self.call("GET", f"{path_of(thing, namespace)}/{thing['metadata']['name']}")

    def namespace(self, name: str, enforce: str = "restricted") -> str:
        """A new namespace that enforces a Pod Security standard."""
        labels = {"pod-security.kubernetes.io/enforce": enforce}
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        return name

    def call(
        self, method: str, path: str, body: bytes | None = None, content: str = "application/json"
    ) -> Any:
        request = urllib.request.Request(
            f"https://127.0.0.1:{self._port}{path}",
            body,
            method=method,
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": content},
        )
        trusted = ssl.create_default_context(cafile=str(self._certificates / "apiserver.crt"))
        try:
            with urllib.request.urlopen(request, timeout=30, context=trusted) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError):
                said = json.loads(said)["message"]
            raise Answer(error.code, said) from None
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def _spawn(self, name: str, *command: object) -> None:
        self._processes.append(spawn([str(part) for part in command], self.folder / f"{name}.log"))

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self._processes):
                break
            try:
                if self.call("GET", "/readyz") == "ok":
                    return
            except (OSError, Answer):
                time.sleep(0.1)
        ends = [path.read_text(errors="replace").splitlines()[-1:] for path in self.folder.glob("*.log")]
        raise ToolUnavailable(f"the API server does not start: {ends}")

    def _await_established(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = self.call("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
            conditions = {c["type"]: c["status"] for c in found.get("status", {}).get("conditions") or ()}
            if conditions.get("Established") == "True":
                version = found["spec"]["versions"][0]["name"]
                try:
                    self.call(
                        "GET", f"/apis/{found['spec']['group']}/{version}/{found['spec']['names']['plural']}"
                    )
                    return
                except Answer as answer:
                    if answer.code not in (404, 429, 503):  # not there yet
                        raise
            time.sleep(0.1)
        raise ToolUnavailable(f"the API server does not serve {name}")

    def _write_kubeconfig(self) -> None:
        server = {
            "server": f"https://127.0.0.1:{self._port}",
            "certificate-authority": str(self._certificates / "apiserver.crt"),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "test", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))
        self.kubeconfig.chmod(0o600)  # Helm warns of one that others can read


class _BaseLoader(yaml.CBaseLoader):
    """Only texts: of a definition nothing but its name is wanted."""


def path_of(thing: Mapping[str, Any], namespace: str | None) -> str:
    """Where objects of that kind are, in the object's namespace or the one given."""
    kind, version = thing["kind"], thing["apiVersion"]
    plural = PLURALS.get(kind, f"{kind.lower()}{'es' if kind.endswith('ss') else 's'}")
    where = namespace or thing["metadata"].get("namespace")
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/{where}/{plural}" if where else f"{root}/{plural}"
