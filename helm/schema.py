"""``python helm/schema.py`` writes helm/inferstream/values.schema.json, and what the templates refuse values by to
templates/_generated.tpl; ``--check`` says whether they are current.

Nothing in it is written twice: names and types are those of values.yaml, descriptions its ``# --`` comments, `config`
is the service's own settings tree, and RULES below says what a type alone cannot.  JSON Schema draft 7, as Helm 3
silently leaves out what later drafts added.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from inferstream.settings import SETTINGS, json_schema

CHART = Path(__file__).resolve().parent / "inferstream"
SCHEMA = CHART / "values.schema.json"
TEMPLATE = CHART / "templates" / "_generated.tpl"
RULES_FILE = CHART.parent.parent / "ops" / "prometheus" / "rules.yml"

QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[kMGTPE])?$"}
DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))*$"}
# The pods' resources, where numbers are as good as texts.
RESOURCE = {
    "type": ["string", "number"],
    "minimum": 0,
    "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGTPE]i|[kMGTPE])?$",
}
RESOURCE_NAME = r"^(cpu|memory|ephemeral-storage|hugepages-[0-9]+[KMGTPE]i|[a-z0-9.-]+/[a-zA-Z0-9._-]+)$"
# Names are patterns and no `propertyNames`, for which Helm tells another path than that of the value.
RESOURCE_LIST = {
    "type": "object",
    "additionalProperties": False,
    "patternProperties": {RESOURCE_NAME: RESOURCE},
}
RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "requests": RESOURCE_LIST,
        "limits": RESOURCE_LIST,
        "claims": {"type": "array", "items": {"type": "object"}},
    },
}
OBJECT_NAME = {"type": "string", "pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", "maxLength": 253}
LABEL_NAME = {"type": "string", "pattern": r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"}
SECRET_KEY = {"type": "string", "pattern": r"^[-._a-zA-Z0-9]+$"}
SECRET_KEY_OR_NONE = {"type": "string", "pattern": r"^[-._a-zA-Z0-9]*$"}
PULL_POLICY = {"enum": ["Always", "IfNotPresent", "Never"]}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
LABEL = r"[a-zA-Z0-9]([-a-zA-Z0-9_.]{0,61}[a-zA-Z0-9])?"
LABELS = {
    "type": "object",
    "additionalProperties": False,
    "patternProperties": {
        rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{LABEL}$": {"type": "string", "pattern": f"^({LABEL})?$"}
    },
}
ANY_OBJECT = {"type": "object"}
OBJECTS = {"type": "array", "items": {"type": "object"}}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
POSITIVE_OR_NONE = {"type": ["integer", "null"], "minimum": 1}
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
]
PODS_OR_PERCENT = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^([1-9][0-9]?|100)%$"},
    ]
}
FALSE = {"const": False}

# What looks like a setting must be one, and what is a secret must not stand here itself.
VARIABLE = {
    "type": "object",
    "required": ["name"],
    "allOf": [
        {
            "if": {"properties": {"name": {"type": "string", "pattern": "^INFERSTREAM_.*__"}}},
            "then": {"properties": {"name": {"enum": [setting.variable for setting in SETTINGS.values()]}}},
        },
        {
            "if": {
                "properties": {
                    "name": {"enum": [setting.variable for setting in SETTINGS.values() if setting.is_secret]}
                }
            },
            "then": {"required": ["valueFrom"]},
        },
    ],
}

# Path in values.yaml → what is to be said of it.  A fragment replaces what its default value tells.
RULES: dict[str, dict[str, Any]] = (
    {
        "image.tag": {"type": "string", "pattern": r"^([a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?$"},
        "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
        "image.pullPolicy": PULL_POLICY,
        "image.pullSecrets": {
            "type": "array",
            "items": {"type": "object", "required": ["name"], "properties": {"name": OBJECT_NAME}},
        },
        "image.command": {"type": "array", "items": {"type": "string"}},
        "nameOverride": LABEL_NAME,
        "fullnameOverride": LABEL_NAME,
        "commonLabels": LABELS,
        "workload.kind": {"enum": ["Deployment", "StatefulSet"]},
        "workload.replicas": COUNT,
        "workload.strategy": {"enum": ["RollingUpdate", "Recreate"]},
        "workload.maxUnavailable": PODS_OR_PERCENT,
        "workload.revisionHistoryLimit": COUNT,
        "workload.terminationGracePeriodSeconds": POSITIVE_OR_NONE,
        "workload.annotations": TEXTS,
        "secrets.kafka.sasl.existingSecret": OBJECT_NAME,
        "secrets.kafka.sasl.passwordKey": SECRET_KEY,
        "secrets.kafka.sasl.usernameKey": SECRET_KEY_OR_NONE,
        "secrets.kafka.ca.existingSecret": OBJECT_NAME,
        "secrets.kafka.ca.existingConfigMap": OBJECT_NAME,
        "secrets.kafka.ca.key": SECRET_KEY,
        "secrets.kafka.client.existingSecret": OBJECT_NAME,
        "secrets.kafka.client.certKey": SECRET_KEY,
        "secrets.kafka.client.keyKey": SECRET_KEY,
        "secrets.kafka.client.keyPasswordKey": SECRET_KEY_OR_NONE,
        "secrets.hub.existingSecret": OBJECT_NAME,
        "secrets.hub.tokenKey": SECRET_KEY,
        "model.hubEndpoint": {"type": "string", "pattern": "^(https?://.+)?$"},
        "model.storage.kind": {"enum": ["emptyDir", "claim", "existingClaim"]},
        "model.storage.mountPath": {"type": "string", "pattern": "^(/[^/]+)+$"},
        "model.storage.subPath": {"type": "string", "pattern": "^([^/].*)?$"},
        "model.storage.sizeLimit": QUANTITY,
        "model.storage.existingClaim": OBJECT_NAME,
        "model.storage.claim.size": QUANTITY,
        "model.storage.claim.storageClassName": OBJECT_NAME,
        "model.storage.claim.accessModes": {
            "type": "array",
            "minItems": 1,
            "items": {"enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"]},
        },
        "model.storage.claim.annotations": TEXTS,
        "model.download.image": {"type": "string", "minLength": 1},
        "model.download.pullPolicy": PULL_POLICY,
        "model.download.extraArgs": {"type": "array", "items": {"type": "string"}},
        "model.download.resources": RESOURCES,
        "gpu.count": POSITIVE,
        "gpu.resourceName": {"type": "string", "pattern": r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$"},
        "gpu.runtimeClassName": OBJECT_NAME,
        "resources": RESOURCES,
        "shm.sizeLimit": QUANTITY,
        "scratch.tmpSizeLimit": QUANTITY,
        "scratch.cacheSizeLimit": QUANTITY,
        "nodeSelector": LABELS,
        "dnsPolicy": {"enum": ["", "ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
        "podSecurityContext": ANY_OBJECT,
        "securityContext": ANY_OBJECT,
        "podAnnotations": TEXTS,
        "podLabels": LABELS,
        "serviceAccount.name": OBJECT_NAME,
        "serviceAccount.annotations": TEXTS,
        "service.annotations": TEXTS,
        "service.labels": LABELS,
        "metrics.prometheusRule.labels": LABELS,
        "metrics.prometheusRule.runbookUrl": {"type": "string", "pattern": r"^(https?://[^\s#]+#?)?$"},
        "metrics.prometheusRule.disabled": {"type": "array", "items": {"enum": ALERTS}},
        "metrics.dashboards.labels": LABELS,
        "metrics.dashboards.annotations": TEXTS,
        "metrics.dashboards.namespace": LABEL_NAME,
        "keda.minReplicaCount": COUNT,
        "keda.maxReplicaCount": POSITIVE_OR_NONE,
        "keda.idleReplicaCount": {"type": ["integer", "null"], "minimum": 0, "maximum": 0},
        "keda.pollingInterval": POSITIVE,
        "keda.cooldownPeriod": COUNT,
        "keda.initialCooldownPeriod": COUNT,
        "keda.kafka.lagThreshold": POSITIVE,
        "keda.kafka.activationLagThreshold": COUNT,
        "keda.kafka.partitionLimitation": {
            "type": "string",
            "pattern": "^([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?$",
        },
        "keda.kafka.version": {"type": "string", "pattern": r"^([0-9]+\.[0-9]+(\.[0-9]+){0,2})?$"},
        "keda.authenticationRef": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "name": {**OBJECT_NAME, "minLength": 1},
                "kind": {"enum": ["TriggerAuthentication", "ClusterTriggerAuthentication"]},
            },
            "if": {"minProperties": 1},
            "then": {"required": ["name"]},
        },
        "keda.fallback": {
            "type": "object",
            "additionalProperties": False,
            "required": ["failureThreshold", "replicas"],
            "properties": {
                "failureThreshold": COUNT,
                "replicas": COUNT,
                "behavior": {
                    "enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]
                },
            },
        },
        "keda.behavior": ANY_OBJECT,
        "keda.annotations": TEXTS,
        "autoscaling.minReplicas": POSITIVE,
        "autoscaling.maxReplicas": POSITIVE_OR_NONE,
        "autoscaling.behavior": ANY_OBJECT,
        "podDisruptionBudget.maxUnavailable": PODS_OR_PERCENT,
        "podDisruptionBudget.unhealthyPodEvictionPolicy": {"enum": ["AlwaysAllow", "IfHealthyBudget"]},
        "networkPolicy.kafkaPorts": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 65535},
        },
        "topics.partitions": POSITIVE_OR_NONE,
        "topics.replication": POSITIVE_OR_NONE,
        "topics.resources": RESOURCES,
        "topics.annotations": TEXTS,
        "extraEnv": {"type": "array", "items": VARIABLE},
        "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
    }
    | {
        f"metrics.{monitor}.{name}": rule
        for monitor in ("serviceMonitor", "podMonitor")
        for name, rule in (("interval", DURATION), ("scrapeTimeout", DURATION), ("labels", LABELS))
    }
    | {
        f"probes.{probe}.{name}": POSITIVE
        for probe in ("startup", "liveness", "readiness")
        for name in ("periodSeconds", "failureThreshold", "timeoutSeconds")
    }
)

# What two values cannot be together, as KEDA's own Validate of its Kafka scaler refuses it.
EXCLUSIONS: dict[str, dict[str, Any]] = {
    "keda.kafka": {
        "if": {
            "properties": {"limitToPartitionsWithLag": {"const": True}},
            "required": ["limitToPartitionsWithLag"],
        },
        "then": {"properties": {"allowIdleConsumers": FALSE, "ensureEvenDistributionOfPartitions": FALSE}},
    }
}

# Whole parts of objects that one may want to be without, which only a null can say.
MAY_BE_NULL = (
    "podSecurityContext",
    "securityContext",
    "keda.fallback",
    "keda.behavior",
    "autoscaling.behavior",
    "resources.requests",
    "resources.limits",
    "model.download.resources.requests",
    "model.download.resources.limits",
    "topics.resources.requests",
    "topics.resources.limits",
    "metrics.dashboards.labels.grafana_dashboard",
)

# Values that Helm itself puts into a chart that is a part of another.
OF_PARENT_CHARTS = {
    "global": {"type": "object", "description": "Values that a parent chart shares with all of its charts."},
    "enabled": {"type": "boolean", "description": "For a parent chart's `condition`; not read here."},
}


def values_schema() -> dict[str, Any]:
    """The schema of values.yaml.  Raises ValueError for a rule about a value that is not there, and the reverse."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    comments = comments_of(text)
    unused = set(RULES) | set(EXCLUSIONS)
    schema = _object(yaml.safe_load(text), "", comments, unused)
    if unused:
        raise ValueError(f"rules about values that are not there: {', '.join(sorted(unused))}")
    schema["properties"] = {**schema["properties"], **OF_PARENT_CHARTS}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "inferstream", **schema}


