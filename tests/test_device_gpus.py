"""Which GPU a worker gets: every refusal is one line that names its setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inferstream
from inferstream.device.gpus import dtype_on, gpu_of, gpus_for
from inferstream.errors import SettingsError


def seen(
    monkeypatch: pytest.MonkeyPatch,
    *,
    built: bool = True,
    gpus: int = 1,
    capability: tuple[int, int] = (9, 0),
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla T4")


@pytest.mark.parametrize(("device", "index"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_gpu_when_it_is_there_is_known_by_its_index(
    monkeypatch: pytest.MonkeyPatch, device: str, index: int | None
) -> None:
    seen(monkeypatch, gpus=4)

    assert gpu_of(device) == index


@pytest.mark.parametrize(
    ("built", "gpus", "device", "text"),
    [
        (False, 0, "cuda", "model.device: cuda needs a torch that was built for CUDA"),
        (True, 0, "cuda:1", "model.device: cuda:1 cannot be had: torch "),
        (True, 1, "cuda:7", "model.device: cuda:7 is not there: this process sees 1 GPU (cuda:0); "),
        (
            True,
            4,
            "cuda:4",
            "model.device: cuda:4 is not there: this process sees 4 GPUs (cuda:0 to cuda:3); ",
        ),
    ],
)
def test_gpu_when_it_cannot_be_had_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, built: bool, gpus: int, device: str, text: str
) -> None:
    seen(monkeypatch, built=built, gpus=gpus)

    with pytest.raises(SettingsError) as refused:
        gpu_of(device)

    assert str(refused.value).startswith(text)
    assert "\n" not in str(refused.value)


def test_gpu_when_the_cpu_is_asked_for_then_torch_is_not_imported() -> None:
    code = "import sys, inferstream.device.gpus as g; g.gpu_of('cpu'); print('torch' in sys.modules)"
    assert inferstream.__file__ is not None
    env = {"PYTHONPATH": str(Path(inferstream.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("wanted", "capability", "dtype"),
    [
        ("auto", (9, 0), "bfloat16"),
        ("auto", (8, 0), "bfloat16"),
        ("auto", (7, 5), "float32"),
        ("fastest", (8, 0), "bfloat16"),
        ("fastest", (7, 5), "float32"),
        ("bfloat16", (8, 6), "bfloat16"),
        ("float16", (7, 5), "float16"),
        ("float32", (9, 0), "float32"),
    ],
)
def test_dtype_when_the_gpu_has_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, wanted: str, capability: tuple[int, int], dtype: str
) -> None:
    seen(monkeypatch, capability=capability)

    assert dtype_on(wanted, 0) == dtype


def test_dtype_when_the_gpu_only_emulates_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, capability=(7, 5))

    with pytest.raises(SettingsError, match=r"model.dtype: cuda:0 \(Tesla T4\) has no bfloat16 in hardware"):
        dtype_on("bfloat16", 0)


def sized(monkeypatch: pytest.MonkeyPatch, free: int) -> torch.nn.Module:
    """A model of 4 MiB, and GPUs with so many bytes free, each."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free, 8 << 20))
    return torch.nn.Linear(1024, 1024, bias=False)


@pytest.mark.parametrize(("any_gpus", "gpus", "free"), [(False, 2, 4), (True, 1, 4), (True, 2, 5)])
def test_gpus_when_the_weights_fit_the_first_then_it_is_that_one(
    monkeypatch: pytest.MonkeyPatch, any_gpus: bool, gpus: int, free: int
) -> None:
    seen(monkeypatch, gpus=gpus)

    assert gpus_for(sized(monkeypatch, free << 20), 0, any_gpus=any_gpus) == {0: free << 20}


def test_gpus_when_the_weights_do_not_fit_one_and_nobody_asked_for_it_then_it_is_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen(monkeypatch, gpus=3)
    free = (4 << 20) - 1

    assert gpus_for(sized(monkeypatch, free), 0, any_gpus=True) == {0: free, 1: free, 2: free}


def test_gpus_when_the_weights_would_leave_too_little_for_batches_and_nobody_asked_for_one_then_it_is_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen(monkeypatch, gpus=2)
    free = (5 << 20) - 1

    assert gpus_for(sized(monkeypatch, free), 0, any_gpus=True) == {0: free, 1: free}


@pytest.mark.parametrize(
    ("gpus", "any_gpus", "other"), [(1, True, False), (1, False, False), (2, False, True)]
)
def test_gpus_when_the_weights_do_not_fit_and_there_is_no_other_way_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, any_gpus: bool, other: bool
) -> None:
    seen(monkeypatch, gpus=gpus)

    with pytest.raises(SettingsError) as refused:
        gpus_for(sized(monkeypatch, (4 << 20) - 1), 0, any_gpus=any_gpus)

    assert str(refused.value).startswith(
        "model.id: its weights are 0.0 GiB, and cuda:0 has 0.0 of 0.0 GiB free; "
    )
    assert ("set model.device to auto to spread the model over all" in str(refused.value)) is other
