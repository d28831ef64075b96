"""The CUDA device on a GPU: what a machine without one cannot show.  ``pytest -m gpu``, or with nothing but pytest,
torch and transformers (tests/test_device_alone.py imports it so)::

    PYTHONPATH=service:. python -m pytest -c /dev/null --rootdir . --confcutdir tests/gpu -p no:cacheprovider tests/gpu

Models have random weights; no network is needed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inferstream.device import Flight
from inferstream.device.cuda import CudaDevice
from inferstream.device.forward import Shape
from inferstream.device.streams import CudaStreams
from inferstream.errors import DeviceFailed, OutOfMemory
from tests.support.streams import check_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS, MAX_ITEMS, MAX_LENGTH = 4096, 256, 128
VOCABULARY = 1000


class SumForward:
    """A row is a piece's sum of ids, its length and its first id; before it, the GPU is kept busy for a while.

    The slab holds ids [T] and bounds [count + 1].  ``cycles``: of the GPU's clock, drawn anew for every batch, so that
    copies and forwards end in ever other orders.
    """

    width = 3
    padded = False

    def __init__(self, seed: int = 0, cycles: int = 2_000_000) -> None:
        self._random = random.Random(seed)
        self._cycles = cycles

    def slab_size(self, max_tokens: int, max_items: int) -> int:
        return max_tokens + max_items + 1

    def shape(self, lengths: Sequence[int]) -> Shape:
        return Shape(len(lengths), sum(lengths), max(lengths))

    def pack(self, items: Sequence[Any], slab: np.ndarray, capacity: Shape | None = None) -> Shape:
        lengths = [len(item) for item in items]
        shape = capacity or self.shape(lengths)
        slab[: shape.tokens] = 0
        slab[: sum(lengths)] = np.concatenate(items)
        slab[shape.tokens : shape.tokens + shape.count + 1] = shape.tokens
        slab[shape.tokens] = 0
        slab[shape.tokens + 1 : shape.tokens + 1 + len(items)] = np.cumsum(lengths)
        return shape

    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        if self._cycles and not torch.cuda.is_current_stream_capturing():
            torch.cuda._sleep(self._random.randrange(self._cycles))  # type: ignore[no-untyped-call]  # private
        ids = slab[: shape.tokens].long()
        bounds = slab[shape.tokens : shape.tokens + shape.count + 1].long()
        sums = torch.cat((ids.new_zeros(1), ids.cumsum(0)))
        starts, ends = bounds[:-1], bounds[1:]
        first = ids.index_select(0, starts.clamp(max=shape.tokens - 1))
        return torch.stack((sums[ends] - sums[starts], ends - starts, first), dim=1).float()


def made(forward: Any, *, slots: int = 3, graphs: int = 0, vocabulary: int = VOCABULARY) -> CudaDevice:
    return CudaDevice(
        forward,
        CudaStreams(0),
        max_tokens=MAX_TOKENS,
        max_length=MAX_LENGTH,
        max_items=MAX_ITEMS,
        slots=slots,
        graphs=graphs,
        vocabulary=vocabulary,
    )


def documents(source: random.Random, count: int, vocabulary: int = VOCABULARY) -> list[np.ndarray]:
    return [
        np.array(
            [source.randrange(1, vocabulary) for _ in range(source.randint(1, MAX_LENGTH))], dtype=np.int32
        )
        for _ in range(count)
    ]


def through(device: CudaDevice, batches: Sequence[Sequence[Any]]) -> list[Flight]:
    """Every slot kept full, in one thread."""
    free = list(range(device.slots))
    flights: list[Flight] = []
    waiting = list(batches)
    while len(flights) < len(batches):
        while free and waiting:
            device.launch(free.pop(), waiting.pop(0))
        flight = device.wait()
        assert flight is not None
        free.append(flight.slot)
        flights.append(flight)
    return flights


def rows_of(flight: Flight) -> np.ndarray:
    assert flight.error is None, flight.error
    assert flight.rows is not None
    return flight.rows


def bert() -> tuple[Any, Any]:
    """A small BERT with random weights on the GPU in bfloat16, and its head."""
    transformers = pytest.importorskip("transformers")
    from inferstream.models.pooling import Head

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model.to(device="cuda", dtype=torch.bfloat16), Head(("mean",))


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it to forbid, from then on, everything that waits for the GPU or for a whole stream."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hot path waits for the whole GPU or a whole stream")

    def forbid() -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", refuse)
        monkeypatch.setattr(torch.cuda.Stream, "synchronize", refuse)
        torch.cuda.set_sync_debug_mode("error")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("graphs", [0, 64])
def test_batches_when_forwards_take_ever_other_times_then_each_gets_its_own_rows(
    slots: int, graphs: int
) -> None:
    source = random.Random(slots)
    device = made(SumForward(slots), slots=slots, graphs=graphs)
    batches = [documents(source, source.randint(1, 30)) for _ in range(500)]

    flights = through(device, batches)

    for items, flight in zip(batches, flights, strict=True):
        expected = [[float(item.sum()), float(len(item)), float(item[0])] for item in items]
        assert rows_of(flight).tolist() == expected


@pytest.mark.parametrize("graphs", [0, 64])
def test_hot_path_when_warm_then_it_never_waits_for_the_whole_gpu(no_sync: Any, graphs: int) -> None:
    from inferstream.models.execution import best_forward

    device = made(best_forward(*bert()), graphs=graphs)
    source = random.Random(1)
    batches = [documents(source, source.randint(1, 40)) for _ in range(100)]
    no_sync()

    flights = through(device, batches)

    assert [flight.error for flight in flights] == [None] * len(batches)


@pytest.mark.parametrize("graphs", [0, 64])
def test_rows_when_packed_or_replayed_are_those_of_each_document_alone(graphs: int) -> None:
    from inferstream.models.execution import best_forward

    model, head = bert()
    items = documents(random.Random(2), 60)
    alone = []
    with torch.inference_mode():
        for item in items:
            hidden = model(torch.from_numpy(item).long()[None].cuda()).last_hidden_state
            alone.append(hidden[0].float().mean(dim=0).cpu())
    forward = best_forward(model, head)
    assert not forward.padded, "the packed kernel was not taken; see the log"
    device = made(forward, graphs=graphs)

    flights = through(device, [items[at : at + 4] for at in range(0, len(items), 4)])

    rows = torch.from_numpy(np.concatenate([rows_of(flight) for flight in flights]))
    cosine = torch.nn.functional.cosine_similarity(rows, torch.stack(alone))
    assert float(cosine.min()) >= 0.999
    assert bool(device._graphs.shapes) == bool(graphs), "graphs were asked for and not taken; see the log"


def test_memory_when_20000_batches_ran_is_flat() -> None:
    device = made(SumForward(cycles=0), graphs=8)
    source = random.Random(3)
    batches = [documents(source, source.randint(1, 30)) for _ in range(200)]
    through(device, batches)
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    retries = device._streams.allocation_retries()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for _ in range(100):
        through(device, batches)

    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned
    assert device._streams.allocation_retries() == retries
    assert torch.cuda.memory_allocated() <= held + (1 << 20)
    assert torch.cuda.memory_reserved() <= reserved + (64 << 20)


def test_times_when_batches_follow_each_other_then_they_are_in_order_and_the_gaps_are_small() -> None:
    device = made(SumForward(cycles=20_000_000))
    source = random.Random(4)

    flights = through(device, [documents(source, 20) for _ in range(50)])

    check_times(flights)
    busy = sum(flight.busy_s for flight in flights[3:])
    idle = sum(flight.idle_s for flight in flights[3:])
    assert idle / (idle + busy) < 0.02


def test_times_when_there_is_one_slot_then_the_stream_stands_idle_before_every_batch() -> None:
    device = made(SumForward(cycles=2_000_000), slots=1)

    flights = through(device, [documents(random.Random(5), 20) for _ in range(20)])

    assert flights[0].idle_s == 0.0
    assert all(flight.idle_s > 0.0 for flight in flights[1:])


class ReadsBack(SumForward):
    """Waits for the GPU in its forward, which cannot be recorded."""

    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        int(slab[0])
        return super().forward(slab, shape)


def test_graphs_when_the_forward_cannot_be_recorded_then_batches_run_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = made(ReadsBack(cycles=0), graphs=8)

    [flight] = through(device, [[np.array([5, 6], dtype=np.int32)]])

    assert rows_of(flight).tolist() == [[11.0, 2.0, 5.0]]
    assert not device._graphs.shapes
    assert "no CUDA graphs" in caplog.text
    # Nothing was captured, so nothing is left of a capture: another forward has its graphs and its rows.
    device = made(SumForward(cycles=0), graphs=8)
    [flight] = through(device, [[np.array([5, 6], dtype=np.int32)]])
    assert rows_of(flight).tolist() == [[11.0, 2.0, 5.0]]
    assert len(device._graphs.shapes) == 8


class Hungry(SumForward):
    """Wants more memory than any GPU has for a batch with a certain id."""

    def pack(self, items: Sequence[Any], slab: np.ndarray, capacity: Shape | None = None) -> Shape:
        self.hungry = any(int(item[0]) == VOCABULARY - 1 for item in items)
        return super().pack(items, slab, capacity)

    def forward(self, slab: Tensor, shape: Shape) -> Tensor:
        if self.hungry:
            torch.empty(1 << 44, dtype=torch.uint8, device=slab.device)
        return super().forward(slab, shape)


def test_batch_when_memory_is_out_then_it_says_so_and_the_others_go_on() -> None:
    device = made(Hungry())
    plenty = np.array([VOCABULARY - 1], dtype=np.int32)

    flights = through(device, [[np.array([n], dtype=np.int32)] if n != 3 else [plenty] for n in range(1, 9)])

    assert [isinstance(flight.error, OutOfMemory) for flight in flights] == [n == 3 for n in range(1, 9)]


def test_graphs_when_recorded_from_the_largest_then_they_share_its_memory() -> None:
    from inferstream.models.execution import best_forward

    forward = best_forward(*bert())
    reserved = torch.cuda.memory_reserved()
    one = made(forward, graphs=1)
    torch.cuda.empty_cache()
    for_one = torch.cuda.memory_reserved() - reserved
    many = made(forward, graphs=64)
    torch.cuda.empty_cache()
    for_many = torch.cuda.memory_reserved() - reserved - for_one

    assert len(one._graphs.shapes) == 1 and one._graphs.shapes[0].tokens == MAX_TOKENS
    assert len(many._graphs.shapes) > 10 and many._graphs.shapes[-1].tokens == MAX_TOKENS
    assert for_many <= 2 * for_one


DEATH = """
import os, sys
import numpy as np, torch
from tests.gpu.test_cuda import SumForward, made, through

