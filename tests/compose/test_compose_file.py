"""docker-compose.yml: its form, and that what it names is there.

compose-spec.json is the schema of github.com/compose-spec/compose-spec (Apache-2.0, compose-spec.LICENSE), as
check-jsonschema 0.39 carries it.
"""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import yaml

from inferstream.settings import load_settings
from tests.compose.compose import DEFAULTS, ROOT, Compose, env_file

SCHEMA = Path(__file__).with_name("compose-spec.json")
CONFIGURES_COMPOSE = {"COMPOSE_PROFILES"}  # read by Compose itself
PROMETHEUS = ROOT / "ops" / "prometheus" / "prometheus.yml"
GRAFANA = ROOT / "ops" / "grafana"

COMPOSE = Compose()


def own_services() -> list[str]:
    return sorted(COMPOSE.own_services)


def settings_of(service: str) -> Any:
    environ = {name: str(value) for name, value in COMPOSE.services[service]["environment"].items()}
    return load_settings(environ=environ, image_file=DEFAULTS)


def test_file_then_it_is_what_the_compose_specification_allows() -> None:
    validator = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))

    assert [f"{list(e.instance_path)}: {e.message}" for e in validator.iter_errors(COMPOSE.raw)] == []
    assert [f"{list(e.instance_path)}: {e.message}" for e in validator.iter_errors(COMPOSE.tree)] == []


def test_schema_when_a_key_is_wrong_then_it_says_so() -> None:
    validator = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))

    assert not validator.is_valid({"services": {"kafka": {"image": "x", "depend_on": ["y"]}}})


def test_variables_then_env_has_those_that_are_used_and_no_others() -> None:
    assert COMPOSE.used == set(env_file()) - CONFIGURES_COMPOSE


def test_images_then_each_is_a_variable() -> None:
    literal = {
        name: service["image"]
        for name, service in COMPOSE.raw["services"].items()
        if not re.fullmatch(r"\$\{\w+_IMAGE\}", service["image"])
    }

    assert literal == {}


def test_mounts_then_each_file_and_volume_is_there() -> None:
    missing = [
        f"{name}: {source}"
        for name in COMPOSE.services
        for source, _ in COMPOSE.binds(name)
        if not source.exists()
    ]
    volumes = {
        volume.partition(":")[0]
        for service in COMPOSE.services.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }

    assert missing == []
    assert volumes == set(COMPOSE.tree["volumes"])


def test_dependencies_then_each_is_there_and_can_meet_its_condition() -> None:
    for name, service in COMPOSE.services.items():
        for needed, how in service.get("depends_on", {}).items():
            other = COMPOSE.services[needed]
            check = other.get("healthcheck", {})
            if how["condition"] == "service_healthy":
                assert check.get("test"), f"{name} waits for {needed} to be healthy, which has no check"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert other["restart"] == "no", f"{name} waits for {needed} to end, which is restarted"
            # A service outside the chosen profiles is not started, and what needs it is refused.
            assert set(other.get("profiles", [])) <= set(service.get("profiles", [])), f"{name} → {needed}"


def test_profiles_then_by_default_there_is_one_worker() -> None:
    chosen = set(env_file()["COMPOSE_PROFILES"].split(","))
    workers = {name for name, service in COMPOSE.own_services.items() if service["command"][0] == "run"}
    started = {name for name in workers if chosen & set(COMPOSE.services[name]["profiles"])}

    assert workers == {"inferstream", "inferstream-gpu"}
    assert started == {"inferstream"}


def test_ports_then_each_is_open_to_this_machine_alone() -> None:
    published = [port for service in COMPOSE.services.values() for port in service.get("ports", [])]

    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("service", own_services())
def test_settings_then_each_is_one_of_the_service(service: str) -> None:
    loaded = settings_of(service)

    given = {key for key, origin in loaded.origins.items() if origin.startswith("env ")}
    assert len(given) == len(COMPOSE.services[service]["environment"])
    assert loaded.warnings == ()


@pytest.mark.parametrize("service", own_services())
def test_brokers_then_the_service_asks_where_kafka_listens_and_sends_it_on(service: str) -> None:
    kafka = COMPOSE.services["kafka"]["environment"]
    listeners = dict(each.split("://") for each in kafka["KAFKA_LISTENERS"].split(","))
    advertised = dict(each.split("://") for each in kafka["KAFKA_ADVERTISED_LISTENERS"].split(","))

    [server] = settings_of(service).settings.kafka.bootstrap_servers
    assert server == advertised["PLAINTEXT"]
    assert server.partition(":")[0] in COMPOSE.services
    assert listeners["PLAINTEXT"] == f":{server.partition(':')[2]}"


