"""The engine and the image of the tests: `make test-image` builds the image and names both."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.image.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    wanted = os.environ.get("INFERSTREAM_TEST_ENGINE") or "docker podman"
    for program in wanted.split():
        if shutil.which(program) and subprocess.run([program, "info"], capture_output=True).returncode == 0:
            return Engine(program)
    pytest.fail(f"no container engine answers ({wanted}); install Docker or Podman", pytrace=False)


@pytest.fixture(scope="session")
def image(engine: Engine) -> Iterator[str]:
    name = os.environ.get("INFERSTREAM_TEST_IMAGE")
    if name is None:
        pytest.fail("INFERSTREAM_TEST_IMAGE names no image; `make test-image` builds one", pytrace=False)
    yield name
    engine.remove_containers()
