"""A model over several GPUs: the plan is accelerate's own, the GPUs are played by the host."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from inferstream.device import spread
from inferstream.device.forward import Shape
from inferstream.device.gpus import weights_bytes
from inferstream.device.spread import WEIGHTS_SHARE, SpreadRunner, plan, spread_device
from inferstream.documents import Document, Prepared
from inferstream.errors import DeviceFailed, ModelError, OutOfMemory, SettingsError
from inferstream.models import loading
from inferstream.models.loading import Transformer, load
from inferstream.models.pooling import Head
from tests.support.streams import ToyForward
from tests.test_models_loading import PACKAGE, as_is, model_settings

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
CPU = torch.device("cpu")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


class Failing(ToyForward):
    """Raises ``error`` above ``most`` tokens."""

    def __init__(self, error: BaseException, most: int = 0) -> None:
        super().__init__()
        self.error = error
        self.most = most
        self.sizes: list[int] = []

    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        self.sizes.append(shape.tokens)
        if shape.tokens > self.most:
            raise self.error
        return super().forward(slab, shape)


def free_for(model: Any, *shares: float) -> dict[int, int]:
    """GPUs with room for such shares of the weights."""
    return {gpu: int(share * weights_bytes(model) / WEIGHTS_SHARE) for gpu, share in enumerate(shares)}


# ---- where its parts go


@needs_accelerate
@pytest.mark.parametrize("shares", [(0.8, 0.7), (0.6, 0.5, 0.4), (0.4, 0.9)])
def test_plan_when_the_gpus_hold_it_together_then_none_holds_more_than_its_share(
    model: Any, shares: Sequence[float]
) -> None:
    free = free_for(model, *shares)

    parts = plan(model, free)

    assert set(parts.values()) == set(free)
    used = dict.fromkeys(free, 0)
    for name, weight in model.named_parameters():
        [gpu] = {gpu for part, gpu in parts.items() if name.startswith(f"{part}.") or name == part}
        used[gpu] += weight.numel() * weight.element_size()
    assert all(used[gpu] <= WEIGHTS_SHARE * free[gpu] for gpu in free)
    for layer in range(8):  # attention adds what came in to what it gives: a layer stays in one place
        assert len({gpu for part, gpu in parts.items() if part.startswith(f"encoder.layer.{layer}")}) <= 1


@pytest.mark.parametrize("shares", [(0.4, 0.5), (0.1, 0.1, 0.1)])
def test_plan_when_the_gpus_do_not_hold_it_together_then_it_is_refused(
    model: Any, shares: Sequence[float]
) -> None:
    with pytest.raises(
        SettingsError, match=r"model.id: its weights are 0.0 GiB, and cuda:0 to cuda:[12] have"
    ):
        plan(model, free_for(model, *shares))


@needs_accelerate
def test_plan_when_parts_would_stay_in_host_memory_then_it_is_refused(model: Any) -> None:
    with pytest.raises(SettingsError, match="no layer in two parts"):
        plan(model, free_for(model, *[0.08] * 20))  # a layer is 0.11 of the weights


def test_plan_when_accelerate_is_missing_then_the_line_says_what_to_install(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferstream.device.spread.find_spec", lambda name: None)

    with pytest.raises(SettingsError, match=r"accelerate is missing; install inferstream\[accelerate\]"):
        plan(model, free_for(model, 0.7, 0.7))


# ---- what it computes


@needs_accelerate
def test_spread_model_then_its_rows_are_those_of_each_document_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(1)
    items = [random.integers(1, 100, length, dtype=np.int32) for length in (5, 1, 40, 7)]
    with torch.no_grad():
        alone = [
            model(input_ids=torch.from_numpy(item)[None].long()).last_hidden_state.mean(1)[0].numpy()
            for item in items
        ]
    free = free_for(model, 0.8, 0.7)
    monkeypatch.setattr(spread, "plan", lambda model, free: dict.fromkeys(plan(model, free), "cpu"))

    forward = Transformer(model, Head(("mean",)), 0, 64).on_gpus(free, type_ids=True)
    rows = SpreadRunner(forward, model.device, ()).run(items)

    assert hasattr(model.encoder.layer[7], "_hf_hook")
    assert rows.dtype == np.float32
    assert np.allclose(rows, np.stack(alone), atol=1e-5)


def test_spread_model_when_it_gives_other_vectors_then_it_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_layer(model: Any, parts: Any) -> None:
        torch.nn.init.normal_(model.encoder.layer[3].output.dense.weight, std=3.0)

    monkeypatch.setattr(spread, "plan", lambda model, free: {})
    monkeypatch.setattr(spread, "dispatch", lose_a_layer)

    with pytest.raises(ModelError, match="spread over 2 GPUs it gives another vector"):
        Transformer(model, Head(("mean",)), 0, 64).on_gpus({0: 1, 1: 1}, type_ids=True)


@needs_accelerate
@pytest.mark.model
def test_load_when_the_weights_fit_no_gpu_alone_then_it_runs_spread_with_the_same_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu = load(model_settings(id=PACKAGE), as_is)
    monkeypatch.setattr(loading, "gpu_of", lambda device: 0)
    monkeypatch.setattr(loading, "dtype_on", lambda wanted, index: "float32")
    monkeypatch.setattr(loading, "gpus_for", lambda model, index, *, any_gpus: free_for(model, 0.7, 0.7))
    monkeypatch.setattr(spread, "plan", lambda model, free: dict.fromkeys(plan(model, free), "cpu"))

    loaded = load(model_settings(id=PACKAGE, device="cuda"), as_is)

    [prepared] = loaded.task.prepare([Document("1", "hello world, said the reader")])
    assert isinstance(prepared, Prepared)
    found = []
    for each in (on_cpu, loaded):
        each.device.launch(0, prepared.chunks)
        flight = each.device.wait()
        each.device.close()
        assert flight is not None and flight.rows is not None
        found.append(flight.rows)
    assert np.allclose(*found, atol=1e-5)
    assert (loaded.execution, loaded.device.lanes, loaded.peak) == ("padded", 1, None)
    assert loaded.costs.tokens_per_s > 0


# ---- when it fails


def test_run_when_memory_runs_out_then_the_stage_is_told_so() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand pages of advice")

    with pytest.raises(OutOfMemory, match=r"^CUDA out of memory\. Tried to allocate$"):
        SpreadRunner(Failing(error), CPU, ()).run([[1, 2]])


def test_run_when_the_model_raises_and_the_gpus_live_then_it_is_the_batchs_error() -> None:
    with pytest.raises(ValueError, match="odd"):
        SpreadRunner(Failing(ValueError("odd")), CPU, ()).run([[1, 2]])


def test_run_when_a_gpu_keeps_its_error_then_the_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    asserted = RuntimeError("CUDA error: device-side assert triggered")

    def synchronize(gpu: int) -> None:
        if gpu == 1:
            raise asserted

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)

    with pytest.raises(DeviceFailed, match="device-side assert"):
        SpreadRunner(Failing(asserted), CPU, (0, 1)).run([[1, 2]])


# ---- the device


def test_device_when_the_longest_batch_does_not_fit_then_its_budget_is_one_that_does() -> None:
    forward = Failing(torch.OutOfMemoryError("CUDA out of memory"), most=40)

    device, tokens_per_s = spread_device(
        SpreadRunner(forward, CPU, ()), "cuda:0,1", max_tokens=100, max_length=10
    )
    device.launch(0, [[1, 2], [3]])
    flight = device.wait()
    device.close()

    assert forward.sizes == [100, 50, 20, 20, 3]
    assert device.max_tokens == 25 and device.lanes == 1 and tokens_per_s > 0
    assert flight is not None and flight.rows is not None
    assert flight.rows.tolist() == [forward.row([1, 2]), forward.row([3])]
    assert flight.busy_s == pytest.approx(flight.spans[0].end - flight.spans[0].start, rel=0.5)


def test_device_when_not_even_one_document_fits_then_it_is_refused() -> None:
    runner = SpreadRunner(Failing(torch.OutOfMemoryError("CUDA out of memory")), CPU, ())

    with pytest.raises(SettingsError, match=r"model.max_length: a document of 10 tokens does not fit"):
        spread_device(runner, "cuda:0,1", max_tokens=100, max_length=10)
