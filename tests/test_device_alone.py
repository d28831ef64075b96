"""What is for a machine with a GPU needs pytest, torch, transformers and what these bring, and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import benchmarks.gpu

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("pytest", "torch", "transformers", "numpy")
OURS = {"inferstream", "tests", "benchmarks", "schemas"}

SCRIPT = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
for name in sys.argv[2].split(","):
    importlib.import_module(name)
import pytest
sys.exit(pytest.main(["-c", "/dev/null", "--rootdir", ".", "--confcutdir", "tests/gpu", "-p", "no:cacheprovider",
                      "--collect-only", "-q", "tests/gpu"]))
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions that these need, themselves included, without their extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_gpu_tests_and_benchmarks_when_nothing_else_is_installed_are_imported_and_collected() -> None:
    kept = closure(KEPT)
    others = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if kept.isdisjoint(map(_normal, owners)) and module.isidentifier() and module not in OURS
    }
    others |= {"pydantic"}  # which huggingface_hub may use and does without
    assert {"orjson", "aiokafka", "prometheus_client", "confluent_kafka"} <= others
    modules = [f"benchmarks.gpu.{each.name}" for each in pkgutil.iter_modules(benchmarks.gpu.__path__)]
    command = [sys.executable, "-c", SCRIPT, ",".join(sorted(others)), ",".join(modules)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'service'}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=200)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "test_cuda.py" in done.stdout
