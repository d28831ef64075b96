"""What Kubernetes, KEDA and the Prometheus operator take: their own schemas, strict about unknown fields."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

from tests.helm.tools import crd_files


def problems(thing: Mapping[str, Any], kubernetes: str) -> Iterator[str]:
    """What is wrong with an object for that version of Kubernetes, a line each.

    An object of a kind that nobody here knows is itself a problem: a typing error would be one.
    """
    group, _, version = thing["apiVersion"].rpartition("/")
    name = f"{thing['kind']} {thing['metadata']['name']}"
    if "." in group and not group.endswith(".k8s.io"):
        validator = _custom(group, version, thing["kind"])
    else:
        validator = _builtin(kubernetes, group.partition(".")[0], version, thing["kind"])
    if validator is None:
        yield f"{name}: {thing['apiVersion']} is unknown to Kubernetes {kubernetes}, KEDA and the Prometheus operator"
        return
    for error in validator.iter_errors(thing):
        yield f"{name}: {'/'.join(map(str, error.instance_path))}: {error.message}"


@functools.cache
def _builtin(kubernetes: str, group: str, version: str, kind: str) -> jsonschema_rs.Validator | None:
    schema = _folder(kubernetes) / f"{'-'.join(part for part in (kind.lower(), group, version) if part)}.json"
    if not schema.is_file():
        return None
    return jsonschema_rs.validator_for(json.loads(schema.read_text()), registry=_definitions(kubernetes))


@functools.cache
def _definitions(kubernetes: str) -> jsonschema_rs.Registry:
    contents = json.loads((_folder(kubernetes) / "_definitions.json").read_text())
    return jsonschema_rs.Registry([(contents["$id"], contents)])


def _folder(kubernetes: str) -> Path:
    """The schemas that the package kubernetes-validate carries; it is not imported for them."""
    spec = importlib.util.find_spec("kubernetes_validate")
    assert spec is not None and spec.submodule_search_locations, "pip install kubernetes-validate"
    [package] = spec.submodule_search_locations
    return Path(package) / "kubernetes-json-schema" / f"v{kubernetes}-local-strict"


@functools.cache
def _custom(group: str, version: str, kind: str) -> jsonschema_rs.Validator | None:
    schema = _custom_schemas().get((group, version, kind))
    return None if schema is None else jsonschema_rs.validator_for(schema)


class _Loader(yaml.CSafeLoader):
    """YAML in which ``=`` is a text: it stands in an enumeration of the Prometheus operator's."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


@functools.cache
def _custom_schemas() -> dict[tuple[str, str, str], dict[str, Any]]:
    found = {}
    for path in crd_files():
        spec = yaml.load(path.read_text(), _Loader)["spec"]
        for version in spec["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[spec["group"], version["name"], spec["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """An OpenAPI schema of a CRD as JSON Schema: a field it does not name, which the server would drop, is wrong."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(part) for name, part in schema.items() if not name.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        strict = {name: part for name, part in strict.items() if name not in ("type", "anyOf", "format")}
        strict["type"] = ["integer", "string"]
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if schema.get("nullable") and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    return strict
