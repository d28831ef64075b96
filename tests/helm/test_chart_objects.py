"""What the rendered objects must say, by what would go wrong otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    CHART,
    MATRIX,
    Objects,
    container,
    containers_of,
    env_of,
    is_hook,
    pods_of,
    refusal,
    render,
    run_helm,
)

KEDA = "keda: {enabled: true, maxReplicaCount: 8}"
SASL = """
config: {kafka: {security: {protocol: SASL_SSL, mechanism: SCRAM-SHA-256, username: worker}}}
secrets: {kafka: {sasl: {existingSecret: kafka}, ca: {existingSecret: authorities, key: ca.pem}}}
"""


def policies_of(objects: Objects, name: str) -> list[dict[str, Any]]:
    return [policy for policy in objects.of("NetworkPolicy") if policy["metadata"]["name"] == name]


def volume(objects: Objects, name: str) -> dict[str, Any]:
    [found] = [volume for volume in objects.pod["volumes"] if volume["name"] == name]
    return dict(found)


def mount(worker: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [mount for mount in worker["volumeMounts"] if mount["name"] == name]
    return dict(found)


# ---- what people read


def notes(*arguments: str) -> str:
    """What Helm says after an installation; Helm 3 would ask a cluster even for a trial."""
    done = run_helm("helm4", "install", "x", str(CHART), "--namespace=search", "--dry-run=client", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


@pytest.mark.parametrize("name", MATRIX)
def test_notes_when_installed_then_they_say_how_to_publish_and_consume(name: str) -> None:
    said = notes(f"--values={MATRIX[name]}")
    workload = render(yaml.safe_load(MATRIX[name].read_text()), base={}).workload

    assert f"{workload['kind'].lower()}/{workload['metadata']['name']} -c inferstream" in said
    assert "inferstream publish --config /etc/inferstream/config.yaml " in said
    assert "inferstream consume --config /etc/inferstream/config.yaml " in said
    assert "helm test --namespace search x" in said
    topics = yaml.safe_load(MATRIX[name].read_text())["config"]["input"]["topics"]
    assert ("--topic documents -" in said) == (topics != ["documents"])  # which of several must be said


def test_notes_when_pods_of_several_nodes_need_one_claim_then_they_warn() -> None:
    shared = (f"--values={MATRIX['minimal']}", "--set=model.storage.kind=claim", "--set=workload.replicas=2")

    assert "WARNING: the claim x-inferstream-models is ReadWriteOnce" in notes(*shared)
    assert "WARNING" not in notes(*shared, "--set=model.storage.claim.accessModes={ReadWriteMany}")
    assert "WARNING" not in notes(*shared, "--set=workload.kind=StatefulSet")


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ("gpu: {enabled: true}", True),
        ("{gpu: {enabled: true}, resources: {requests: {cpu: 3500m}, limits: {cpu: 8}}}", True),
        ("{gpu: {enabled: true}, resources: {requests: {cpu: null}, limits: {cpu: null}}}", True),
        ("{gpu: {enabled: true}, resources: {requests: {cpu: null}, limits: {cpu: 4}}}", False),
        ("{gpu: {enabled: true}, resources: {requests: {cpu: 4000m}, limits: {cpu: 8}}}", False),
        ("gpu: {enabled: false}", False),
    ],
)
def test_notes_when_a_gpu_has_few_cores_beside_it_then_they_warn(
    values: str, warned: bool, tmp_path: Path
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(values)

    said = notes(f"--values={MATRIX['minimal']}", f"--values={file}")

    assert ("WARNING: a worker asks for a GPU" in said) == warned


# ---- the environment


@pytest.mark.parametrize("name", MATRIX)
def test_environment_when_its_own_names_are_given_then_each_is_there_once_and_as_given(name: str) -> None:
    values = yaml.safe_load(MATRIX[name].read_text())
    own = {name for each in containers_of(render(values, base={})) for name in names_of(each)}
    own.discard("INFERSTREAM_KAFKA__GROUP_INSTANCE_ID")  # one for all pods would be none
    mine = {"secretKeyRef": {"name": "{{ .Release.Name }}-mine", "key": "a"}}
    given = [{"name": name, "valueFrom": mine} for name in sorted(own)]

    objects = render({"extraEnv": given, "model": {"download": {"env": given}}}, base=values)

    assert {"HOME", "HF_HOME"} <= {each["name"] for each in given}
    for each in containers_of(objects):
        names = names_of(each)
        assert len(names) == len(set(names)), f"{each['name']}: {names}"
        if each["name"] in ("inferstream", "topics"):
            for own_name in own.intersection(names):
                assert env_of(each)[own_name] == {"secretKeyRef": {"name": "x-mine", "key": "a"}}


@pytest.mark.parametrize("name", MATRIX)
def test_environment_when_rendered_then_no_name_is_there_twice(name: str) -> None:
    for each in containers_of(render(yaml.safe_load(MATRIX[name].read_text()), base={})):
        assert len(names_of(each)) == len(set(names_of(each)))


def names_of(each: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in each.get("env", ())]


# ---- rollouts and ends


def test_deployment_when_rolled_out_then_no_pod_is_ever_surplus() -> None:
    strategy = render().workload["spec"]["strategy"]

    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    assert render("workload: {strategy: Recreate}").workload["spec"]["strategy"] == {"type": "Recreate"}


def test_statefulset_when_asked_for_then_each_pod_is_a_member_of_its_own_name() -> None:
    objects = render("{workload: {kind: StatefulSet, replicas: 3}, config: {kafka: {group_id: g}}}")
    exactly_once = render(
        "{workload: {kind: StatefulSet}, config: {kafka: {group_id: g}, delivery: {guarantee: exactly-once}}}"
    )

    assert not objects.of("Deployment")
    assert objects.workload["spec"]["podManagementPolicy"] == "Parallel"
    assert objects.workload["spec"]["serviceName"] == objects.one("Service")["metadata"]["name"]
    assert env_of(objects.worker)["INFERSTREAM_KAFKA__GROUP_INSTANCE_ID"] == {
        "fieldRef": {"fieldPath": "metadata.name"}
    }
    assert "INFERSTREAM_KAFKA__TRANSACTIONAL_ID" not in env_of(objects.worker)
    names = list(env_of(exactly_once.worker))
    assert (
        env_of(exactly_once.worker)["INFERSTREAM_KAFKA__TRANSACTIONAL_ID"]
        == "g-$(INFERSTREAM_KAFKA__GROUP_INSTANCE_ID)"
    )
    # Kubernetes puts in only what stands before.
    assert names.index("INFERSTREAM_KAFKA__GROUP_INSTANCE_ID") < names.index(
        "INFERSTREAM_KAFKA__TRANSACTIONAL_ID"
    )


def test_deployment_when_rendered_then_its_members_are_dynamic() -> None:
    assert not [name for name in env_of(render().worker) if "GROUP_INSTANCE_ID" in name]


@pytest.mark.parametrize(("drain", "grace"), [(30, 45), (0.5, 16), (12.5, 28), (600, 615)])
def test_grace_period_when_the_drain_changes_then_it_covers_it(drain: float, grace: int) -> None:
    objects = render({"config": {"delivery": {"drain_timeout_s": drain}}})

    assert objects.pod["terminationGracePeriodSeconds"] == grace


def test_grace_period_when_longer_then_it_is_taken() -> None:
    assert (
        render("workload: {terminationGracePeriodSeconds: 300}").pod["terminationGracePeriodSeconds"] == 300
    )


def test_pods_when_a_setting_changes_then_they_are_replaced_and_else_not() -> None:
    def checksum(*changes: str) -> str:
        template = render(*changes).workload["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum("workload: {replicas: 5}") == checksum("commonLabels: {team: search}")
    assert checksum() != checksum("config: {batch: {linger_ms: 7}}")
    assert checksum() != checksum("gpu: {enabled: true}")


def test_probes_when_rendered_then_each_asks_its_own_question_on_the_port_of_metrics() -> None:
    worker = render("{config: {telemetry: {port: 8080}}, probes: {startup: {failureThreshold: 99}}}").worker

    paths = {kind: worker[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}

    assert {kind: get["path"] for kind, get in paths.items()} == {
        "startup": "/startupz",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert {get["port"] for get in paths.values()} == {"metrics"}
    assert worker["ports"] == [{"name": "metrics", "containerPort": 8080}]
    assert worker["startupProbe"]["failureThreshold"] == 99


def test_deployment_when_a_model_loads_long_then_the_rollout_waits_for_it() -> None:
    spec = render("probes: {startup: {failureThreshold: 360}}").workload["spec"]

    assert spec["progressDeadlineSeconds"] == 3600 + 600


# ---- security


@pytest.mark.parametrize(
    "values",
    [
        "{}",
        "{topics: {create: true}, model: {download: {source: ':s3:b'}}, config: {model: {id: /models/m}}}",
    ],
)
def test_pods_when_rendered_then_none_can_be_more_than_restricted(values: str) -> None:
    for pod in pods_of(render(values)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        for each in (*pod.get("initContainers", ()), *pod["containers"]):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert each["resources"]["limits"]["memory"]
            assert each["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_pod_when_the_user_id_is_left_to_the_cluster_then_none_is_named() -> None:
    objects = render("podSecurityContext: {runAsUser: null, runAsGroup: null, fsGroup: null}")

    assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(objects.pod["securityContext"])
    assert objects.pod["securityContext"]["runAsNonRoot"] is True


def test_worker_when_it_writes_then_there_is_a_volume_below() -> None:
    worker = render().worker
    writable = {each["mountPath"] for each in worker["volumeMounts"] if not each.get("readOnly")}

    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        path = Path(env_of(worker)[name])
        assert writable & {str(path), *map(str, path.parents)}, f"{name} is {path}"


def test_config_when_mounted_then_the_images_own_defaults_stay_visible() -> None:
    found = mount(render().worker, "config")

    assert found["mountPath"] == "/etc/inferstream/config.yaml"
    assert found["subPath"] == "config.yaml"


def test_kafka_secrets_when_named_then_their_keys_are_files_that_the_settings_name() -> None:
    objects = render(
        SASL,
        "secrets: {kafka: {client: {existingSecret: worker, certKey: user.crt, keyKey: user.key}}}",
        "secrets: {kafka: {client: {keyPasswordKey: pass}}}",
    )
    sources = volume(objects, "kafka")["projected"]["sources"]
    folder = mount(objects.worker, "kafka")["mountPath"]

    given = {
        (source["secret"]["name"], item["key"]): f"{folder}/{item['path']}"
        for source in sources
        for item in source["secret"]["items"]
    }

    security = yaml.safe_load(objects.config)["kafka"]["security"]
    assert given == {
        ("kafka", "password"): security["password_file"],
        ("authorities", "ca.pem"): security["ca_file"],
        ("worker", "user.crt"): security["cert_file"],
        ("worker", "user.key"): security["key_file"],
        ("worker", "pass"): security["key_password_file"],
    }
    # A key that is missing must hold the pod back with an event, not let it start without.
    assert not any("optional" in str(source) for source in sources)


def test_kafka_secrets_when_a_command_runs_beside_the_workers_then_it_has_them_too() -> None:
    objects = render(
        SASL,
        "{topics: {create: true}, secrets: {kafka: {sasl: {usernameKey: user}}}}",
        "config: {kafka: {security: {username: null}}}",
    )
    [job] = objects.of("Job")
    [test] = [pod for pod in objects.of("Pod") if pod["metadata"]["name"].endswith("-test-kafka")]

    for pod in (objects.pod, job["spec"]["template"]["spec"], test["spec"]):
        [first] = pod["containers"]
        assert mount(first, "kafka")["mountPath"] == "/etc/inferstream/kafka"
        assert [v["projected"] for v in pod["volumes"] if v["name"] == "kafka"] == [
            volume(objects, "kafka")["projected"]
        ]
        assert env_of(first)["INFERSTREAM_KAFKA__SECURITY__USERNAME"] == {
            "secretKeyRef": {"name": "kafka", "key": "user"}
        }


# ---- GPU and model


@pytest.mark.parametrize(
    ("request_", "limit"), [("2000m", 2), ("4096Mi", "4Gi"), ("4G", "4Gi"), ("0.5", "500m"), (8, None)]
)
def test_resources_when_the_limit_is_not_below_the_request_then_they_are_taken(
    request_: object, limit: object
) -> None:
    name = "memory" if "G" in str(limit) else "cpu"

    worker = render({"resources": {"requests": {name: request_}, "limits": {name: limit}}}).worker

    assert worker["resources"]["requests"][name] == request_
    assert worker["resources"]["limits"].get(name) == limit


def test_gpu_when_asked_for_then_one_is_a_limit_and_the_worker_insists_on_it() -> None:
    objects = render("gpu: {enabled: true, resourceName: nvidia.com/mig-1g.10gb, runtimeClassName: nvidia}")

    assert objects.worker["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert objects.pod["runtimeClassName"] == "nvidia"
    assert objects.pod["tolerations"] == [
        {"key": "nvidia.com/mig-1g.10gb", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert yaml.safe_load(objects.config)["model"]["device"] == "cuda"
    other = render("{gpu: {enabled: true, tolerateTaint: false}, config: {model: {device: auto}}}")
    assert yaml.safe_load(other.config)["model"]["device"] == "auto"
    assert "tolerations" not in other.pod


def test_gpus_when_a_model_needs_several_then_they_are_asked_for() -> None:
    resources = render("{gpu: {enabled: true, count: 4}, resources: {limits: {nvidia.com/gpu: '4'}}}").worker[
        "resources"
    ]

    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 4


@pytest.mark.parametrize("kind", ["limits", "requests"])
def test_gpus_when_resources_name_another_number_then_the_chart_refuses_it(kind: str) -> None:
    said = refusal({"gpu": {"enabled": True}, "resources": {kind: {"nvidia.com/gpu": 4}}})

    assert f"resources.{kind} names 4 nvidia.com/gpu, and gpu.count is 1" in said


def test_settings_when_a_section_is_null_then_what_follows_from_other_values_is_still_there() -> None:
    objects = render(
        "{gpu: {enabled: true}, config: {model: null, kafka: {security: {protocol: SSL}}}}",
        "secrets: {kafka: {ca: {existingSecret: ca}}}",
    )

    config = yaml.safe_load(objects.config)

    assert config["model"] == {"device": "cuda"}
    assert config["kafka"]["security"] == {"protocol": "SSL", "ca_file": "/etc/inferstream/kafka/ca.crt"}


def test_model_when_on_a_claim_then_a_deployment_shares_one_and_a_statefulset_has_one_each() -> None:
    claim = "model: {storage: {kind: claim, claim: {size: 7Gi}}}"
    shared, each = render(claim), render(claim, "workload: {kind: StatefulSet}")

    name = shared.one("PersistentVolumeClaim")["metadata"]["name"]
    assert volume(shared, "models") == {"name": "models", "persistentVolumeClaim": {"claimName": name}}
    assert not each.of("PersistentVolumeClaim")
    [template] = each.workload["spec"]["volumeClaimTemplates"]
    assert template["metadata"]["name"] == "models"
    assert template["spec"]["resources"]["requests"]["storage"] == "7Gi"
    assert not [v for v in each.pod["volumes"] if v["name"] == "models"]


def test_model_when_its_claim_is_kept_then_uninstalling_leaves_it() -> None:
    objects = render("model: {storage: {kind: claim, claim: {keep: true}}}")

    assert objects.one("PersistentVolumeClaim")["metadata"]["annotations"] == {
        "helm.sh/resource-policy": "keep"
    }


def test_model_when_copied_from_a_bucket_then_only_the_copying_may_write() -> None:
    objects = render(
        "config: {model: {id: /models/minilm}}",
        "{model: {storage: {readOnly: true, kind: existingClaim, existingClaim: m}, "
        "download: {source: ':s3,env_auth:bucket/minilm', envFrom: [{secretRef: {name: bucket}}]}}}",
    )
    download = container(objects.pod, "download-model")

    assert download["args"][:3] == ["copy", ":s3,env_auth:bucket/minilm", "/models/minilm"]
    assert download["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    assert "readOnly" not in mount(download, "models")
    assert mount(objects.worker, "models")["readOnly"] is True
    assert volume(objects, "models")["persistentVolumeClaim"] == {"claimName": "m"}


def test_hub_when_offline_or_with_a_token_then_the_environment_says_so() -> None:
    offline = env_of(render("{model: {offline: true}, config: {model: {id: 'package:minilm'}}}").worker)
    token = env_of(
        render("{secrets: {hub: {existingSecret: hub}}, model: {hubEndpoint: 'https://hub.local'}}").worker
    )

    assert offline["HF_HUB_OFFLINE"] == offline["TRANSFORMERS_OFFLINE"] == "1"
    assert token["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert token["HF_ENDPOINT"] == "https://hub.local"
    assert "HF_HUB_OFFLINE" not in token


# ---- scaling


@pytest.mark.parametrize(
    "scaler", [KEDA, "autoscaling: {enabled: true, maxReplicas: 4, metrics: [{type: External}]}"]
)
def test_replicas_when_something_scales_then_the_chart_does_not_set_them(scaler: str) -> None:
    assert "replicas" not in render(scaler).workload["spec"]
    assert render("workload: {replicas: 0}").workload["spec"]["replicas"] == 0


def test_keda_when_there_are_several_topics_then_each_is_a_trigger_of_texts() -> None:
    objects = render(
        KEDA, "config: {input: {topics: 'one, two'}, kafka: {bootstrap_servers: 'a:1,b:2', group_id: g}}"
    )
    triggers = objects.one("ScaledObject")["spec"]["triggers"]

    assert [trigger["metadata"]["topic"] for trigger in triggers] == ["one", "two"]
    for trigger in triggers:
        assert trigger["metadata"]["bootstrapServers"] == "a:1,b:2"
        assert trigger["metadata"]["consumerGroup"] == "g"
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        assert "authenticationRef" not in trigger
    assert not objects.of("TriggerAuthentication")


@pytest.mark.parametrize(
    ("start", "policy"), [("earliest", "earliest"), ("latest", "latest"), ("error", "earliest")]
)
def test_keda_when_the_worker_starts_somewhere_then_it_counts_from_there(start: str, policy: str) -> None:
    [trigger] = render(KEDA, {"config": {"input": {"start": start}}}).one("ScaledObject")["spec"]["triggers"]

    assert trigger["metadata"]["offsetResetPolicy"] == policy


@pytest.mark.parametrize(
    ("mechanism", "name"),
    [("PLAIN", "plaintext"), ("SCRAM-SHA-256", "scram_sha256"), ("SCRAM-SHA-512", "scram_sha512")],
)
def test_keda_when_kafka_wants_sasl_then_it_has_the_workers_secrets(mechanism: str, name: str) -> None:
    objects = render(KEDA, SASL, {"config": {"kafka": {"security": {"mechanism": mechanism}}}})
    [trigger] = objects.one("ScaledObject")["spec"]["triggers"]
    authentication = objects.one("TriggerAuthentication")

    assert (trigger["metadata"]["sasl"], trigger["metadata"]["tls"]) == (name, "enable")
    assert trigger["authenticationRef"] == {"name": authentication["metadata"]["name"]}
    assert authentication["spec"]["secretTargetRef"] == [
        {"parameter": "password", "name": "kafka", "key": "password"},
        {"parameter": "ca", "name": "authorities", "key": "ca.pem"},
    ]
    [user] = authentication["spec"]["configMapTargetRef"]
    [configured] = [thing for thing in objects.of("ConfigMap") if thing["metadata"]["name"] == user["name"]]
    assert configured["data"][user["key"]] == "worker"


def test_keda_when_it_has_its_own_authentication_then_the_chart_makes_none() -> None:
    objects = render(
        KEDA, SASL, "keda: {authenticationRef: {name: mine, kind: ClusterTriggerAuthentication}}"
    )
    [trigger] = objects.one("ScaledObject")["spec"]["triggers"]

    assert trigger["authenticationRef"] == {"name": "mine", "kind": "ClusterTriggerAuthentication"}
    assert not objects.of("TriggerAuthentication")


# ---- what stands beside


def with_files(folder: Path, **files: str) -> Path:
    """The chart with rules and dashboards in it."""
    chart = folder / "inferstream"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("files"))
    for name, text in files.items():
        kind, _, stem = name.partition("_")
        path = chart / "files" / kind / (stem + {"rules": ".yaml", "dashboards": ".json"}[kind])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return chart


MONITORED = "metrics: {prometheusRule: {enabled: true}, dashboards: {enabled: true}}"


def test_rules_and_dashboards_when_there_are_none_then_nothing_is_rendered(tmp_path: Path) -> None:
    objects = render(MONITORED, chart=with_files(tmp_path))

    assert not objects.of("PrometheusRule")
    assert len(objects.of("ConfigMap")) == 1


def test_rules_and_dashboards_when_there_are_some_then_they_arrive_as_they_are(tmp_path: Path) -> None:
    alert = {
        "alert": "Lag",
        "expr": "up > 0",
        "annotations": {"summary": "{{ $labels.topic }} of {{ $value }}"},
    }
    dashboard = json.dumps(
        {"title": "Flow", "panels": [{"legend": "{{topic}}", "text": "a\nb: `c`"}]}, indent=2
    )
    chart = with_files(
        tmp_path,
        rules_alerts=yaml.safe_dump({"groups": [{"name": "one", "rules": [alert]}]}),
        rules_recorded=yaml.safe_dump(
            {"groups": [{"name": "two", "rules": [{"record": "a:b", "expr": "1"}]}]}
        ),
        rules_tests=yaml.safe_dump({"rule_files": ["alerts.yaml"], "tests": []}),
        dashboards_Data_flow=dashboard,
    )

    objects = render(MONITORED, chart=chart)

    groups = objects.one("PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in groups] == ["one", "two"]
    assert groups[0]["rules"] == [alert]
    [found] = [thing for thing in objects.of("ConfigMap") if "dashboard" in thing["metadata"]["name"]]
    assert found["metadata"]["name"] == "x-inferstream-dashboard-data-flow"
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["Data_flow.json"]) == json.loads(dashboard)


def test_files_when_the_chart_has_them_then_each_becomes_a_rule_or_a_dashboard() -> None:
    objects = render(MONITORED)
    dashboards = [thing for thing in objects.of("ConfigMap") if "-dashboard-" in thing["metadata"]["name"]]

    assert len(dashboards) == len(list((CHART / "files/dashboards").glob("*.json")))
    for dashboard in dashboards:
        assert len(yaml.safe_dump(dashboard)) < 1_000_000  # what etcd takes
        [(name, text)] = dashboard["data"].items()
        assert json.loads(text) == json.loads((CHART.parents[1] / "ops/grafana" / name).read_text())
    assert bool(objects.of("PrometheusRule")) == bool(list((CHART / "files/rules").glob("*.y*ml")))


def alerts_of(*changes: str) -> set[str]:
    groups = render(MONITORED, *changes).one("PrometheusRule")["spec"]["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def test_rules_when_rendered_then_they_are_those_that_promtool_tests() -> None:
    groups = yaml.safe_load((CHART.parents[1] / "ops/prometheus/rules.yml").read_text())["groups"]

    assert render(MONITORED).one("PrometheusRule")["spec"]["groups"] == groups


def test_alerts_when_disabled_or_meant_then_they_alone_are_left_out() -> None:
    everything = alerts_of()
    spare = "InferstreamWorkerWithoutPartitions"

    assert everything - alerts_of(f"metrics: {{prometheusRule: {{disabled: [{spare}]}}}}") == {spare}
    assert alerts_of(KEDA) == everything
    assert everything - alerts_of(KEDA, "keda: {minReplicaCount: 0}") == {"InferstreamAbsent"}
    assert everything - alerts_of(KEDA, "keda: {idleReplicaCount: 0}") == {"InferstreamAbsent"}
    assert alerts_of("keda: {minReplicaCount: 0}") == everything  # nothing scales here


def test_monitor_when_enabled_then_its_selector_and_port_find_the_pods() -> None:
    for kind, key in (("ServiceMonitor", "endpoints"), ("PodMonitor", "podMetricsEndpoints")):
        objects = render({"metrics": {kind[0].lower() + kind[1:]: {"enabled": True}}})
        spec = objects.one(kind)["spec"]
        labels = {
            "ServiceMonitor": objects.one("Service")["metadata"]["labels"],
            "PodMonitor": objects.workload["spec"]["template"]["metadata"]["labels"],
        }[kind]

        assert spec["selector"]["matchLabels"].items() <= labels.items()
        assert spec[key] == [{"port": "metrics", "path": "/metrics"}]
        assert [port["name"] for port in objects.worker["ports"]] == ["metrics"]


def test_selectors_when_hooks_run_then_their_pods_are_taken_for_no_worker() -> None:
    objects = render("{topics: {create: true}, networkPolicy: {enabled: true}}")
    selectors = [
        objects.workload["spec"]["selector"]["matchLabels"],
        objects.one("Service")["spec"]["selector"],
        objects.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        *(each["spec"]["podSelector"]["matchLabels"] for each in policies_of(objects, "x-inferstream")),
    ]
    pods = [pod["metadata"]["labels"] for pod in objects.of("Pod")]
    pods += [job["spec"]["template"]["metadata"]["labels"] for job in objects.of("Job")]

    assert len(pods) == 3
    for selector in selectors:
        assert selector.items() <= objects.workload["spec"]["template"]["metadata"]["labels"].items()
        assert not [labels for labels in pods if selector.items() <= labels.items()]


def test_topics_job_when_it_runs_before_the_release_then_its_settings_are_there_before_it() -> None:
    objects = render("topics: {create: true, partitions: 12, replication: 3}")
    [job] = objects.of("Job")
    [settings] = [thing for thing in objects.of("ConfigMap") if is_hook(thing)]
    [command] = job["spec"]["template"]["spec"]["containers"]

    assert command["args"] == [
        "topics",
        "create",
        "--config=/etc/inferstream/config.yaml",
        "--partitions=12",
        "--replication=3",
    ]
    weights = [int(thing["metadata"]["annotations"]["helm.sh/hook-weight"]) for thing in (settings, job)]
    assert weights == sorted(set(weights))
    assert settings["data"]["config.yaml"].strip() == objects.config.strip()
    assert settings["metadata"]["name"] in str(job["spec"]["template"]["spec"]["volumes"])
    assert "serviceAccountName" not in job["spec"]["template"]["spec"]  # the release's is not there yet


@pytest.mark.parametrize(
    ("values", "ports"),
    [
        ("{}", [9092, 443]),
        ("config: {kafka: {bootstrap_servers: ['[::1]:9094', 'b:9095', 'c:9094']}}", [9094, 9095, 443]),
        (
            "{networkPolicy: {kafkaPorts: [1234]}, model: {offline: true}, config: {model: {id: 'package:m'}}}",
            [1234],
        ),
        ("model: {hubEndpoint: 'https://hub.example.com:8443'}", [9092, 8443]),
        ("model: {hubEndpoint: 'http://hub.example.com/mirror'}", [9092, 80]),
        ("model: {hubEndpoint: 'http://[::1]'}", [9092, 80]),
        (
            "{model: {download: {source: ':s3:b'}, offline: true}, config: {model: {id: /models/m}}}",
            [9092, 443],
        ),
        (
            "{model: {download: {source: ':s3:b'}, hubEndpoint: 'http://h:81'}, config: {model: {id: /models/m}}}",
            [9092, 81, 443],
        ),
    ],
)
def test_network_policy_when_enabled_then_it_lets_out_what_the_settings_name(
    values: str, ports: list[int]
) -> None:
    [policy] = policies_of(render("networkPolicy: {enabled: true}", values), "x-inferstream")

    out = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]

    assert out == [53, 53, *ports]


def test_names_when_long_then_what_is_derived_from_them_still_fits() -> None:
    objects = render(
        KEDA,
        release="a" * 53,
        base={**yaml.safe_load((CHART / "ci/minimal-values.yaml").read_text()), "nameOverride": "b" * 63},
    )
    name = objects.workload["metadata"]["name"]

    assert len(f"keda-hpa-{objects.one('ScaledObject')['metadata']['name']}") <= 63
    assert len(f"{name}-{'0' * 10}") <= 63  # a StatefulSet's label controller-revision-hash
    for thing in objects.all:
        assert all(len(value) <= 63 for value in thing["metadata"]["labels"].values())


def test_spread_when_a_constraint_has_no_selector_then_it_gets_the_workloads() -> None:
    mine = {
        "topologyKey": "zone",
        "maxSkew": 1,
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"a": "b"}},
    }
    objects = render({"topologySpreadConstraints": [{**mine, "labelSelector": None}, mine]})

    first, second = objects.pod["topologySpreadConstraints"]

    assert first["labelSelector"]["matchLabels"] == objects.workload["spec"]["selector"]["matchLabels"]
    assert second == mine
