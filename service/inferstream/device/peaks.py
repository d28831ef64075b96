"""What a device could do at most, by its maker's data sheet: the denominator of ``model_flops_utilisation``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Peak:
    """``flops`` floating-point operations per second of the ``device`` (its name) in ``dtype``."""

    device: str
    dtype: str
    flops: float


PEAKS: Final[tuple[tuple[str, dict[str, float]], ...]] = (
    (r"GH200|H200(?! NVL)|H100.* HBM3|H100 SXM", {"half": 989, "float32": 67}),
    (r"H200 NVL", {"half": 835, "float32": 60}),
    (r"H100 NVL", {"half": 835, "float32": 60}),
    (r"H100 PCIe", {"half": 756, "float32": 51}),
    (r"A100", {"half": 312, "float32": 19.5}),
    (r"A30\b", {"half": 165, "float32": 10.3}),
    (r"A10\b", {"half": 125, "float32": 31.2}),
    (r"L40S\b", {"half": 362, "float32": 91.6}),
    (r"L40\b", {"half": 181, "float32": 90.5}),
    (r"L4\b", {"half": 121, "float32": 30.3}),
    (r"T4\b", {"float16": 65, "float32": 8.1}),
)
"""TFLOP/s by a part of the name that CUDA gives the GPU; NVIDIA's data sheets, as of 2025.

``half`` is float16 and bfloat16 on tensor cores with float32 sums, dense: the sheets of Ada and Hopper print twice as
much, with sparsity.  ``float32`` is without tensor cores, which is what PyTorch uses unless TF32 is allowed.  A GPU
with a lower power limit than the sheet's never gets there.  Boards that share a name with a weaker one are not here.
"""

PART_OF_A_GPU: Final = r"\bMIG\b|^GRID\b|-\d+[ACQ]\b"
"""MIG slices and virtual GPUs, which are named like the whole."""


def peak_of(device: str, dtype: str) -> Peak | None:
    """Of a GPU by the name that CUDA gives it; None where it is not known."""
    if re.search(PART_OF_A_GPU, device):
        return None
    for part, peaks in PEAKS:
        if re.search(rf"\b(?:{part})", device):
            found = peaks.get(dtype, peaks.get("half") if dtype in ("bfloat16", "float16") else None)
            return None if found is None else Peak(device, dtype, found * TERA)
    return None
