"""What the chart refuses, and that the refusal names the value and says what to do."""

from __future__ import annotations

import pytest

from inferstream.settings import SETTINGS
from tests.helm.chart import MAJORS, refusal

SASL = """
config: {kafka: {security: {protocol: SASL_SSL, mechanism: SCRAM-SHA-512, username: worker}}}
secrets: {kafka: {sasl: {existingSecret: kafka}}}
"""
KEDA = "keda: {enabled: true, maxReplicaCount: 4}"
HPA = "autoscaling: {enabled: true, maxReplicas: 4, metrics: [{type: External}]}"

# What is given → what the refusal must name.  The first text is laid over the least values, and so on.
SENTENCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no image": (
        ("image: {repository: ''}",),
        ("image.repository is empty", "docker push", "kind load", "k3d image import"),
    ),
    "no brokers": (
        ("config: {kafka: {bootstrap_servers: []}}",),
        ("config.kafka.bootstrap_servers is required", "extraEnv"),
    ),
    "no input": (("config: {input: {topics: null}}",), ("config.input.topics is required",)),
    "no output": (("config: {output: {topic: null}}",), ("config.output.topic is required",)),
    "one id for all": (
        ("config: {kafka: {group_instance_id: a}}",),
        ("config.kafka.group_instance_id", "StatefulSet"),
    ),
    "one transactional id": (
        ("config: {kafka: {transactional_id: a}}",),
        ("config.kafka.transactional_id", "fence"),
    ),
    "no port": (("config: {telemetry: {port: 0}}",), ("config.telemetry.port", "probes")),
    "only from inside": (("config: {telemetry: {host: 127.0.0.1}}",), ("config.telemetry.host", "0.0.0.0")),
    "no host": (("config: {telemetry: {host: null}}",), ("config.telemetry.host", "0.0.0.0")),
    "a drain that the chart does not know": (
        ("extraEnv: [{name: INFERSTREAM_DELIVERY__DRAIN_TIMEOUT_S, value: '600'}]",),
        ("INFERSTREAM_DELIVERY__DRAIN_TIMEOUT_S in extraEnv", "set config.delivery.drain_timeout_s"),
    ),
    "no mechanism": (
        (SASL, "config: {kafka: {security: {mechanism: null}}}"),
        ("config.kafka.security.mechanism is required",),
    ),
    "no user": (
        (SASL, "config: {kafka: {security: {username: null}}}"),
        ("config.kafka.security.username is required",),
    ),
    "no password": (
        (SASL, "secrets: {kafka: {sasl: {existingSecret: ''}}}"),
        ("secrets.kafka.sasl.existingSecret is required",),
    ),
    "two users": (
        (SASL, "secrets: {kafka: {sasl: {usernameKey: user}}}"),
        ("secrets.kafka.sasl.usernameKey", "use one"),
    ),
    "a key of nothing": (
        ("secrets: {kafka: {sasl: {usernameKey: user}}}",),
        ("secrets.kafka.sasl.existingSecret, which is empty",),
    ),
    "password without SASL": (
        ("secrets: {kafka: {sasl: {existingSecret: kafka}}}",),
        ("secrets.kafka.sasl.existingSecret", "PLAINTEXT"),
    ),
    "authorities without TLS": (
        ("secrets: {kafka: {ca: {existingSecret: ca}}}",),
        ("secrets.kafka.ca.existingSecret", "PLAINTEXT"),
    ),
    "certificate without TLS": (
        ("secrets: {kafka: {client: {existingSecret: c}}}",),
        ("secrets.kafka.client.existingSecret", "PLAINTEXT"),
    ),
    "two authorities": (
        (
            "config: {kafka: {security: {protocol: SSL}}}",
            "secrets: {kafka: {ca: {existingSecret: a, existingConfigMap: b}}}",
        ),
        ("secrets.kafka.ca.existingSecret and existingConfigMap",),
    ),
    "two password files": (
        (SASL, "config: {kafka: {security: {password_file: /x}}}"),
        ("config.kafka.security.password_file",),
    ),
    "no claim": (("model: {storage: {kind: existingClaim}}",), ("model.storage.existingClaim is required",)),
    "a claim for nothing": (
        ("model: {storage: {existingClaim: models}}",),
        ("model.storage.existingClaim", "kind"),
    ),
    "read-only and empty": (("model: {storage: {readOnly: true}}",), ("model.storage.readOnly", "empty")),
    "read-only download": (
        ("model: {storage: {kind: existingClaim, existingClaim: models, readOnly: true}}",),
        ("model.storage.readOnly", "model.offline"),
    ),
    "offline and empty": (("model: {offline: true}",), ("model.offline finds no model",)),
    "offline with a token": (
        (
            "{model: {offline: true}, secrets: {hub: {existingSecret: hub}}}",
            "config: {model: {id: 'package:minilm'}}",
        ),
        ("secrets.hub.existingSecret has no use",),
    ),
    "a download beside the model": (
        ("model: {download: {source: ':s3:bucket/minilm'}}",),
        ("config.model.id must be the folder", "/models/NAME"),
    ),
    "a GPU for the CPU": (
        ("{gpu: {enabled: true}, config: {model: {device: cpu}}}",),
        ("config.model.device is cpu", "gpu.enabled"),
    ),
    "a GPU nobody asks for": (
        ("config: {model: {device: 'cuda:0'}}",),
        ("config.model.device is cuda:0", "gpu.enabled"),
    ),
    "a runtime for nothing": (("gpu: {runtimeClassName: nvidia}",), ("gpu.runtimeClassName",)),
    "too little grace": (
        ("workload: {terminationGracePeriodSeconds: 44}",),
        ("workload.terminationGracePeriodSeconds 44", "drain_timeout_s + 15 = 45"),
    ),
    "too little grace for a longer drain": (
        ("{workload: {terminationGracePeriodSeconds: 75}, config: {delivery: {drain_timeout_s: 60.5}}}",),
        ("= 76",),
    ),
    "more CPU asked for than allowed": (
        ("resources: {requests: {cpu: 4}}",),
        ("resources.requests.cpu 4 is above resources.limits.cpu 2", "set both"),
    ),
    "more memory asked for than allowed": (
        ("resources: {requests: {memory: 4097Mi}}",),
        ("resources.requests.memory 4097Mi is above resources.limits.memory 4Gi",),
    ),
    "two monitors": (
        ("metrics: {serviceMonitor: {enabled: true}, podMonitor: {enabled: true}}",),
        ("metrics.podMonitor.enabled", "twice"),
    ),
    "two scalers": ((KEDA, HPA), ("keda.enabled and autoscaling.enabled",)),
    "KEDA and static members": (
        (KEDA, "workload: {kind: StatefulSet}"),
        ("keda.enabled", "session timeout", "Deployment"),
    ),
    "HPA and static members": (
        (HPA, "workload: {kind: StatefulSet}"),
        ("autoscaling.enabled", "session timeout"),
    ),
    "KEDA without bound": (("keda: {enabled: true}",), ("keda.maxReplicaCount is required", "partitions")),
    "KEDA upside down": (
        (KEDA, "keda: {minReplicaCount: 5}"),
        ("keda.minReplicaCount 5", "keda.maxReplicaCount 4"),
    ),
    "KEDA idle as busy": (
        (KEDA, "keda: {minReplicaCount: 0, idleReplicaCount: 0}"),
        ("keda.idleReplicaCount 0", "below"),
    ),
    "KEDA without topics": (
        (KEDA, "{config: {input: {topics: []}}, extraEnv: [{name: INFERSTREAM_INPUT__TOPICS, value: a}]}"),
        ("keda.enabled needs config.input.topics",),
    ),
    "KEDA without brokers": (
        (KEDA, "config: {kafka: {bootstrap_servers: embedded}}"),
        ("keda.kafka.bootstrapServers is required",),
    ),
    "KEDA without password": (
        (
            KEDA,
            SASL,
            "{secrets: {kafka: {sasl: {existingSecret: ''}}}, config: {kafka: {security: {password_file: /x}}}}",
        ),
        ("keda.authenticationRef, is required",),
    ),
    "KEDA without user": (
        (
            KEDA,
            SASL,
            "config: {kafka: {security: {username: null}}}",
            "extraEnv: [{name: INFERSTREAM_KAFKA__SECURITY__USERNAME, value: a}]",
        ),
        ("secrets.kafka.sasl.usernameKey or keda.authenticationRef is required",),
    ),
    "KEDA and files": (
        (KEDA, "config: {kafka: {security: {protocol: SSL, ca_file: /x}}}"),
        ("config.kafka.security.ca_file", "KEDA cannot read", "secrets.kafka"),
    ),
    "KEDA and OAuth": (
        (KEDA, SASL, "config: {kafka: {security: {mechanism: OAUTHBEARER}}}"),
        ("OAUTHBEARER", "keda.authenticationRef"),
    ),
    "HPA without bound": (
        (HPA, "autoscaling: {maxReplicas: null}"),
        ("autoscaling.maxReplicas is required",),
    ),
    "HPA upside down": ((HPA, "autoscaling: {minReplicas: 5}"), ("autoscaling.minReplicas 5",)),
    "HPA without metrics": ((HPA, "autoscaling: {metrics: []}"), ("autoscaling.metrics is required", "lag")),
    "a policy without ports": (
        (
            "{networkPolicy: {enabled: true}, config: {kafka: {bootstrap_servers: []}}}",
            "extraEnv: [{name: INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS, value: a}]",
        ),
        ("networkPolicy.kafkaPorts is required",),
    ),
}

