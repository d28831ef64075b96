"""The few things a GPU is asked for: memory, three streams, the events between them, and graphs.

:class:`CudaStreams` is torch.cuda behind these protocols and holds no decision.  Everything that has to be right
(what waits for what) is in :mod:`inferstream.device.cuda`, which sees nothing but the protocols, so that the tests can
put a device in its place that does what is queued as late and in as odd an order as the events allow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream: it has happened when all that was queued there before it has ended."""

    def wait(self) -> None:
        """Block the calling thread, without spinning, until it has happened; raises what the device died of."""
        ...

    def after(self, earlier: Any) -> float:
        """Seconds from an ``earlier`` event of the same device to this one; both have happened."""
        ...


class Stream(Protocol):
    """Work that the device does in the order in which it was queued; nothing here waits for it."""

    def run(self, work: Callable[[], None]) -> None:
        """Call ``work``, which launches kernels: they are queued here.  Raises what ``work`` raises."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between the device and pinned memory; both contiguous and of one dtype."""
        ...

    def follow(self, event: Any) -> None:
        """What is queued from now on starts after the event."""
        ...

    def record(self) -> Event: ...


class Graph(Protocol):
    """Kernels recorded once and launched as one."""

    def replay(self) -> None:
        """Launch it where :meth:`Stream.run` is running us; its inputs and outputs are where they were recorded."""
        ...


class Streams(Protocol):
    """One GPU.  ``name`` as in ``model.device``; weights and default stream are on it as well."""

    name: str

    @property
    def h2d(self) -> Stream: ...

    @property
    def compute(self) -> Stream: ...

    @property
    def d2h(self) -> Stream: ...

    def enter_thread(self) -> None:
        """Called by a thread before anything else here: the current GPU belongs to the thread."""
        ...

    def array(self, *size: int, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """Memory on the GPU, or of the host and pinned; what is in it is not defined."""
        ...

    def settle(self) -> None:
        """Wait until the whole GPU has done all it was given, on every stream.  Only before the first batch."""
        ...

    def run_unwaited(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the compute stream; raises RuntimeError where it waits for the GPU.

        Only before the first batch.  What waits cannot be recorded, and PyTorch's allocator does not get over the
        attempt: before 2.12 (pull request 180395) a capture that fails at its end leaves the allocator believing that
        it goes on.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` launches on the compute stream; nothing is computed.

        Graphs share the memory of what they compute in between, so a result has to leave it within ``work``.
        """
        ...

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Run ``work`` on the compute stream; how many bytes it held at its peak beyond what there was."""
        ...

    def free_bytes(self) -> int:
        """How many bytes are free on the GPU; what the allocator keeps is not, so give that back before."""
        ...

    def give_back_memory(self) -> None:
        """Give the allocator's unused memory back.  The GPU may have to end its work first."""
        ...

    def allocation_retries(self) -> int:
        """How often the allocator found no memory, gave back all it did not use and tried again, since the start.

        It tells nobody, and the whole GPU ends its work meanwhile.
        """
        ...


class CudaEvent:
    """With its time, and waited for by sleeping: a thread that spins takes a core from those that prepare."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Its constructor has no types.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()

    def after(self, earlier: CudaEvent) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1000


class CudaStream:
    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as the event's

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream), torch.inference_mode():
            work()

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def follow(self, event: CudaEvent) -> None:
        self.stream.wait_event(event.event)

    def record(self) -> CudaEvent:
        return CudaEvent(self.stream)


class CudaStreams:
    """torch.cuda behind :class:`Streams`; makes the GPU the calling thread's."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device("cuda", index)
        self.enter_thread()
        self.h2d = CudaStream(self._device)
        self.compute = CudaStream(self._device)
        self.d2h = CudaStream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def enter_thread(self) -> None:
        # Without it a thread's first call would open a context on GPU 0, which costs hundreds of MiB there.
        torch.cuda.set_device(self._device)

    def array(self, *size: int, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        if pinned:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        return torch.empty(size, dtype=dtype, device=self._device)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def run_unwaited(self, work: Callable[[], None]) -> None:
        # Untyped functions.  The mode is the process's: nobody else uses the GPU before the first batch.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.compute.run(work)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, work: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.compute.stream), torch.inference_mode():
            # thread_local: what other threads do with the GPU meanwhile is not ours to forbid.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it fails as well, and would hide why
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def peak_bytes(self, work: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.compute.run(work)
        return torch.cuda.max_memory_allocated(self._device) - before

    def free_bytes(self) -> int:
        # What is reserved and not allocated is not added: most of it is the graphs', which nothing else can use.
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)

    def give_back_memory(self) -> None:
        torch.cuda.empty_cache()

    def allocation_retries(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))
