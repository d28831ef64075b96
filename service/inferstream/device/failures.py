"""What a GPU fails with, as torch says it, and what has to outlive the failure."""

from __future__ import annotations

import ctypes

import torch

from inferstream.errors import OutOfMemory

OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """The allocator has a type for it; the libraries below it have only words."""
    if isinstance(error, torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of what torch says, which adds pages of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def keep_for_ever(thing: object) -> None:
    """Nothing that ``thing`` holds is freed any more, not even at the end of the interpreter.

    For pinned memory whose GPU has died.  To free it PyTorch records an event on the streams that used it
    (``CachingHostAllocatorImpl::free``), which a dead context refuses, and what a destructor throws aborts the process:
    SIGABRT in place of our exit code.  A list would not do: the interpreter empties its modules at its end.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