# What the schema refuses → the path and what must be said of it.
WRONG_VALUES: dict[str, tuple[str, str]] = {
    "config: {kafka: {group_ids: a}}": ("config.kafka", "group_ids"),
    "config: {batch: {max_tokens: lots}}": ("config.batch.max_tokens", ""),
    "config: {delivery: {drain_timeout_s: 0}}": ("config.delivery.drain_timeout_s", "0.1"),
    "config: {model: {dtype: float64}}": ("config.model.dtype", ""),
    "config: {kafka: {group_id: 7}}": ("config.kafka.group_id", "string"),
    "replicas: 3": ("", "replicas"),
    "image: {tag: 'a b'}": ("image.tag", "pattern"),
    "image: {repository: 'registry.example.com/inferstream:1.0'}": ("image.repository", "pattern"),
    "image: {digest: latest}": ("image.digest", "pattern"),
    "image: {pullPolicy: Sometimes}": ("image.pullPolicy", "Always"),
    "workload: {kind: DaemonSet}": ("workload.kind", "StatefulSet"),
    "workload: {replicas: -1}": ("workload.replicas", "0"),
    "workload: {maxUnavailable: 0}": ("workload.maxUnavailable", ""),
    "workload: {maxSurge: 1}": ("workload", "maxSurge"),
    "secrets: {kafka: {sasl: {existingSecret: Not_A_Name}}}": (
        "secrets.kafka.sasl.existingSecret",
        "pattern",
    ),
    "secrets: {kafka: {sasl: {passwordKey: ''}}}": ("secrets.kafka.sasl.passwordKey", "pattern"),
    "secrets: {kafka: {sasl: {password: hunter2}}}": ("secrets.kafka.sasl", "password"),
    "model: {storage: {kind: hostPath}}": ("model.storage.kind", "emptyDir"),
    "model: {storage: {sizeLimit: 20 GB}}": ("model.storage.sizeLimit", "pattern"),
    "model: {storage: {mountPath: models}}": ("model.storage.mountPath", "pattern"),
    "model: {storage: {mountPath: /models/}}": ("model.storage.mountPath", "pattern"),
    "gpu: {resourceName: gpu}": ("gpu.resourceName", "pattern"),
    "gpu: {counts: 2}": ("gpu", "counts"),
    "resources: {limit: {cpu: 1}}": ("resources", "limit"),
    "probes: {startup: {failureThreshold: 0}}": ("probes.startup.failureThreshold", "1"),
    "metrics: {serviceMonitor: {interval: soon}}": ("metrics.serviceMonitor.interval", "pattern"),
    "metrics: {prometheusRule: {disabled: [InferstreamAbsence]}}": (
        "metrics.prometheusRule.disabled.0",
        "InferstreamAbsent",
    ),
    "keda: {kafka: {lagThreshold: 0}}": ("keda.kafka.lagThreshold", "1"),
    "keda: {kafka: {lagThreshold: '10'}}": ("keda.kafka.lagThreshold", "integer"),
    "keda: {kafka: {activationLagThreshold: -1}}": ("keda.kafka.activationLagThreshold", "0"),
    "keda: {kafka: {partitionLimitation: 1-}}": ("keda.kafka.partitionLimitation", "pattern"),
    "keda: {kafka: {version: latest}}": ("keda.kafka.version", "pattern"),
    "keda: {kafka: {limitToPartitionsWithLag: true, allowIdleConsumers: true}}": (
        "keda.kafka.allowIdleConsumers",
        "false",
    ),
    "keda: {kafka: {limitToPartitionsWithLag: true, ensureEvenDistributionOfPartitions: true}}": (
        "keda.kafka.ensureEvenDistributionOfPartitions",
        "false",
    ),
    "keda: {fallback: {replicas: -1}}": ("keda.fallback.replicas", "0"),
    "keda: {fallback: {behavior: hope}}": ("keda.fallback.behavior", "static"),
    "keda: {idleReplicaCount: 1}": ("keda.idleReplicaCount", "0"),
    "keda: {authenticationRef: {secret: a}}": ("keda.authenticationRef", "secret"),
    "podDisruptionBudget: {maxUnavailable: 101%}": ("podDisruptionBudget.maxUnavailable", ""),
    "networkPolicy: {kafkaPorts: [kafka]}": ("networkPolicy.kafkaPorts.0", "integer"),
    "extraEnv: [{name: INFERSTREAM_KAFKA__GROUP, value: a}]": (
        "extraEnv.0.name",
        "INFERSTREAM_KAFKA__GROUP_ID",
    ),
    "extraEnv: [{name: INFERSTREAM_KAFKA__SECURITY__PASSWORD, value: a}]": ("extraEnv.0", "valueFrom"),
    "extraEnv: [{value: a}]": ("extraEnv.0", "name"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_values_when_they_cannot_be_together_then_a_sentence_says_so(name: str) -> None:
    changes, said = SENTENCES[name]

    message = refusal(*changes)

    assert all(part in message for part in said), message


@pytest.mark.parametrize("change", WRONG_VALUES)
def test_value_when_wrong_then_it_is_refused_by_name(change: str) -> None:
    path, said = WRONG_VALUES[change]

    message = refusal(change)

    assert at(path) in message, message
    assert said in message, message


@pytest.mark.parametrize("major", MAJORS)
def test_values_when_several_are_wrong_then_each_is_named(major: str) -> None:
    # Without those that give the same value as another.
    several = ("{kafka: {", "image", "extraEnv")
    changes = [change for change in WRONG_VALUES if not any(part in change for part in several)]
    paths = {WRONG_VALUES[change][0] for change in changes}

    message = refusal(*changes, major=major)

    assert len(paths) > 15
    assert [path for path in paths if at(path) not in message] == []


def at(path: str) -> str:
    """How Helm writes the path of a value."""
    return f"at '/{path.replace('.', '/')}'" if path else "at ''"


@pytest.mark.parametrize("key", [setting.key for setting in SETTINGS.values() if setting.is_secret])
def test_secret_when_it_stands_under_config_then_it_is_refused_by_name(key: str) -> None:
    tree: object = "hunter2"
    for name in reversed(key.split(".")):
        tree = {name: tree}

    message = refusal({"config": tree})

    assert f"config.{key} is a secret" in message
    assert "existingSecret" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("major", MAJORS)
def test_values_when_none_are_given_then_all_that_is_missing_is_said_at_once(major: str) -> None:
    message = refusal(base={}, major=major)

    for part in ("image.repository is empty", "kafka.bootstrap_servers", "input.topics", "output.topic"):
        assert part in message


def test_kubernetes_when_older_than_supported_then_the_chart_is_refused() -> None:
    assert "1.27" in refusal(kubernetes="1.26.15")
