"""The chart on a real Kubernetes API server: `make test-cluster`, not a part of `make test`.

There is no node: `helm test`, the topics Job and everything that a running pod would show stay untried here.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    CHART,
    MAJORS,
    MATRIX,
    ROOT,
    Objects,
    env_of,
    is_hook,
    render,
    run_helm,
    with_values,
)
from tests.helm.cluster import Answer, Cluster
from tests.helm.tools import KUBERNETES, ToolUnavailable

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# What the matrix refers to and the chart does not make.
AROUND: list[dict[str, Any]] = [
    {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "nvidia"},
        "handler": "nvidia",
    },
    {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": "inference"},
        "value": 1000,
    },
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "monitoring"}},
]
# The ways of upgrading that the manual names.
UPGRADES = re.findall(r"^helm upgrade .*", (ROOT / "docs/upgrading.md").read_text(), re.MULTILINE)
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        cluster.install_crds()
        for thing in AROUND:
            cluster.create(thing)
        yield cluster
    except ToolUnavailable as error:
        pytest.fail(f"no Kubernetes for the tests: {error}", pytrace=False)
    finally:
        cluster.stop()


@pytest.fixture
def namespace(cluster: Cluster) -> str:
    return cluster.namespace(f"test-{next(_numbers)}")


def helm(cluster: Cluster, major: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    home = cluster.folder / "home"
    return run_helm(
        major,
        *arguments,
        stdin=stdin,
        environ={"KUBECONFIG": str(cluster.kubeconfig), "HOME": str(home), "HELM_CACHE_HOME": str(home)},
    )


def released(
    cluster: Cluster, major: str, action: str, namespace: str, values: Any, chart: Path = CHART
) -> None:
    """Install or upgrade the release r; hooks are left out, as their pods would never end."""
    done = helm(
        cluster,
        major,
        action,
        "r",
        str(chart),
        f"--namespace={namespace}",
        "--no-hooks",
        "--values=-",
        stdin=yaml.safe_dump(values),
    )
    assert done.returncode == 0, done.stderr


def matrix(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(MATRIX[name].read_text())
    return values


def in_cluster(cluster: Cluster, thing: dict[str, Any], namespace: str) -> Any:
    where = thing["metadata"].get("namespace", namespace)
    return cluster.get(thing, namespace if where == "search" else where)


def config_of(cluster: Cluster, objects: Objects, namespace: str) -> str:
    name = objects.workload["metadata"]["name"]
    [config] = [c for c in objects.of("ConfigMap") if c["metadata"]["name"] == name]
    text: str = cluster.get(config, namespace)["data"]["config.yaml"]
    return text


def test_server_when_asked_then_it_is_the_kubernetes_that_was_built(cluster: Cluster) -> None:
    assert cluster.call("GET", "/version")["gitVersion"] == f"v{KUBERNETES}"


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("name", MATRIX)
def test_release_when_installed_upgraded_and_rolled_back_then_the_server_has_what_was_asked(
    cluster: Cluster, namespace: str, name: str, major: str
) -> None:
    first = matrix(name)
    second = with_values("{config: {batch: {linger_ms: 9}}, commonLabels: {revision: two}}", base=first)
    objects = render(first, base={}, release="r", major=major)

    released(cluster, major, "install", namespace, first)
    before = config_of(cluster, objects, namespace)
    for thing in objects.all:
        if not is_hook(thing):
            in_cluster(cluster, thing, namespace)

    released(cluster, major, "upgrade", namespace, second)
    assert "linger_ms: 9" in config_of(cluster, objects, namespace)
    upgraded = cluster.get(objects.workload, namespace)
    assert upgraded["metadata"]["labels"]["revision"] == "two"

    done = helm(cluster, major, "rollback", "r", "1", f"--namespace={namespace}", "--no-hooks")
    assert done.returncode == 0, done.stderr
    assert config_of(cluster, objects, namespace) == before
    rolled_back = cluster.get(objects.workload, namespace)
    assert (
        rolled_back["spec"]["template"]["metadata"]["annotations"]
        == objects.workload["spec"]["template"]["metadata"]["annotations"]
    )

    history = helm(cluster, major, "history", "r", f"--namespace={namespace}", "--output=json")
    assert [(entry["revision"], entry["status"]) for entry in json.loads(history.stdout)] == [
        (1, "superseded"),
        (2, "superseded"),
        (3, "deployed"),
    ]

    done = helm(cluster, major, "uninstall", "r", f"--namespace={namespace}", "--no-hooks")
    assert done.returncode == 0, done.stderr
    with pytest.raises(Answer) as gone:
        cluster.get(objects.workload, namespace)
    assert gone.value.code == 404


@pytest.mark.parametrize("name", MATRIX)
def test_objects_when_created_strictly_then_the_server_takes_all_hooks_too(
    cluster: Cluster, namespace: str, name: str
) -> None:
    for thing in render(matrix(name), base={}).all:
        cluster.create(
            {**thing, "metadata": {**thing["metadata"], "namespace": namespace}}, namespace, dry_run=True
        )


@pytest.mark.parametrize("name", MATRIX)
def test_pods_when_created_where_only_restricted_ones_may_run_then_they_are_admitted(
    cluster: Cluster, namespace: str, name: str
) -> None:
    objects = render(matrix(name), base={})
    templates = [objects.workload["spec"]["template"], *objects.of("Pod")]
    templates += [job["spec"]["template"] for job in objects.of("Job")]

    for number, template in enumerate(templates):
        spec = dict(template["spec"])
        # A StatefulSet's controller adds the volume of each pod's own claim.
        for claim in objects.workload["spec"].get("volumeClaimTemplates", ()) if number == 0 else ():
            volume = {"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": "own"}}
            spec["volumes"] = [*spec["volumes"], volume]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, "spec": spec}
        created = cluster.create(pod, namespace)
        assert created["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("securityContext: {allowPrivilegeEscalation: true}", "allowPrivilegeEscalation"),
        ("podSecurityContext: {runAsNonRoot: false}", "runAsNonRoot"),
        ("extraVolumes: [{name: host, hostPath: {path: /}}]", "hostPath"),
    ],
)
def test_pods_when_made_weaker_than_restricted_then_the_server_refuses_them(
    cluster: Cluster, namespace: str, change: str, said: str
) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "weak"}, "spec": render(change).pod}

    with pytest.raises(Answer) as refused:
        cluster.create(pod, namespace)

    assert refused.value.code == 403
    assert said in str(refused.value)


@pytest.mark.parametrize("major", MAJORS)
def test_release_when_the_chart_has_a_newer_version_then_it_is_upgraded_in_place(
    cluster: Cluster, namespace: str, major: str, tmp_path: Path
) -> None:
    newer = tmp_path / "inferstream"
    shutil.copytree(CHART, newer)
    about = yaml.safe_load((newer / "Chart.yaml").read_text())
    (newer / "Chart.yaml").write_text(yaml.safe_dump({**about, "version": "9.9.9", "appVersion": "9.9.9"}))
    values = matrix("minimal")
    workload = render(values, base={}, release="r").workload

    released(cluster, major, "install", namespace, values)
    before = cluster.get(workload, namespace)
    released(cluster, major, "upgrade", namespace, values, chart=newer)
    after = cluster.get(workload, namespace)

    assert before["metadata"]["uid"] == after["metadata"]["uid"]
    assert after["spec"]["template"]["spec"]["containers"][0]["image"].endswith(":9.9.9")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The chart as it was before it had `shm`."""
    folder = tmp_path / "older" / "inferstream"
    shutil.copytree(CHART, folder)
    values = yaml.safe_load((folder / "values.yaml").read_text())
    del values["shm"]
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    for template in folder.glob("templates/*.tpl"):
        lines = template.read_text().replace(".Values.shm.enabled", "false").splitlines()
        template.write_text("\n".join(line for line in lines if not line.startswith('"shm')))
    return folder


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("command", UPGRADES, ids=lambda command: command.split()[6])
def test_release_when_a_newer_chart_has_more_values_then_the_manuals_commands_upgrade_it(
    cluster: Cluster, namespace: str, command: str, major: str, older: Path, tmp_path: Path
) -> None:
    values = with_values("config: {batch: {linger_ms: 9}}", base=matrix("minimal"))
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    ours = {"embedder": "r", "helm/inferstream": str(CHART), "search": namespace, "values.yaml": str(file)}
    _, *arguments = [ours.get(word, word) for word in shlex.split(command)]
    del arguments[arguments.index("--wait") :]  # there are no pods to wait for
    objects = render(values, base={}, release="r")
    released(cluster, major, "install", namespace, values, chart=older)

    done = helm(cluster, major, *arguments, "--no-hooks")

    assert done.returncode == 0, done.stderr
    workload = cluster.get(objects.workload, namespace)
    assert workload["spec"]["template"]["spec"]["containers"][0]["image"].endswith(":NEW")
    assert "linger_ms: 9" in config_of(cluster, objects, namespace)


