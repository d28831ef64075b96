"""Which GPU a worker gets, and whether it can be had: refusals in one line, each naming its setting.

torch is imported here only when a GPU was asked for.
"""

from __future__ import annotations

from typing import Any

from inferstream.device.peaks import Peak, peak_of
from inferstream.errors import SettingsError

GIB = 1 << 30
BFLOAT16_FROM = (8, 0)  # compute capability (Ampere); older GPUs only emulate it

WEIGHTS_SHARE = 0.8
"""Of a GPU's free memory, how much may be weights where there are other GPUs; the rest is for batches."""


def gpu_of(device: str) -> int | None:
    """The index of the GPU that ``model.device`` names (``cuda`` is the first); None: the CPU.

    Raises SettingsError when it cannot be had: torch without CUDA, no driver, no GPU, not so many GPUs.
    """
    if device == "cpu":
        return None
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        raise SettingsError(
            f"model.device: {device} needs a torch that was built for CUDA, and this one ({torch.__version__}) was "
            "not; install another (https://pytorch.org/get-started), or set model.device to cpu"
        )
    if not torch.cuda.is_available():
        raise SettingsError(
            f"model.device: {device} cannot be had: torch {torch.__version__} finds no NVIDIA GPU or no driver for "
            f"CUDA {torch.version.cuda} here (does nvidia-smi see one?); set model.device to cpu"
        )
    count = torch.cuda.device_count()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise SettingsError(
            f"model.device: {device} is not there: this process sees {count} GPU{'s' * (count != 1)} ({there}); "
            "CUDA_VISIBLE_DEVICES hides GPUs and numbers the others anew"
        )
    return index


def dtype_on(wanted: str, index: int) -> str:
    """The number type on a GPU; ``auto`` and ``fastest`` are bfloat16 where the GPU has it, else float32."""
    import torch

    if wanted in ("float32", "float16"):
        return wanted
    if torch.cuda.get_device_capability(index) >= BFLOAT16_FROM:
        return "bfloat16"
    if wanted != "bfloat16":
        return "float32"
    raise SettingsError(
        f"model.dtype: cuda:{index} ({torch.cuda.get_device_name(index)}) has no bfloat16 in hardware, which needs "
        "compute capability 8.0; set model.dtype to float16 or float32"
    )


def peak_on(index: int, dtype: str) -> Peak | None:
    """What the GPU can do in ``dtype`` by its data sheet; None where it is not known."""
    import torch

    return peak_of(torch.cuda.get_device_name(index), dtype)


def weights_bytes(model: Any) -> int:
    """What the weights and buffers of a torch module take."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gpus_for(model: Any, index: int, *, any_gpus: bool) -> dict[int, int]:
    """The GPUs that a model (a torch module, still in host memory) runs on, with their free bytes.

    The one of ``index``, or all that the process sees if the weights would leave too little of it for batches and
    ``any_gpus``: nobody asked for that one.  Raises SettingsError if it is too small for the weights themselves and
    there is no other way.
    """
    import torch

    weights = weights_bytes(model)
    free, total = torch.cuda.mem_get_info(index)
    count = torch.cuda.device_count()
    others_too = any_gpus and count > 1
    if weights <= (WEIGHTS_SHARE * free if others_too else free):
        return {index: free}
    if others_too:
        return {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(count)}
    others = " or another one, or set model.device to auto to spread the model over all" if count > 1 else ""
    raise SettingsError(
        f"model.id: its weights are {weights / GIB:.1f} GiB, and cuda:{index} has {free / GIB:.1f} of "
        f"{total / GIB:.1f} GiB free; free its memory, take a larger GPU{others} or a smaller model.dtype"
    )
