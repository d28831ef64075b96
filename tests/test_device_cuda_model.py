"""A real model on the CUDA device: everything of it but the GPU, which tests/support/streams.py stands in for."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from inferstream.device.cuda import CudaDevice
from inferstream.documents import Document, Prepared
from inferstream.models import loading
from inferstream.models.execution import best_forward
from inferstream.models.loading import Loaded, Transformer, load
from tests.support.streams import FakeStreams
from tests.test_cli import ENVIRON
from tests.test_models_loading import PACKAGE, as_is, model_settings

pytestmark = pytest.mark.model


def on_the_fake(monkeypatch: pytest.MonkeyPatch, graphs: int) -> tuple[Loaded, FakeStreams]:
    streams = FakeStreams(random.Random(1).randrange)

    def on_gpus(self: Transformer, free: dict[int, int], *, type_ids: bool) -> Any:
        return best_forward(self.model, self.head, pad_id=self.pad_id, type_ids=type_ids)

    monkeypatch.setattr(loading, "gpu_of", lambda device: 0)
    monkeypatch.setattr(loading, "dtype_on", lambda wanted, index: "float32")
    monkeypatch.setattr(loading, "gpus_for", lambda model, index, *, any_gpus: {index: 1 << 30})
    monkeypatch.setattr(loading, "peak_on", lambda index, dtype: None)
    monkeypatch.setattr(Transformer, "on_gpus", on_gpus)
    monkeypatch.setattr("inferstream.device.streams.CudaStreams", lambda index: streams)
    wanted = model_settings(id=PACKAGE, device="cuda")
    device = wanted.device.model_copy(update={"cuda_graphs": graphs})
    batch = wanted.batch.model_copy(update={"max_tokens": 512})
    return load(wanted.model_copy(update={"device": device, "batch": batch}), as_is), streams


@pytest.mark.parametrize("graphs", [0, 3])
def test_model_when_loaded_on_the_cuda_device_then_its_vectors_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, graphs: int
) -> None:
    texts = ["hello world", "a", "the reader opens a file " * 20, "", "one two three four five six seven"]
    on_cpu = load(model_settings(id=PACKAGE), as_is)
    prepared = [
        each for each in on_cpu.task.prepare([Document(t, t) for t in texts]) if isinstance(each, Prepared)
    ]
    items = [chunk for each in prepared for chunk in each.chunks]
    on_cpu.device.launch(0, items)
    expected = on_cpu.device.wait()
    on_cpu.device.close()
    loaded, streams = on_the_fake(monkeypatch, graphs)
    assert isinstance(loaded.device, CudaDevice)
    replays = sum(graph.replays for graph in streams.graphs)

    rows = loaded.device.run(items)

    assert expected is not None and expected.rows is not None
    np.testing.assert_allclose(rows, expected.rows, atol=2e-6)
    assert len(streams.graphs) == graphs
    assert sum(graph.replays for graph in streams.graphs) - replays == (1 if graphs else 0)
    assert (loaded.execution, loaded.dimensions, loaded.device.max_tokens) == ("packed", 384, 512)
    assert loaded.costs.tokens_per_s == loaded.device.tokens_per_s > 0


def test_run_when_the_gpu_cannot_be_had_then_one_line_names_the_setting_and_it_exits_2() -> None:
    arguments = ["--kafka.bootstrap-servers", "127.0.0.1:1", "--input.topics", "in", "--output.topic", "out"]
    command = [sys.executable, "-m", "inferstream", "run", *arguments, "--model.device", "cuda:999"]

    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, timeout=100, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith("inferstream: error: model.device: cuda:999 ")
    assert done.stderr.count("\n") == 1