def comments_of(text: str) -> dict[str, str]:
    """Path → the text of the ``# --`` comment above it, on one line."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*# ?(-- )?(.*)", line):
            if match[1]:
                comment = [match[2]]
            elif comment:
                comment.append(match[2])
            continue
        if match := re.match(r"( *)([A-Za-z_]+):", line):
            indent = len(match[1])
            path = [*((depth, name) for depth, name in path if depth < indent), (indent, match[2])]
            if comment:
                found[".".join(name for _, name in path)] = " ".join(comment)
        comment = []
    return found


def _object(values: dict[str, Any], path: str, comments: dict[str, str], unused: set[str]) -> dict[str, Any]:
    properties = {}
    for name, value in values.items():
        key = f"{path}{name}"
        described = {"description": comments[key]} if key in comments else {}
        properties[name] = {**described, **_leaf(key, value, comments, unused)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _leaf(key: str, value: Any, comments: dict[str, str], unused: set[str]) -> dict[str, Any]:
    if key == "config":
        return {"description": "The service's settings.", **_config()}
    if key in RULES:
        unused.discard(key)
        return RULES[key]
    if isinstance(value, dict) and value:
        unused.discard(key)
        return {**_object(value, f"{key}.", comments, unused), **EXCLUSIONS.get(key, {})}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, str):
        return {"type": "string"}
    if isinstance(value, list):
        return OBJECTS
    if isinstance(value, dict):
        return ANY_OBJECT
    raise ValueError(f"{key}: its default {value!r} does not tell what it may be; say it in RULES")


def _config() -> dict[str, Any]:
    """The settings tree.  Secrets, which it leaves out, are let through: a template refuses them with a sentence."""
    schema = json_schema()
    schema = {name: part for name, part in schema.items() if name not in ("$schema", "title")}
    for setting in SETTINGS.values():
        if setting.is_secret:
            *sections, name = setting.key.split(".")
            section = schema
            for part in sections:
                section = section["properties"][part]
            section["properties"][name] = {"description": "Refused: a secret has no place in values."}
    return schema


def not_null() -> dict[str, dict[str, Any]]:
    """Path → how a null is refused: whether the value is always there, and what may be given in its place.

    Mappings and lists, and the texts and numbers that the templates rely on.  Settings, and sections that values.yaml
    has no defaults of, are left to the service, for which a null says nothing; but an emptied `security` must not pass
    for a decision to go without.
    """
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    found = {
        path: {"hasDefault": True, "orGive": _instead(value)}
        for path, value in _values(values, "")
        if value not in (None, "")
        and not path.startswith(MAY_BE_NULL)
        and (isinstance(value, dict) or not path.startswith("config."))
    }
    return {**found, "config.kafka.security": {"hasDefault": False, "orGive": _instead({})}}


def _values(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{path}{name}", value
        if isinstance(value, dict):
            yield from _values(value, f"{path}{name}.")


def _instead(value: Any) -> str:
    return (
        " or give it {}" if isinstance(value, dict) else " or give it []" if isinstance(value, list) else ""
    )


def template() -> str:
    """The values that must not be null, and what the items of a list must be, which may be a text with commas."""
    items = {
        key: f"^({setting.pattern})$"
        for key, setting in SETTINGS.items()
        if setting.is_list and setting.pattern
    }
    return (
        "{{/* Generated by helm/schema.py from values.yaml and the settings. */}}\n"
        f"{_define('inferstream.notNull', not_null())}\n{_define('inferstream.itemPatterns', items)}"
    )


def _define(name: str, values: dict[str, Any]) -> str:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    return f'{{{{- define "{name}" -}}}}\n{{\n{lines}\n}}\n{{{{- end }}}}\n'


def main() -> int:
    texts = {
        SCHEMA: json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n",
        TEMPLATE: template(),
    }
    old = [
        file for file, text in texts.items() if not file.is_file() or file.read_text(encoding="utf-8") != text
    ]
    if sys.argv[1:] == ["--check"]:
        for file in old:
            print(f"{file} is not current: run make chart", file=sys.stderr)
        return 1 if old else 0
    for file in old:
        file.write_text(texts[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
