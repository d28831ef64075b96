"""What runs beside the workers, the topics Job and `helm test`: before what, where, and with what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.chart import MATRIX, Objects, is_hook, render

TOPICS = "topics: {create: true}"
# Everything by which a pod's specification names another object: the field, and where in it the name is.
REFERENCES = {
    "configMapKeyRef": ("ConfigMap", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "configMap": ("ConfigMap", "name"),
    "secretKeyRef": ("Secret", "name"),
    "secretRef": ("Secret", "name"),
    "secret": ("Secret", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
}


def references(part: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of all that a pod's specification, or a part of it, names."""
    if isinstance(part, list):
        for each in part:
            yield from references(each)
    elif isinstance(part, dict):
        for field, value in part.items():
            if field in REFERENCES:
                kind, key = REFERENCES[field]
                yield kind, value[key] if key in value else value["secretName"]
            elif field == "serviceAccountName":
                yield "ServiceAccount", value
            elif field == "imagePullSecrets":
                yield from (("Secret", each["name"]) for each in value)
            else:
                yield from references(value)


def events_of(thing: dict[str, Any]) -> set[str]:
    return set(thing["metadata"].get("annotations", {}).get("helm.sh/hook", "").split(",")) - {""}


def weight_of(thing: dict[str, Any]) -> int:
    return int(thing["metadata"]["annotations"].get("helm.sh/hook-weight", 0))


def too_late(objects: Objects) -> list[str]:
    """What a Job that is a hook names, and the release makes after it, or not certainly before."""
    made = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects.all}
    found = []
    for job in filter(is_hook, objects.of("Job")):
        for kind, name in sorted(set(references(job["spec"]["template"]["spec"]))):
            thing = made.get((kind, name))
            if thing is None:
                continue
            # Of hooks with one weight, the names decide.
            if not (events_of(job) <= events_of(thing) and weight_of(thing) < weight_of(job)):
                found.append(f"{kind} {name}")
    return found


def hook_pods(objects: Objects) -> dict[str, dict[str, Any]]:
    """The specifications of the pods beside the workers, by name."""
    pods = {job["metadata"]["name"]: job["spec"]["template"]["spec"] for job in objects.of("Job")}
    return {**pods, **{pod["metadata"]["name"]: pod["spec"] for pod in objects.of("Pod")}}


@pytest.mark.parametrize("name", MATRIX)
def test_jobs_when_they_run_before_the_release_then_what_they_name_is_there_before_them(name: str) -> None:
    objects = render(TOPICS, base=yaml.safe_load(MATRIX[name].read_text()))

    assert len(objects.of("Job")) == 1
    assert not too_late(objects)


def test_jobs_when_an_object_of_the_users_is_no_hook_then_it_is_too_late_for_them() -> None:
    values = yaml.safe_load(MATRIX["everything"].read_text())
    annotations = values["extraObjects"][0]["metadata"].pop("annotations")

    assert too_late(render(values, base={})) == ["ConfigMap x-kafka"]
    for weight, found in (("0", ["ConfigMap x-kafka"]), ("-1", [])):
        values["extraObjects"][0]["metadata"]["annotations"] = {**annotations, "helm.sh/hook-weight": weight}
        assert too_late(render(values, base={})) == found


def test_jobs_when_the_account_is_not_the_releases_then_they_have_it_too() -> None:
    external = render(TOPICS, "serviceAccount: {create: false, name: inference}")

    assert {pod["serviceAccountName"] for pod in hook_pods(external).values()} == {"inference"}
    assert [pod.get("serviceAccountName") for pod in hook_pods(render(TOPICS)).values()] == [
        None,
        "x-inferstream",
        "x-inferstream",
    ]


