"""What the chart refuses, and that the refusal names the value and says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from inferstream.settings import SETTINGS
from tests.helm.chart import CHART, MAJORS, refusal, render

SASL = """
config: {kafka: {security: {protocol: SASL_SSL, mechanism: SCRAM-SHA-512, username: worker}}}
secrets: {kafka: {sasl: {existingSecret: kafka}}}
"""
KEDA = "keda: {enabled: true, maxReplicaCount: 4}"
HPA = "autoscaling: {enabled: true, maxReplicas: 4, metrics: [{type: External}]}"


def tree_of(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


# What is given → what the refusal must name.  The first text is laid over the least values, and so on.
SENTENCES: dict[str, tuple[tuple[str | dict[str, Any], ...], tuple[str, ...]]] = {
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
    **{
        f"{name} for all pods": (
            (f"extraEnv: [{{name: INFERSTREAM_KAFKA__{name}, value: a}}]",),
            (f"INFERSTREAM_KAFKA__{name} in extraEnv", "workload.kind"),
        )
        for name in ("GROUP_INSTANCE_ID", "TRANSACTIONAL_ID")
    },
    "static members of a group that the chart does not know": (
        ("workload: {kind: StatefulSet}", "extraEnv: [{name: INFERSTREAM_KAFKA__GROUP_ID, value: a}]"),
        ("INFERSTREAM_KAFKA__GROUP_ID in extraEnv", "set config.kafka.group_id"),
    ),
    "a download of a model that the chart does not know": (
        (
            "{model: {download: {source: ':s3:bucket/minilm'}}, config: {model: {id: /models/minilm}}}",
            "extraEnv: [{name: INFERSTREAM_MODEL__ID, value: /models/other}]",
        ),
        ("INFERSTREAM_MODEL__ID in extraEnv", "set config.model.id"),
    ),
    **{
        f"{name} in plain text": (
            (f"extraEnv: [{{name: {name}, value: hunter2}}]",),
            (f"{name} in extraEnv is a secret by its name", "valueFrom.secretKeyRef"),
        )
        for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "CLIENT_SECRET")
    },
    "a key of the bucket in plain text": (
        ("model: {download: {env: [{name: RCLONE_S3_SECRET_ACCESS_KEY, value: hunter2}]}}",),
        ("RCLONE_S3_SECRET_ACCESS_KEY in model.download.env", "valueFrom.secretKeyRef"),
    ),
    "a key of the bucket in its name": (
        (
            "config: {model: {id: /models/minilm}}",
            "model: {download: {source: ':s3,provider=AWS,secret_access_key=hunter2:b/m'}}",
        ),
        ("model.download.source holds a secret", "env_auth", "envFrom"),
    ),
    "a key of the bucket as an argument": (
        (
            "config: {model: {id: /models/minilm}}",
            "model: {download: {source: ':s3:b/m', extraArgs: [--s3-secret-access-key=hunter2]}}",
        ),
        ("model.download.extraArgs --s3-secret-access-key is a secret", "model.download.env"),
    ),
    "no group": (("config: {kafka: {group_id: null}}",), ("config.kafka.group_id must not be empty",)),
    "a broker in every pod": (
        ("config: {kafka: {bootstrap_servers: embedded}}",),
        ("config.kafka.bootstrap_servers embedded", "real Kafka"),
    ),
    "a broker without a port, in a text": (
        ("{config: {kafka: {bootstrap_servers: 'a:1, kafka'}}, networkPolicy: {enabled: true}}",),
        ("config.kafka.bootstrap_servers: kafka is not a broker", "HOST:PORT"),
    ),
    "a broker's port that is none, in JSON": (
        ({"config": {"kafka": {"bootstrap_servers": '["a:1", "b:65536"]'}}},),
        ("config.kafka.bootstrap_servers: b:65536 is not a broker",),
    ),
    "a topic with a space, in a text": (
        ("config: {input: {topics: 'a b,c'}}",),
        ("config.input.topics: a b is not a topic", "letters"),
    ),
    "a topic twice": (("config: {input: {topics: [a, b, a]}}",), ("config.input.topics", "twice")),
    "no name left for dead letters": (
        ({"config": {"output": {"topic": "x" * 237}}},),
        ("config.dead_letter.topic is required", "249"),
    ),
    "documents larger than a batch": (
        ("config: {model: {max_length: 512}, batch: {max_tokens: 511}}",),
        ("config.batch.max_tokens 511", "config.model.max_length 512"),
    ),
    "a window smaller than a batch": (
        ("config: {batch: {max_tokens: 1025}, buffer: {max_tokens: 1024}}",),
        ("config.buffer.max_tokens 1024", "config.batch.max_tokens 1025"),
    ),
    "half precision on the CPU": (
        ("config: {model: {device: cpu, dtype: float16}}",),
        ("config.model.dtype float16", "config.model.device cpu"),
    ),
    "the second of one GPU": (
        ("{gpu: {enabled: true}, config: {model: {device: 'cuda:1'}}}",),
        ("config.model.device is cuda:1", "cuda:0"),
    ),
    "upper case in an image's name": (
        ("image: {repository: registry.example.com/Inferstream}",),
        ("image.repository registry.example.com/Inferstream", "lower case"),
    ),
    "a tag in an image's name": (
        ("image: {repository: 'registry.example.com/inferstream:1.0'}",),
        ("image.repository registry.example.com/inferstream:1.0", "image.tag"),
    ),
    **{
        f"{where} that pods are found by": (
            (tree_of(where, {"app.kubernetes.io/name": "a"}),),
            (f"{where} must not set app.kubernetes.io/name", "nameOverride"),
        )
        for where in ("commonLabels", "podLabels", "service.labels", "metrics.serviceMonitor.labels")
    },
    "labels of the chart": (
        ("commonLabels: {helm.sh/chart: a}",),
        ("commonLabels must not set helm.sh/chart", "leave it out"),
    ),
    "a rollout of a StatefulSet": (
        ("workload: {kind: StatefulSet, strategy: Recreate, maxUnavailable: 50%}",),
        ("workload.strategy Recreate", "workload.maxUnavailable 50%", "no effect", "StatefulSet"),
    ),
    "a model in an empty folder": (
        ("config: {model: {id: /models/minilm}}",),
        ("config.model.id /models/minilm", "empty in every new pod", "model.download", "existingClaim"),
    ),
    "offline and a new claim": (
        ("model: {offline: true, storage: {kind: claim}}",),
        ("model.offline finds no model", "a claim that the chart makes", "upgrade"),
    ),
    "models where the chart has its own": (
        ("model: {storage: {mountPath: /cache}}",),
        ("model.storage.mountPath /cache", "/models"),
    ),
    "volumes of the chart's names": (
        (
            "{extraVolumes: [{name: tmp, emptyDir: {}}], extraVolumeMounts: [{name: tmp, mountPath: /tmp}]}",
            "shm: {enabled: true}",
        ),
        ("extraVolumes has a volume tmp", "extraVolumeMounts has a mountPath /tmp", "shm"),
    ),
    "a claim for one pod": (
        (
            "model: {storage: {kind: claim, claim: {accessModes: [ReadWriteOncePod]}}}",
            "workload: {replicas: 2}",
        ),
        ("ReadWriteOncePod", "ReadWriteMany"),
    ),
    "a Job that asks for more than it may have": (
        ("topics: {resources: {requests: {memory: 1073741824}}}",),
        ("topics.resources.requests.memory", "topics.resources.limits.memory 512Mi"),
    ),
    "a download that asks for more than it may have": (
        ("model: {download: {resources: {requests: {cpu: 2001m}}}}",),
        ("model.download.resources.requests.cpu 2001m",),
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
    "two passwords": (
        (
            SASL,
            "extraEnv: [{name: INFERSTREAM_KAFKA__SECURITY__PASSWORD, valueFrom: {}}]",
        ),
        ("INFERSTREAM_KAFKA__SECURITY__PASSWORD in extraEnv", "secrets.kafka.sasl.existingSecret", "use one"),
    ),
    "a certificate by the chart and by hand": (
        (
            "{config: {kafka: {security: {protocol: SSL}}}, secrets: {kafka: {client: {existingSecret: a}}}}",
            "extraEnv: [{name: INFERSTREAM_KAFKA__SECURITY__CERT_FILE, value: /x}]",
        ),
        ("INFERSTREAM_KAFKA__SECURITY__CERT_FILE in extraEnv", "secrets.kafka.client", "use one"),
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
        ("INFERSTREAM_INPUT__TOPICS in extraEnv is not seen by KEDA", "set config.input.topics"),
    ),
    "KEDA without brokers": (
        (KEDA, "extraEnv: [{name: INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS, value: 'a:1'}]"),
        ("INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS in extraEnv", "or keda.kafka.bootstrapServers"),
    ),
    "KEDA without password": (
        (
            KEDA,
            SASL,
            "{secrets: {kafka: {sasl: {existingSecret: ''}}}, config: {kafka: {security: {password_file: /x}}}}",
        ),
        ("config.kafka.security.password_file", "KEDA cannot read", "keda.authenticationRef"),
    ),
    "KEDA without user": (
        (
            KEDA,
            SASL,
            "config: {kafka: {security: {username: null}}}",
            "extraEnv: [{name: INFERSTREAM_KAFKA__SECURITY__USERNAME, value: a}]",
        ),
        ("INFERSTREAM_KAFKA__SECURITY__USERNAME in extraEnv is not seen by KEDA", "keda.authenticationRef"),
    ),
    "KEDA and files": (
        (KEDA, "config: {kafka: {security: {protocol: SSL, ca_file: /x}}}"),
        ("config.kafka.security.ca_file", "KEDA cannot read", "secrets.kafka"),
    ),
    "KEDA and a group it does not see": (
        (KEDA, "extraEnv: [{name: INFERSTREAM_KAFKA__GROUP_ID, value: a}]"),
        ("INFERSTREAM_KAFKA__GROUP_ID in extraEnv is not seen by KEDA", "set config.kafka.group_id"),
    ),
    "KEDA and a start it does not see": (
        (KEDA, "extraEnv: [{name: INFERSTREAM_INPUT__START, value: latest}]"),
        ("INFERSTREAM_INPUT__START in extraEnv", "set config.input.start"),
    ),
    "KEDA and a mechanism it does not see": (
        (
            KEDA,
            SASL,
            "{config: {kafka: {security: {mechanism: null}}}, keda: {authenticationRef: {name: a}}}",
            "extraEnv: [{name: INFERSTREAM_KAFKA__SECURITY__MECHANISM, value: PLAIN}]",
        ),
        ("INFERSTREAM_KAFKA__SECURITY__MECHANISM in extraEnv", "set config.kafka.security.mechanism"),
    ),
    "KEDA blind and out of bounds": (
        (KEDA, "keda: {fallback: {replicas: 5}}"),
        ("keda.fallback.replicas 5", "keda.maxReplicaCount 4"),
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
    "config: {kafka: {bootstrap_servers: [kafka]}}": ("config.kafka.bootstrap_servers.0", "'kafka'"),
    "config: {kafka: {security: {mechanism: OAUTHBEARER}}}": ("config.kafka.security.mechanism", "PLAIN"),
    "config: {input: {topics: [a b]}}": ("config.input.topics.0", "'a b'"),
    "config: {input: {text_field: text.x}}": ("config.input.text_field", "'text.x'"),
    "config: {output: {topic: ..}}": ("config.output.topic", "'..'"),
    "config: {dead_letter: {topic: a/b}}": ("config.dead_letter.topic", "'a/b'"),
    "config: {model: {device: 'cuda:x'}}": ("config.model.device", "'cuda:x'"),
    "commonLabels: {team: search and more}": ("commonLabels.team", "pattern"),
    "podLabels: {a b: c}": ("podLabels", "'a b'"),
    "resources: {limits: {memory: 4GB}}": ("resources.limits.memory", "'4GB'"),
    "resources: {limits: {gpu: 1}}": ("resources.limits", "'gpu'"),
    "model: {download: {resources: {limits: {cpu: two}}}}": (
        "model.download.resources.limits.cpu",
        "pattern",
    ),
    "topics: {resources: {limits: {memory: 512 Mi}}}": ("topics.resources.limits.memory", "pattern"),
    "keda: {authenticationRef: {kind: ClusterTriggerAuthentication}}": ("keda.authenticationRef", "name"),
    "replicas: 3": ("", "replicas"),
    "image: {tag: 'a b'}": ("image.tag", "pattern"),
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
    assert "hunter2" not in message
    assert "error calling" not in message


@pytest.mark.parametrize("change", WRONG_VALUES)
def test_value_when_wrong_then_it_is_refused_by_name(change: str) -> None:
    path, said = WRONG_VALUES[change]

    message = refusal(change)

    assert at(path) in message, message
    assert said in message, message


@pytest.mark.parametrize("major", MAJORS)
def test_values_when_several_are_wrong_then_each_is_named(major: str) -> None:
    # Without those that give the same value as another.
    several = ("{kafka: {", "image", "extraEnv", "config: {", "resources", "authenticationRef")
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
    message = refusal(tree_of(f"config.{key}", "hunter2"))

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


def values_below(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{path}{name}", value
        if isinstance(value, dict):
            yield from values_below(value, f"{path}{name}.")


DEFAULTS = dict(values_below(yaml.safe_load((CHART / "values.yaml").read_text())))
SECTIONS = {f"config.{key.rsplit('.', 1)[0]}" for key in SETTINGS}
MAPPINGS = sorted({path for path, value in DEFAULTS.items() if isinstance(value, dict)} | SECTIONS)
# Whole parts of objects, which pods and scalers may as well be without; only a null says so.  And sections that have no
# default here, which are nothing to the service where they are null; but for the one of which that would be a risk.
MAY_BE_NULL = (
    *sorted(SECTIONS - set(DEFAULTS) - {"config.kafka.security"}),
    *("podSecurityContext", "securityContext", "keda.fallback", "keda.behavior", "autoscaling.behavior"),
    *(
        f"{where}resources.{what}"
        for where in ("", "model.download.", "topics.")
        for what in ("requests", "limits")
    ),
)


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("path", MAPPINGS)
def test_mapping_when_null_then_it_is_refused_by_name_or_left_out(path: str, major: str) -> None:
    nothing = tree_of(path, None)

    if path.startswith(MAY_BE_NULL):
        assert render(nothing, major=major).worker
    else:
        message = refusal(nothing, major=major)
        assert f"{path} must not be null: leave it out or give it {{}}." in message
        assert message.count("must not be null") == 1


@pytest.mark.parametrize("major", MAJORS)
def test_lists_and_values_when_null_then_each_is_refused_by_name(major: str) -> None:
    empty = (None, "")  # already by default
    paths = [
        path
        for path, value in DEFAULTS.items()
        if value not in empty
        and path not in MAPPINGS
        and not path.startswith((*MAY_BE_NULL, "config.", "metrics.dashboards.labels."))
    ]

    message = refusal(*(tree_of(path, None) for path in paths), major=major)

    assert len(paths) > 80
    assert [path for path in paths if f"{path} must not be null: leave it out" not in message] == []


def test_templates_when_rendered_then_what_refuses_values_comes_first() -> None:
    templates = CHART / "templates"

    paths = [path.relative_to(templates) for path in templates.rglob("*") if path.is_file()]

    # Helm's engine sorts by depth, then by name, and begins at the end.
    assert max(paths, key=lambda path: (len(path.parts), str(path))).as_posix() == "validate/first.yaml"
