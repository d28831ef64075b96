"""The forwards as they run on CUDA, with tensors that have shapes and a device and no numbers (FakeTensorMode).

It reaches PyTorch's own ``varlen_attn``, with the arguments it takes, and sees every operation on the way: what would
copy from the host to the GPU, or read a number back, within a forward.  What a kernel computes it does not see, nor
what transformers leaves out because it takes tensors without numbers for tracing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inferstream.device.forward import Shape
from inferstream.models import attention
from inferstream.models.packed import ARCHITECTURES, PackedForward
from inferstream.models.padded import Mask, PaddedForward
from inferstream.models.pooling import LEGACY_MODES, Head
from tests.test_models_execution import ALLOWED, tiny

HEAD = Head(tuple(LEGACY_MODES.values()), (torch.nn.functional.normalize,), normalizes=True)
READS_BACK = {"_local_scalar_dense", "item", "is_nonzero", "nonzero"}


class Watch(TorchDispatchMode):
    """``crossings``: operations that make a host wait for the GPU or the GPU for the host; ``called``: all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.called.add(name)
        if name in READS_BACK:
            self.crossings.append(name)  # before the call, which cannot give a number
        given = _devices((args, kwargs))
        found = func(*args, **(kwargs or {}))
        got = _devices(found)
        if ("cpu" in given and "cuda" in got) or ("cuda" in given and "cpu" in got):
            self.crossings.append(name)
        return found


def _devices(tree: Any) -> set[str]:
    """Where the tensors are; one of no dimension on the host is an argument of the launch, not a copy."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {each.device.type for each in tensors if each.device.type != "cpu" or each.dim()}


@contextmanager
def on_a_gpu_without_numbers(name: str) -> Iterator[Any]:
    """The architecture's small model in bfloat16, on a device called cuda."""
    model = tiny(name).to(torch.bfloat16)
    with (
        patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield model.to("cuda")


def watched(forward: Any, shape: Shape) -> tuple[Watch, Tensor]:
    """One forward of a batch already on the GPU."""
    slab = torch.empty(forward.slab_size(shape.tokens, shape.count), dtype=torch.int32, device="cuda")
    with Watch() as watch:
        rows = forward.forward(slab, shape)
    return watch, rows


@pytest.mark.parametrize("name", ALLOWED)
def test_forward_when_on_cuda_then_the_kernel_takes_it_and_nothing_crosses_to_or_from_the_host(
    name: str,
) -> None:
    assert tiny(name).config.model_type in ARCHITECTURES
    with on_a_gpu_without_numbers(name) as model:
        mask = Mask.CAUSAL if attention.is_causal(next(_attentions(model), model)) else Mask.KEYS
        padded = PaddedForward(model, HEAD, pad_id=1, mask=mask)
        by_padding, padded_rows = watched(padded, Shape(9, 9 * 16, 16))
        packed = PackedForward(model, HEAD, pad_id=1)
        by_packing, packed_rows = watched(packed, Shape(9, 100, 16))
        as_one, _ = watched(packed, Shape(1, 1, 1))

    for rows in (padded_rows, packed_rows):
        assert (rows.shape, rows.dtype, rows.device.type) == ((9, packed.width), torch.float32, "cuda")
    assert "_varlen_attn" in by_packing.called and "_varlen_attn" in as_one.called
    assert "_varlen_attn" not in by_padding.called
    assert by_padding.crossings == by_packing.crossings == as_one.crossings == []


def _attentions(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "is_causal"))


def test_watch_when_a_forward_reads_back_or_copies_from_the_host_then_it_sees_it() -> None:
    """Else the test above would prove nothing."""
    reads = Head(("mean",), (lambda vectors: vectors * float(vectors[0, 0]),))
    copies = Head(("mean",), (lambda vectors: vectors + torch.ones(1).to(vectors.device),))
    with on_a_gpu_without_numbers("bert") as model:
        forward = PackedForward(model, HEAD)
        forward._head = copies
        watch, _ = watched(forward, Shape(9, 100, 16))
        forward._head = reads
        reading = Watch()
        slab = torch.empty(forward.slab_size(100, 9), dtype=torch.int32, device="cuda")
        with pytest.raises(DataDependentOutputException), reading:
            forward.forward(slab, Shape(9, 100, 16))

    assert len(watch.crossings) == 1
    assert reading.crossings in (["item"], ["_local_scalar_dense"])
