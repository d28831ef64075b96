"""A model on several GPUs, each with some of its layers: for weights that one GPU cannot hold.

accelerate moves what a layer gets to the layer's GPU, on whatever stream is current there.  The order that
:mod:`inferstream.device.cuda` keeps is one of three streams of one GPU, so a spread model is not run there but on
the default streams, which PyTorch orders when it copies between GPUs, and one batch after the other: the host packs
it, queues it and waits for its rows.  Only one GPU computes at a time, and none while a batch is packed.  That is the
price of a model that would not run otherwise; one that fits is never spread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from inferstream.device.cpu import CpuDevice
from inferstream.device.failures import first_line, is_out_of_memory
from inferstream.device.forward import Forward
from inferstream.device.gpus import GIB, WEIGHTS_SHARE, weights_bytes
from inferstream.errors import DeviceFailed, OutOfMemory, SettingsError

log = logging.getLogger(__name__)

SAME_COSINE = 0.99
"""What a vector of the spread model and of the same in host memory have at least in common: bfloat16 rounds."""


def plan(model: Any, free: Mapping[int, int]) -> dict[str, int]:
    """Which GPU holds which part of a transformers model, by the bytes ``free`` on each.

    Raises SettingsError when they do not hold it together or accelerate is not installed.
    """
    weights, room = weights_bytes(model), {gpu: int(WEIGHTS_SHARE * size) for gpu, size in free.items()}
    names = f"cuda:{min(free)} to cuda:{max(free)}"
    too_large = SettingsError(
        f"model.id: its weights are {weights / GIB:.1f} GiB, and {names} have {sum(free.values()) / GIB:.1f} GiB free "
        f"in all, of which {WEIGHTS_SHARE:.0%} may be weights, no layer in two parts; take more or larger GPUs, or a "
        "smaller model.dtype"
    )
    if weights > sum(room.values()):
        raise too_large
    if find_spec("accelerate") is None:
        raise SettingsError(
            f"model.device: the weights ({weights / GIB:.1f} GiB) fit no GPU alone, and to spread them over {names} "
            "accelerate is missing; install inferstream[accelerate]"
        )
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {"no_split_module_classes": list(model._no_split_modules or ()), "dtype": model.dtype}
    # Balanced first, so that the rest for batches is alike everywhere; what that leaves over goes where it fits.
    for memory in (get_balanced_memory(model, dict(room), **whole), room):
        found: dict[str, Any] = infer_auto_device_map(model, max_memory=dict(memory), **whole)
        if set(found.values()) <= set(free):
            return found
    raise too_large  # accelerate would keep the rest in host memory, and copy it for every batch


def dispatch(model: Any, parts: Mapping[str, Any]) -> None:
    """Move the parts of a model to their devices, and let accelerate's hooks move what they get."""
    from accelerate import dispatch_model

    skipped = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, device_map=dict(parts), skip_keys=skipped, force_hooks=True)


class SpreadRunner:
    """A dispatched model behind :class:`inferstream.device.Runner`; ``device`` is where its inputs go.

    ``gpus`` are all it runs on.
    """

    def __init__(self, forward: Forward, device: torch.device, gpus: Sequence[int]) -> None:
        self.padded = forward.padded
        self._forward = forward
        self._device = device
        self._gpus = gpus

    def enter_thread(self) -> None:
        if self._gpus:
            torch.cuda.set_device(self._device)

    def run(self, items: Sequence[Any]) -> np.ndarray:
        """Raises OutOfMemory, DeviceFailed, or whatever the model raises."""
        try:
            forward = self._forward
            shape = forward.shape([len(item) for item in items])
            slab = np.empty(forward.slab_size(shape.tokens, shape.count), dtype=np.int32)
            shape = forward.pack(items, slab)
            with torch.inference_mode():
                rows = forward.forward(torch.from_numpy(slab).to(self._device), shape)
                return rows.cpu().numpy()  # waits for the GPU the rows are on, and so for those before it
        except Exception as error:
            failure = OutOfMemory(first_line(error)) if is_out_of_memory(error) else error
        self._check_alive()
        raise failure

    def _check_alive(self) -> None:
        """A GPU that keeps an error is dead; raises DeviceFailed."""
        try:
            for gpu in self._gpus:
                torch.cuda.synchronize(gpu)
            if self._gpus:
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceFailed(f"a GPU of the model failed for good: {first_line(error)}") from error


def spread_device(
    runner: SpreadRunner, name: str, *, max_tokens: int, max_length: int
) -> tuple[CpuDevice, float]:
    """The device, and its tokens per second with a batch of the longest pieces.

    ``max_tokens`` is halved until such a batch fits.  Raises SettingsError when not even one piece does, DeviceFailed
    when a GPU does not work.
    """
    runner.enter_thread()
    budget = max(max_tokens, max_length)
    while True:
        count = budget // max_length
        items = [np.zeros(max_length, dtype=np.int32)] * count
        try:
            runner.run(items)  # the first batch completes what accelerate left undone
            started = time.monotonic()
            runner.run(items)
            break
        except OutOfMemory as error:
            if count == 1:
                raise SettingsError(
                    f"model.max_length: a document of {max_length} tokens does not fit the memory of {name} beside "
                    f"the model ({error}); lower it, or free the GPUs' memory"
                ) from error
            budget = max(budget // 2, max_length)
    tokens_per_s = count * max_length / max(time.monotonic() - started, 1e-9)
    # The host waits for each batch, so its clock is the GPUs': together they are busy while one of them is.
    return CpuDevice(runner, 1, name, clock=time.monotonic, max_tokens=budget), tokens_per_s
