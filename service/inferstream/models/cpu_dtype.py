"""Which number type a CPU computes with: float32, or bfloat16 where the hardware has it."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferstream.errors import SettingsError
from inferstream.models.warmup import cpu_seconds, in_thread

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ROUNDS = 3

MEASURED_WORK = 2_000_000_000
"""Floating-point operations of one measurement of a number type, about 20 ms on a core."""

MOST_ROWS = 512

MUCH_FASTER = 1.2
"""From here on bfloat16 counts as faster: a model does more than multiply."""

FASTEST = "fastest"


def cpu_dtype(wanted: str) -> str:
    """The number type on a CPU for a ``model.dtype``; ``auto`` is float32, whose numbers are the reference's.

    ``fastest`` stays what it is where the CPU has bfloat16: :func:`faster_dtype` decides once the model is known.
    """
    if wanted in ("auto", "float32"):
        return "float32"
    if wanted == FASTEST:
        return FASTEST if cpu_has_bfloat16() else "float32"
    assert wanted == "bfloat16"  # float16 is refused where the settings are resolved
    if not cpu_has_bfloat16():
        raise SettingsError(
            "model.dtype: this CPU has no bfloat16 in hardware (avx512_bf16 or amx_bf16), and emulated it is "
            "slower than float32; set model.dtype to float32"
        )
    return wanted


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware, from the flags that the kernel shows."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    names = {"bf16"} if platform.machine() in ("aarch64", "arm64") else {"avx512_bf16", "amx_bf16"}
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), [])
    return not names.isdisjoint(flags)


def faster_dtype(width: int) -> str:
    """The number type that a model of this width is faster in, by a measurement, which is logged."""
    speed_up, rates = _speed_up(width)
    dtype = "bfloat16" if speed_up > MUCH_FASTER else "float32"
    log.info(f"model.dtype fastest is {dtype} on this machine", extra=rates)
    return dtype


def say_if_another_is_faster(model: Any) -> None:
    """Say in the log if the model's own number type, which was asked for, is the slower one."""
    import torch

    if model.dtype == torch.float32 and not cpu_has_bfloat16():
        return
    speed_up, rates = _speed_up(model.config.hidden_size)
    if model.dtype != torch.float32 and speed_up < 1.0:
        log.warning("model.dtype bfloat16 is slower than float32 on this machine", extra=rates)
    elif model.dtype == torch.float32 and speed_up > MUCH_FASTER:
        log.info("model.dtype bfloat16 would be faster than float32 on this machine", extra=rates)


def _speed_up(width: int) -> tuple[float, dict[str, int]]:
    """How many times as fast bfloat16 is as float32, and both rates.

    It multiplies as one layer of ``width`` does, on one thread, and takes a fraction of a second.
    """
    import torch

    rows = max(32, min(MOST_ROWS, MEASURED_WORK // (16 * width * width)))
    dtypes = (torch.float32, torch.bfloat16)
    float32_s, bfloat16_s = in_thread(lambda: [_layer_seconds(width, rows, dtype) for dtype in dtypes])
    work = 16 * width * width * rows / 1e9
    rates = {"float32_gflops": round(work / float32_s), "bfloat16_gflops": round(work / bfloat16_s)}
    return float32_s / bfloat16_s, rates


def _layer_seconds(width: int, rows: int, dtype: torch.dtype) -> float:
    """CPU seconds of the two multiplications of a feed-forward layer of the usual shape, on one thread."""
    import torch
    from torch.nn.functional import gelu, linear

    torch.set_num_threads(1)
    inner = torch.randn(4 * width, width, dtype=dtype)
    outer = torch.randn(width, 4 * width, dtype=dtype)
    vectors = torch.randn(rows, width, dtype=dtype)

    def layer() -> None:
        with torch.inference_mode():
            linear(gelu(linear(vectors, inner)), outer)

    layer()  # what is paid once
    return min(cpu_seconds(layer) for _ in range(ROUNDS))
