"""Encoders of well-known shapes with random weights: as fast as the real ones, and nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inferstream.device.cuda import CudaDevice
from inferstream.device.forward import Forward
from inferstream.device.streams import CudaStreams

VOCABULARY = 30_522


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    layers: int
    width: int
    heads: int
    inner: int
    longest: int

    def flops_per_token(self, length: int) -> float:
        """Of a forward over documents of ``length`` tokens: products of weights, and of attention."""
        weights = 2 * (4 * self.width**2 + 2 * self.width * self.inner)
        return float(self.layers * (weights + 4 * length * self.width))


MINILM = Shape("MiniLM-L6", 6, 384, 12, 1536, 512)
BERT = Shape("BERT-base", 12, 768, 12, 3072, 512)


def model_of(shape: Shape, index: int = 0) -> Any:
    """The transformer on the GPU in bfloat16."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=shape.longest,
    )
    model: Any = BertModel(config, add_pooling_layer=False)
    return model.eval().to(device=torch.device("cuda", index), dtype=torch.bfloat16)


def forwards_of(model: Any) -> tuple[Forward, Forward | None]:
    """Padded, and packed if it can be; mean pooling and unit length, as sentence encoders do."""
    from torch.nn import functional

    from inferstream.models.execution import forwards
    from inferstream.models.pooling import Head

    head = Head(("mean",), (functional.normalize,), normalizes=True)
    return forwards(model, head)


def device_of(
    forward: Forward, shape: Shape, max_tokens: int, *, slots: int = 3, graphs: int = 0, index: int = 0
) -> CudaDevice:
    return CudaDevice(
        forward,
        CudaStreams(index),
        max_tokens=max_tokens,
        max_length=shape.longest,
        slots=slots,
        graphs=graphs,
        vocabulary=VOCABULARY,
    )
