"""The operations of a forward, against what PyTorch counts when it runs one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen3Config,
    XLNetConfig,
)

from inferstream.device.peaks import peak_of
from inferstream.models.flops import Flops, flops_of

LENGTH = 24
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(config: Any) -> Any:
    return AutoModel.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SMALL),
        MPNetConfig(**SMALL),
        DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        ModernBertConfig(
            **SMALL, global_attn_every_n_layers=2, local_attention=64, cls_token_id=1, sep_token_id=2
        ),
    ],
    ids=lambda config: str(config.model_type),
)
def test_flops_when_every_token_sees_all_then_they_are_what_pytorch_counts(config: Any) -> None:
    model = model_of(config)
    flops = flops_of(model)
    assert flops is not None
    model.pooler = None
    counter = FlopCounterMode(display=False)

    with torch.no_grad(), counter:
        model(input_ids=torch.ones(1, LENGTH, dtype=torch.long))

    assert flops.of(LENGTH) == counter.get_total_flops()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2),
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=lambda config: str(config.model_type),
)
def test_flops_when_the_model_is_causal_then_half_of_attention_is_not_counted(config: Any) -> None:
    model = model_of(config)
    flops = flops_of(model)
    assert flops is not None and flops.causal
    counter = FlopCounterMode(display=False)

    with torch.no_grad(), counter:
        model(input_ids=torch.ones(1, LENGTH, dtype=torch.long), use_cache=False)

    width = flops.layers[0][0]
    above = 2 * 4 * width * LENGTH * (LENGTH - 1) // 2  # pairs that PyTorch computes and throws away
    assert flops.of(LENGTH) + above == counter.get_total_flops()


@pytest.mark.parametrize(("causal", "pairs"), [(False, 5 + 2 * (4 + 3)), (True, 5 + 4 + 3)])
def test_flops_when_layers_have_a_window_then_only_what_is_within_counts(causal: bool, pairs: int) -> None:
    assert Flops(10.0, ((8, 3),), causal).of(5) == 50 + 4 * 8 * pairs


@pytest.mark.parametrize(
    "config",
    [
        AlbertConfig(**SMALL, embedding_size=16),
        DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        MixtralConfig(**SMALL, num_local_experts=2),
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16),
        XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=48),
    ],
    ids=lambda config: str(config.model_type),
)
def test_flops_when_the_shape_does_not_tell_then_there_are_none(config: Any) -> None:
    assert flops_of(model_of(config)) is None


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA H200 NVL", "bfloat16", 835),
        ("NVIDIA H100 80GB HBM3", "float16", 989),
        ("NVIDIA H100 80GB HBM3", "float32", 67),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA GH200 480GB", "bfloat16", 989),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40", "bfloat16", 181),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
        ("NVIDIA H100", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA A100-10C", "bfloat16", None),
        ("GRID A100D-40C", "bfloat16", None),
    ],
)
def test_peak_of_a_gpu_then_it_is_its_own_and_not_a_namesakes(
    name: str, dtype: str, tera: float | None
) -> None:
    peak = peak_of(name, dtype)

    assert (None if peak is None else peak.flops) == (None if tera is None else pytest.approx(tera * 1e12))