def test_manual_when_it_tells_how_to_upgrade_then_there_are_two_ways() -> None:
    assert [command.split()[6] for command in UPGRADES] == ["--values", "--reset-then-reuse-values"]


@pytest.mark.parametrize("major", MAJORS)
def test_release_when_a_variable_of_the_charts_is_given_then_it_takes_its_place(
    cluster: Cluster, namespace: str, major: str
) -> None:
    values = with_values("extraEnv: [{name: HF_HOME, value: /elsewhere}]", base=matrix("minimal"))

    released(cluster, major, "install", namespace, values)

    workload = cluster.get(render(values, base={}, release="r").workload, namespace)
    assert env_of(workload["spec"]["template"]["spec"]["containers"][0])["HF_HOME"] == "/elsewhere"


@pytest.mark.parametrize("major", MAJORS)
def test_release_when_it_becomes_a_statefulset_and_back_then_only_one_workload_is_left(
    cluster: Cluster, namespace: str, major: str
) -> None:
    values = matrix("minimal")
    static = with_values("workload: {kind: StatefulSet}", base=values)
    deployment = render(values, base={}, release="r").workload
    statefulset = render(static, base={}, release="r").workload

    released(cluster, major, "install", namespace, values)
    released(cluster, major, "upgrade", namespace, static)
    cluster.get(statefulset, namespace)
    with pytest.raises(Answer):
        cluster.get(deployment, namespace)
    released(cluster, major, "upgrade", namespace, values)
    cluster.get(deployment, namespace)
    with pytest.raises(Answer):
        cluster.get(statefulset, namespace)


@pytest.mark.parametrize("major", MAJORS)
def test_release_when_a_scaler_has_changed_the_pods_then_an_upgrade_leaves_their_number(
    cluster: Cluster, namespace: str, major: str
) -> None:
    values = with_values("keda: {enabled: true, maxReplicaCount: 8}", base=matrix("minimal"))
    workload = render(values, base={}, release="r").workload
    released(cluster, major, "install", namespace, values)
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{workload['metadata']['name']}/scale"
    cluster.call("PATCH", path, b'{"spec": {"replicas": 5}}', "application/merge-patch+json")

    released(
        cluster, major, "upgrade", namespace, with_values("config: {batch: {linger_ms: 9}}", base=values)
    )

    assert cluster.get(workload, namespace)["spec"]["replicas"] == 5
