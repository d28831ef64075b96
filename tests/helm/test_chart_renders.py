"""The matrix of helm/inferstream/ci, rendered by real Helm and held to the schemas of what it is sent to."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm.chart import CHART, MAJORS, MATRIX, NEWEST, OLDEST, Objects, is_hook, render, run_helm
from tests.helm.kinds import problems
from tests.helm.tools import ToolUnavailable, tool

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "INFERSTREAM_UPDATE_GOLDEN"

# kube-score's checks that these objects fail on purpose, and why.
IGNORED_BY_SCORE = {
    "pod-networkpolicy": "an option: not every cluster enforces them, and Kafka's addresses are not known here",
    "container-image-pull-policy": "Always would make the registry a condition of every restart",
    "deployment-has-host-podantiaffinity": "topologySpreadConstraints do it, which it does not know",
    "statefulset-has-host-podantiaffinity": "the same",
    "pod-probes-identical": "they differ by path",
    "statefulset-has-servicename": "the Service is headless, and there",
}
# And of one way of running: there the cluster chooses the user id.
IGNORED_BY_SCORE_IN = {"offline": ["container-security-context-user-group-id"]}


def rendered(name: str, **options: str) -> Objects:
    return render(yaml.safe_load(MATRIX[name].read_text()), base={}, **options)


def test_matrix_when_listed_then_every_way_of_running_is_in_it() -> None:
    kinds = {thing["kind"] for name in MATRIX for thing in rendered(name).all}

    assert kinds == {
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "Job",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
        "StatefulSet",
        "TriggerAuthentication",
    }


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", MATRIX)
def test_objects_when_held_to_their_schemas_then_nothing_is_wrong(name: str, kubernetes: str) -> None:
    found = [
        line for thing in rendered(name, kubernetes=kubernetes).all for line in problems(thing, kubernetes)
    ]

    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("topologySpreadConstraints: [{maxSkew: many}]", "maxSkew"),
        ("affinity: {podAffinty: {}}", "podAffinty"),
        (
            "keda: {enabled: true, maxReplicaCount: 2, additionalTriggers: [{type: x, metadata: {wanted: 2}}]}",
            "wanted",
        ),
        ("metrics: {serviceMonitor: {enabled: true, relabelings: [{targetLable: x}]}}", "targetLable"),
        ("keda: {enabled: true, maxReplicaCount: 2, behavior: {scaleDown: {policies: [{type: 1}]}}}", "type"),
        ("extraObjects: [{apiVersion: example.com/v1, kind: Toy, metadata: {name: toy}}]", "unknown"),
    ],
)
def test_schemas_when_an_object_is_wrong_then_they_say_so(change: str, said: str) -> None:
    found = [line for thing in render(change).all for line in problems(thing, NEWEST)]

    assert any(said in line for line in found), found


@pytest.mark.parametrize("name", MATRIX)
def test_helm_when_it_is_3_or_4_then_the_objects_are_the_same(name: str) -> None:
    both = [rendered(name, major=major).all for major in MAJORS]

    assert both[0] == both[1]


@pytest.mark.parametrize("name", MATRIX)
def test_objects_when_compared_with_the_golden_ones_then_nothing_has_changed(name: str) -> None:
    golden = GOLDEN / f"{name}.yaml"
    # A dashboard is thousands of lines of its own, which are compared with the chart's file elsewhere.
    text = re.sub(r"(\n  [\w-]+\.json: \|\n)(?:    .*\n)+", r"\1    {}\n", rendered(name).text)
    if os.environ.get(UPDATE):
        golden.write_text(text)

    assert golden.is_file() and golden.read_text() == text, (
        f"the chart renders something else for {name}: run `make chart`, and review the change of {golden.name}"
    )


def test_golden_files_when_listed_then_each_belongs_to_the_matrix() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(MATRIX)


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("name", MATRIX)
def test_lint_when_strict_then_it_finds_nothing(name: str, major: str) -> None:
    done = run_helm(
        major, "lint", "--strict", str(CHART), f"--values={MATRIX[name]}", f"--kube-version={NEWEST}"
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_package_when_made_then_it_holds_what_a_release_needs_and_nothing_else(tmp_path: Path) -> None:
    done = run_helm("helm4", "package", str(CHART), f"--destination={tmp_path}")
    assert done.returncode == 0, done.stderr

    [package] = tmp_path.iterdir()
    names = subprocess.run(["tar", "tzf", package], capture_output=True, text=True, check=True).stdout.split()

    assert {"inferstream/Chart.yaml", "inferstream/values.yaml", "inferstream/values.schema.json"} <= set(
        names
    )
    assert "inferstream/README.md" in names
    assert not [name for name in names if "/ci/" in name or name.endswith(".gotmpl")]


@pytest.mark.parametrize("name", MATRIX)
def test_kube_score_when_it_looks_at_the_objects_then_it_criticises_nothing(
    name: str, tmp_path: Path
) -> None:
    try:
        command = [tool("kube-score"), "score", "--kubernetes-version=v1.31", "--output-format=ci"]
    except ToolUnavailable as error:
        pytest.skip(f"no kube-score: {error}")
    command += [f"--ignore-test={check}" for check in (*IGNORED_BY_SCORE, *IGNORED_BY_SCORE_IN.get(name, ()))]
    objects = tmp_path / "objects.yaml"
    # Pods of `helm test` and the Job run once, and the policy named -hook is for them; the rest is what stays.
    staying = [thing for thing in rendered(name).all if not is_hook(thing)]
    objects.write_text(
        yaml.safe_dump_all(thing for thing in staying if not thing["metadata"]["name"].endswith("-hook"))
    )

    done = subprocess.run([*command, objects], capture_output=True, text=True)

    assert done.stdout
    assert done.returncode == 0, "\n".join(
        line for line in done.stdout.splitlines() if not line.startswith("[OK]")
    )