class Fatal(SumForward):
    def forward(self, slab, shape):
        rows = super().forward(slab, shape)
        table = torch.zeros(1000, device=slab.device)
        return rows + table[slab[: shape.tokens].long()].sum()  # an id beyond the table is a device-side assert

device = made(Fatal())
flights = through(device, [[np.array([n if n != 4 else 10**9], dtype=np.int32)] for n in range(1, 12)])
errors = [type(flight.error).__name__ for flight in flights]
print(errors)
first = errors.index("DeviceFailed")
assert set(errors[first:]) == {"DeviceFailed"} and set(errors[:first]) <= {"NoneType"}, errors
assert first <= 3
sys.stdout.flush()
RETURN
"""


@pytest.mark.parametrize(("end", "code"), [("os._exit(0)", 0), ("del device, flights; sys.exit(5)", 5)])
def test_device_when_a_kernel_asserts_then_every_batch_from_then_on_fails_for_good(
    end: str, code: int
) -> None:
    """An end of the interpreter as well: what is pinned is not freed there, which would abort the process."""
    command = [sys.executable, "-c", DEATH.replace("RETURN", end)]
    env = {"PYTHONPATH": f"{ROOT / 'service'}:{ROOT}", "PATH": "/usr/bin:/bin"}

    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **env}, cwd=ROOT
    )

    assert done.returncode == code, done.stdout + done.stderr[-2000:]
    assert DeviceFailed.__name__ in done.stdout