def test_hooks_when_brokers_are_found_in_a_special_way_then_they_find_them_as_the_workers_do() -> None:
    objects = render(
        TOPICS,
        "hostAliases: [{ip: 10.0.0.1, hostnames: [kafka]}]",
        "{dnsPolicy: None, dnsConfig: {nameservers: [10.0.0.2]}}",
        "{priorityClassName: inference, schedulerName: gpu-scheduler}",
        "{nodeSelector: {zone: a}, tolerations: [{key: dedicated, operator: Exists}]}",
    )

    for pod in hook_pods(objects).values():
        for field in (
            "hostAliases",
            "dnsPolicy",
            "dnsConfig",
            "priorityClassName",
            "schedulerName",
            "nodeSelector",
            "tolerations",
        ):
            assert pod[field] == objects.pod[field]


def test_hooks_when_volumes_are_given_then_they_have_those_but_not_the_workers_own() -> None:
    objects = render(
        TOPICS,
        "extraVolumes: [{name: '{{ .Release.Name }}-ca', configMap: {name: ca}}]",
        """
        extraVolumeMounts:
          - {name: x-ca, mountPath: /etc/ca, readOnly: true}
          - {name: models, mountPath: /also}
          - {name: tmp, mountPath: /scratch, subPath: a}
        """,
    )
    pods = hook_pods(objects)
    del pods["x-inferstream-test-worker"]  # asks a worker, not Kafka

    assert len(pods) == 2
    for pod in pods.values():
        [command] = pod["containers"]
        assert {"name": "x-ca", "configMap": {"name": "ca"}} in pod["volumes"]
        assert {"name": "x-ca", "mountPath": "/etc/ca", "readOnly": True} in command["volumeMounts"]
        assert {"name": "tmp", "mountPath": "/scratch", "subPath": "a"} in command["volumeMounts"]
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in command["volumeMounts"]} <= names


def test_hooks_when_the_workers_have_gpus_then_they_take_none_and_still_find_a_node() -> None:
    gpu = "gpu: {enabled: true, runtimeClassName: nvidia}"
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}

    for pod in hook_pods(render(TOPICS, gpu)).values():
        assert "nvidia" not in str(pod)
    for pod in hook_pods(render(TOPICS, gpu, "nodeSelector: {nvidia.com/gpu.product: NVIDIA-L4}")).values():
        assert pod["tolerations"] == [taint]
        assert "runtimeClassName" not in pod
        assert "nvidia.com/gpu" not in str(pod["containers"])


def test_hooks_when_everything_else_is_denied_then_they_reach_kafka_and_the_workers() -> None:
    objects = render(
        TOPICS,
        "networkPolicy: {enabled: true, kafkaTo: [{ipBlock: {cidr: 10.0.0.0/8}}], extraEgress: [{ports: [{port: 1}]}]}",
        "config: {telemetry: {port: 8080}, kafka: {bootstrap_servers: ['a:9094']}}",
    )
    policies = {policy["metadata"]["name"]: policy for policy in objects.of("NetworkPolicy")}
    worker, hook = policies.pop("x-inferstream"), policies.pop("x-inferstream-hook")
    [(name, topics)] = policies.items()
    [job] = objects.of("Job")
    labels = objects.workload["spec"]["template"]["metadata"]["labels"]

    assert not is_hook(hook)
    assert name == "x-inferstream-topics" and topics["spec"] == hook["spec"]
    assert events_of(topics) == events_of(job) and weight_of(topics) < weight_of(job)
    assert "ingress" not in hook["spec"] and hook["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for pod in (job["spec"]["template"], *objects.of("Pod")):
        assert hook["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    names, kafka, metrics, extra = hook["spec"]["egress"]
    assert [port["port"] for port in names["ports"]] == [53, 53]
    assert kafka == {
        "ports": [{"port": 9094, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
    }
    assert metrics["ports"] == [{"port": 8080, "protocol": "TCP"}]
    assert metrics["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    assert extra == {"ports": [{"port": 1}]}
    assert {"podSelector": hook["spec"]["podSelector"]} in [
        peer for rule in worker["spec"]["ingress"] for peer in rule["from"]
    ]
    assert len(render("networkPolicy: {enabled: true}").of("NetworkPolicy")) == 2
    assert not render(TOPICS).of("NetworkPolicy")


def test_test_pods_when_they_have_succeeded_then_they_stay_for_their_logs() -> None:
    for pod in render().of("Pod"):
        assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"
