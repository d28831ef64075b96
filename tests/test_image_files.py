"""What the image is built from: the Dockerfile's lint, and what must agree with other files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from inferstream.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = ("Dockerfile", "examples/baked/Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def hadolint() -> str:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not here; `make setup` installs it")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_then_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([hadolint(), str(ROOT / name)], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "")


def test_version_then_it_is_the_projects() -> None:
    text = (ROOT / "Dockerfile").read_text()

    assert re.findall(r"^ARG VERSION=(.*)$", text, re.MULTILINE) == [PROJECT["version"]]


def test_base_image_then_it_is_named_by_its_digest() -> None:
    text = (ROOT / "Dockerfile").read_text()

    [base] = re.findall(r"^ARG BASE_IMAGE=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)


def test_environment_then_no_setting_is_among_it() -> None:
    assert "INFERSTREAM_" not in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ops/image/defaults.yaml", {"telemetry.host", "telemetry.log_format"}),
        ("examples/baked/defaults.yaml", {"telemetry.host", "telemetry.log_format", "model.id"}),
    ],
)
def test_defaults_then_each_is_a_setting(name: str, keys: set[str]) -> None:
    loaded = load_settings(environ={}, image_file=ROOT / name, require=False)

    given = {key for key, origin in loaded.origins.items() if origin.startswith("file:")}
    assert given == keys


@pytest.mark.parametrize("name", ["base.txt", "torch.txt", "build.txt", "demo.txt", "accelerate.txt"])
def test_requirements_then_each_is_pinned_with_hashes(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    pins = re.findall(r"^\S+==\S+.*\\$\n +--hash=sha256:", text, re.MULTILINE)

    assert pins
    assert len(pins) == len(re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE))


def test_requirements_when_a_package_is_in_several_files_then_its_version_is_the_same() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in re.findall(r"^([\w.-]+)==([^ ;]+)(?= \\| ;)", path.read_text(), re.MULTILINE):
            found.setdefault(f"{path.name}:{name}", set()).add(version)
    by_package: dict[str, set[frozenset[str]]] = {}
    for key, versions in found.items():
        by_package.setdefault(key.partition(":")[2], set()).add(frozenset(versions))

    assert {name for name, versions in by_package.items() if len(versions) > 1} == set()


def test_ignored_then_only_what_is_copied_goes_to_the_engine() -> None:
    text = (ROOT / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.*) \S+$", text, re.MULTILINE)

    for path in [word for words in copied for word in words.split()]:
        assert (ROOT / path).exists()
        assert any(path == known or path.startswith(f"{known}/") for known in allowed), path
