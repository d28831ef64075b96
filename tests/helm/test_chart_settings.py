"""The chart's `config` is the service's own settings tree; what is generated from it is current."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from inferstream.settings import SETTINGS, Loaded, load_settings, value_of
from inferstream.settings.keys import Setting
from tests.helm.chart import CHART, MAJORS, MATRIX, ROOT, container, env_of, render
from tests.helm.tools import ToolUnavailable, tool

# What the chart sets for every pod by itself and refuses here, so that not every setting can be tried alike.
NOT_BY_CONFIG = {"kafka.group_instance_id", "kafka.transactional_id"}
# Values that fit their own rules where the first that comes to mind does not.
SAMPLES: dict[str, Any] = {
    "kafka.bootstrap_servers": ["kafka-1:9092", "kafka-2:9092"],
    "kafka.heartbeat_interval_ms": 2500,
    "kafka.request_timeout_ms": 90_000,
    "kafka.fetch_max_bytes": 33_554_432,
    "kafka.security.protocol": "SASL_SSL",
    "kafka.security.mechanism": "SCRAM-SHA-256",
    "input.topics": ["one", "two"],
    "model.device": "cpu",
    "model.dtype": "bfloat16",
    "telemetry.host": "::",
    "telemetry.port": 8080,
    "delivery.guarantee": "at-least-once",
}


def sample(setting: Setting) -> Any:
    """A value that differs from the default, where there is another."""
    if setting.key in SAMPLES:
        return SAMPLES[setting.key]
    if setting.choices:
        return next(
            (choice for choice in reversed(setting.choices) if choice != setting.default), setting.default
        )
    if setting.type is bool:
        return not setting.default
    if setting.type is int or setting.type is float:
        default = setting.default if isinstance(setting.default, int | float) else setting.bounds[0] or 1
        _, high = setting.bounds
        value = setting.type(default) + (1 if setting.type is int else 0.25)
        return value if high is None or value <= high else setting.type(default) - 0.25
    if setting.type is Path:
        return f"/etc/somewhere/{setting.key}"
    return f"/{setting.key}" if setting.key.endswith("_field") else setting.key.replace(".", "-")


def load(text: str, folder: Path, environ: Mapping[str, str] | None = None) -> Loaded:
    file = folder / "config.yaml"
    file.write_text(text)
    return load_settings([file], environ or {}, image_file=folder / "none.yaml")


def tree_of(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def test_settings_when_each_is_given_in_values_then_the_worker_reads_just_that(tmp_path: Path) -> None:
    chosen = {
        key: sample(setting)
        for key, setting in SETTINGS.items()
        if not setting.is_secret and key not in NOT_BY_CONFIG
    }
    text = render(*({"config": tree_of(key, value)} for key, value in chosen.items())).config

    settings = load(text, tmp_path).settings

    read = {key: value_of(settings, key) for key in chosen}
    assert {key: str(value) if isinstance(value, Path) else value for key, value in read.items()} == chosen


def test_schema_when_a_key_is_a_setting_then_it_is_in_it_with_its_manual() -> None:
    config = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]

    for key, setting in SETTINGS.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section["properties"][part]
            assert section["additionalProperties"] is False
        assert section["properties"][name]["description"] == setting.doc or setting.is_secret


@pytest.mark.parametrize("name", MATRIX)
def test_matrix_when_its_settings_are_loaded_by_the_service_then_they_are_known(
    name: str, tmp_path: Path
) -> None:
    objects = render(yaml.safe_load(MATRIX[name].read_text()), base={})
    # What only the cluster knows: a name, a Secret's key.
    given = {
        variable: value if isinstance(value, str) else "kafka:9092"
        for variable, value in env_of(objects.worker).items()
        if variable in {setting.variable for setting in SETTINGS.values()}
    }

    settings = load(objects.config, tmp_path, given).settings

    assert settings.telemetry.host == "0.0.0.0"
    assert settings.delivery.drain_timeout_s + 15 <= objects.pod["terminationGracePeriodSeconds"]
    security = settings.kafka.security
    mounted = {mount["name"] for mount in objects.worker["volumeMounts"]}
    assert (security.protocol == "PLAINTEXT") == ("kafka" not in mounted)


def test_environment_when_rendered_then_every_setting_in_it_is_known() -> None:
    objects = render(
        "{workload: {kind: StatefulSet}, config: {delivery: {guarantee: exactly-once}}}",
        "config: {kafka: {security: {protocol: SASL_SSL, mechanism: PLAIN}}}",
        "secrets: {kafka: {sasl: {existingSecret: kafka, usernameKey: user}}}",
    )

    given = {name for name in env_of(objects.worker) if name.startswith("INFERSTREAM_")}

    assert given == {
        "INFERSTREAM_KAFKA__GROUP_INSTANCE_ID",
        "INFERSTREAM_KAFKA__TRANSACTIONAL_ID",
        "INFERSTREAM_KAFKA__SECURITY__USERNAME",
    }
    assert given <= {setting.variable for setting in SETTINGS.values()}


def test_secret_variables_when_given_then_the_files_they_name_are_settings() -> None:
    config = yaml.safe_load(
        render(
            "config: {kafka: {security: {protocol: SASL_SSL, mechanism: PLAIN, username: a}}}",
            "secrets: {kafka: {sasl: {existingSecret: a}, ca: {existingSecret: b}}}",
            "secrets: {kafka: {client: {existingSecret: c, keyPasswordKey: p}}}",
        ).config
    )

    files = {name for name in config["kafka"]["security"] if name.endswith("_file")}

    assert files == {key.rsplit(".", 1)[-1] for key in SETTINGS if key.endswith("_file")}


def test_defaults_when_the_chart_writes_them_down_then_they_are_the_services_own() -> None:
    config = yaml.safe_load((CHART / "values.yaml").read_text())["config"]
    telling = {"kafka.bootstrap_servers", "input.topics", "output.topic", "telemetry.host"}

    written = {
        f"{section}.{name}": value for section, settings in config.items() for name, value in settings.items()
    }

    assert {key: value for key, value in written.items() if key not in telling} == {
        key: SETTINGS[key].default for key in written if key not in telling
    }
    # Someone may take the default away; the grace period then rests on what the service does without.
    grace = render("config: {delivery: {drain_timeout_s: null}}").pod["terminationGracePeriodSeconds"]
    assert grace == SETTINGS["delivery.drain_timeout_s"].default + 15


def test_schema_when_generated_again_then_it_is_the_same() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "helm/schema.py", "--check"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


def test_schema_when_read_then_it_is_draft_7_and_closed() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    jsonschema_rs.meta.validate(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {
        *yaml.safe_load((CHART / "values.yaml").read_text()),
        "global",
        "enabled",
    }


def test_chart_when_compared_with_the_project_then_the_versions_are_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["appVersion"] == project["version"]


def test_readme_when_generated_again_then_it_is_the_same(tmp_path: Path) -> None:
    try:
        command = tool("helm-docs")
    except ToolUnavailable as error:
        pytest.skip(f"no helm-docs: {error}")

    done = subprocess.run(
        [command, f"--chart-search-root={CHART}", "--dry-run", "--log-level=error"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHART,
    )

    assert done.stdout.strip() == (CHART / "README.md").read_text().strip(), "run: make chart"


@pytest.mark.parametrize("major", MAJORS)
def test_chart_when_part_of_another_then_its_values_are_taken(major: str, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    (parent / "charts" / "inferstream").symlink_to(CHART)
    (parent / "Chart.yaml").write_text(
        "{apiVersion: v2, name: parent, version: 1.0.0, dependencies: [{name: inferstream, version: 0.1.0, "
        "repository: '', condition: inferstream.enabled}]}"
    )
    values = {
        "global": {"region": "eu"},
        "inferstream": {"enabled": True, **yaml.safe_load(MATRIX["minimal"].read_text())},
    }

    objects = render(values, base={}, chart=parent, major=major)

    assert container(objects.pod, "inferstream")["args"] == [
        "run",
        "--config",
        "/etc/inferstream/config.yaml",
    ]