def test_brokers_when_asked_from_this_machine_then_they_send_it_on_to_the_published_port() -> None:
    kafka = COMPOSE.services["kafka"]
    advertised = dict(e.split("://") for e in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(","))
    listeners = dict(e.split("://") for e in kafka["environment"]["KAFKA_LISTENERS"].split(","))
    [published] = kafka["ports"]

    port = advertised["HOST"].removeprefix("localhost:")
    assert published == f"127.0.0.1:{port}{listeners['HOST']}"


@pytest.mark.parametrize("service", ["inferstream", "inferstream-gpu"])
def test_worker_then_it_has_the_time_to_drain(service: str) -> None:
    grace = COMPOSE.services[service]["stop_grace_period"]

    assert seconds(grace) >= settings_of(service).settings.delivery.drain_timeout_s + 15


def test_scraping_then_each_target_is_a_service_and_a_port_it_listens_on() -> None:
    config = yaml.safe_load(PROMETHEUS.read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]

    assert targets
    for target in targets:
        host, _, port = target.partition(":")
        for service in COMPOSE.names()[host]:
            assert settings_of(service).settings.telemetry.port == int(port)
            assert settings_of(service).settings.telemetry.host == "0.0.0.0"


def test_prometheus_then_the_rule_files_are_mounted_where_it_looks() -> None:
    config = yaml.safe_load(PROMETHEUS.read_text())
    [option] = [o for o in COMPOSE.services["prometheus"]["command"] if o.startswith("--config.file=")]
    path = Path(option.partition("=")[2])

    assert COMPOSE.host_path("prometheus", str(path)) == PROMETHEUS
    for rules in config["rule_files"]:
        found = COMPOSE.host_path("prometheus", str(path.parent / rules))
        assert found is not None and found.is_file()


def test_grafana_then_data_source_and_dashboards_are_where_it_looks() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    url = urlsplit(source["url"])
    [published] = COMPOSE.services[str(url.hostname)]["ports"]
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/inferstream.yaml").read_text())[
        "providers"
    ]
    home = COMPOSE.services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert source["type"] == "prometheus"
    assert published.endswith(f":{url.port}")
    folder = COMPOSE.host_path("grafana", provider["options"]["path"])
    assert folder is not None and list(folder.glob("*.json"))
    dashboard = COMPOSE.host_path("grafana", home)
    assert dashboard is not None and dashboard.is_file()


def test_build_then_its_arguments_are_those_of_the_dockerfile() -> None:
    arguments = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    [build] = [service["build"] for service in COMPOSE.services.values() if "build" in service]

    assert set(build["args"]) <= set(arguments)
    assert (ROOT / build["context"] / "Dockerfile").is_file()


def test_build_then_one_service_does_it_and_the_others_wait_for_its_image() -> None:
    """Several that build the same tag side by side race for it; one that neither builds nor waits has no image."""
    [builder] = [name for name, service in COMPOSE.own_services.items() if "build" in service]

    assert not COMPOSE.services[builder].get("profiles")
    for name in set(COMPOSE.own_services) - {builder}:
        assert builder in needed_by(name), name
    # Compose asks a registry first, and builds where that fails; `never` would end the asking, too.
    assert not any("pull_policy" in service for service in COMPOSE.own_services.values())


def needed_by(service: str) -> set[str]:
    """The services that are started before it."""
    direct = set(COMPOSE.services[service].get("depends_on", {}))
    return direct.union(*(needed_by(name) for name in direct))


def test_sample_then_there_are_more_documents_than_results_shown() -> None:
    documents = (ROOT / "examples" / env_file()["DOCUMENTS"]).read_text().splitlines()

    assert len(documents) > int(env_file()["RESULTS"])
    assert len({json.loads(line)["id"] for line in documents}) == len(documents)


def seconds(duration: str) -> float:
    """Of a duration as Compose writes it: ``1m30s``."""
    parts = {unit: float(number) for number, unit in re.findall(r"(\d+)([hms])", duration)}
    return timedelta(
        hours=parts.get("h", 0), minutes=parts.get("m", 0), seconds=parts.get("s", 0)
    ).total_seconds()
