"""Loads what ``model.*`` names: the task, and the device that runs it.  The one entry is :func:`load`.

Nothing here imports torch before it is known that a model needs it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inferstream.device import Device, Runner
from inferstream.device.cpu import CpuDevice
from inferstream.device.gpus import dtype_on, gpu_of, gpus_for, peak_on
from inferstream.errors import ModelError, SettingsError
from inferstream.models.cpu_dtype import FASTEST, cpu_dtype, faster_dtype, say_if_another_is_faster
from inferstream.models.files import locate, one_line, read_json, transformer_folder
from inferstream.models.positions import most_tokens
from inferstream.models.warmup import Costs, warm_up
from inferstream.settings import Settings, cores
from inferstream.tasks import ModelInfo, Task
from inferstream.tasks.hash import MAX_LENGTH as HASH_MAX_LENGTH
from inferstream.tasks.hash import MODEL_ID as HASH_MODEL
from inferstream.tasks.hash import WIDTH as HASH_WIDTH
from inferstream.tasks.hash import HashRunner, HashTask

if TYPE_CHECKING:
    from inferstream.device.forward import Forward
    from inferstream.device.peaks import Peak
    from inferstream.models.encoder import Encoder
    from inferstream.models.flops import Flops
    from inferstream.models.pooling import Head
    from inferstream.models.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

EncodeEmbedding = Callable[[np.ndarray], dict[str, Any]]

SENTENCE_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
NO_LIMIT = 8192  # tokens; for the few models whose files name none


@dataclass(frozen=True, slots=True)
class Loaded:
    """A warm model: ``max_length`` in tokens, ``dimensions`` of a vector, ``costs`` of a sample document.

    ``flops`` are the model's operations and ``peak`` what the device can do, None where nobody knows.
    """

    task: Task
    device: Device
    info: ModelInfo
    max_length: int
    dimensions: int
    costs: Costs
    flops: Flops | None = None
    peak: Peak | None = None

    @property
    def execution(self) -> str:
        """``packed`` (no padding is computed) or ``padded``."""
        return "padded" if self.device.padded else "packed"


def load(settings: Settings, encode_embedding: EncodeEmbedding) -> Loaded:
    """Load and warm the model that resolved ``settings`` name; ``encode_embedding`` makes outputs of vectors.

    Raises ModelError when the model cannot be had, SettingsError when a setting does not fit it.
    """
    if settings.model.id == HASH_MODEL:
        return _load_hash(settings, encode_embedding)
    return _load_encoder(settings, encode_embedding)


def _load_hash(settings: Settings, encode_embedding: EncodeEmbedding) -> Loaded:
    model = settings.model
    max_length = _max_length(settings, HASH_MAX_LENGTH, HASH_MAX_LENGTH, special=0)
    task = HashTask(max_length, model.long_documents, model.max_chunks, encode_embedding)
    runner = HashRunner()
    costs = warm_up(task, runner)
    # It holds the interpreter's lock all the time, so a second thread would only wait for the first.
    device = CpuDevice(runner, model.compute_threads or 1, "hash")
    return Loaded(task, device, task.model, max_length, HASH_WIDTH, costs)


def _load_encoder(settings: Settings, encode_embedding: EncodeEmbedding) -> Loaded:
    model = settings.model
    gpu = gpu_of(model.device)
    dtype = cpu_dtype(model.dtype) if gpu is None else dtype_on(model.dtype, gpu)
    trust = model.trust_remote_code
    if trust:
        log.warning(
            "model.trust_remote_code is on: Python code that comes with the model runs with all our rights",
            extra={"model": model.id, "revision": model.revision or "not pinned"},
        )
    files = locate(model.id, model.revision, with_code=trust)
    # Read when tokenizers first works in a process: its own pool of threads would take every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        sentence = read_sentence_files(files.folder)
        tokenizer, tokenizer_length, ids = load_tokenizer(sentence, trust_remote_code=trust)
        transformer = load_transformer(sentence, dtype, ids, trust_remote_code=trust)
        dtype = transformer.dtype
        if gpu is None:
            if model.dtype != FASTEST:
                say_if_another_is_faster(transformer.model)
            encoder = transformer.on_cpu(type_ids=tokenizer.type_ids)
            width = encoder.width
        else:
            free = gpus_for(transformer.model, gpu, any_gpus="model.device" in settings.derived)
            forward = transformer.on_gpus(free, type_ids=tokenizer.type_ids)
            width = forward.width
    except SettingsError:
        raise
    except ModelError as error:
        raise ModelError(f"model.id {model.id}: {error}") from error
    except Exception as error:  # whatever transformers makes of files that are not as they should be
        log.debug("loading failed", exc_info=True)
        if not trust and "trust_remote_code" in str(error):
            raise ModelError(
                f"model.id {model.id}: it needs Python code of its own, which is not run: read the code, pin "
                "model.revision and set model.trust_remote_code=true, or take another model"
            ) from None
        why = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"model.id {model.id}: it could not be loaded: {why}") from error

    from inferstream.tasks.embed import EmbedTask

    most = transformer.positions or tokenizer_length or NO_LIMIT
    own = min(most, sentence.max_length or tokenizer_length or most)
    max_length = _max_length(settings, own, most, special=tokenizer.single.added)
    info = ModelInfo(model.id, files.revision, dtype)
    task = EmbedTask(
        tokenizer,
        info,
        max_length,
        model.long_documents,
        model.max_chunks,
        encode_embedding,
        prompt=sentence.prompt,
        normalizes=transformer.head.normalizes,
    )
    peak = None
    if gpu is None:
        costs = warm_up(task, encoder)
        device = _cpu_device(settings, encoder, costs)
    else:
        if len(free) > 1:
            device, costs = _spread_device(settings, task, forward, transformer.model, max_length)
        else:
            device, costs = _cuda_device(settings, task, forward, gpu, max_length, ids)
            peak = peak_on(gpu, dtype)
    _check_worst_batch(settings, costs, max_length, device.max_tokens)
    return Loaded(task, device, info, max_length, width, costs, transformer.flops(), peak)


def _cuda_device(
    settings: Settings, task: Task, forward: Forward, gpu: int, max_length: int, ids: int
) -> tuple[Device, Costs]:
    """The warm GPU, and what a document costs on it; ``forward`` is on it, ``ids`` from 0 to below are valid."""
    from inferstream.device.cuda import CudaDevice
    from inferstream.device.streams import CudaStreams

    assert settings.batch.max_tokens  # resolved at start
    device = CudaDevice(
        forward,
        CudaStreams(gpu),
        max_tokens=settings.batch.max_tokens,
        max_length=max_length,
        slots=settings.device.staging_slots,
        graphs=settings.device.cuda_graphs,
        vocabulary=ids,
    )
    # The CPU time of a batch is that of launching it; how fast the GPU is, its own events know.
    return device, replace(warm_up(task, device), tokens_per_s=device.tokens_per_s)


def _spread_device(
    settings: Settings, task: Task, forward: Forward, model: Any, max_length: int
) -> tuple[Device, Costs]:
    """As :func:`_cuda_device`, for a model that is spread over several GPUs."""
    from inferstream.device.spread import SpreadRunner, spread_device

    assert settings.batch.max_tokens  # resolved at start
    indices = {parameter.device.index for parameter in model.parameters()}
    gpus = sorted(index for index in indices if index is not None)
    runner = SpreadRunner(forward, model.device, gpus)
    name = "cuda:" + ",".join(map(str, gpus))
    budget = settings.batch.max_tokens
    device, tokens_per_s = spread_device(runner, name, max_tokens=budget, max_length=max_length)
    return device, replace(warm_up(task, runner), tokens_per_s=tokens_per_s)


def _cpu_device(settings: Settings, runner: Runner, costs: Costs) -> Device:
    threads = settings.model.compute_threads
    if threads is None:
        available = cores()
        threads = costs.compute_threads(available)
        chosen = {
            "compute_threads": threads,
            "cores": available,
            "prepare_us": round(costs.prepare_s * 1e6),
            "compute_us": round(costs.compute_s * 1e6),
            "finish_us": round(costs.finish_s * 1e6),
        }
        log.info("compute threads chosen from the CPU time of a sample document", extra=chosen)
    return CpuDevice(runner, threads)


def _max_length(settings: Settings, own: int, most: int, *, special: int) -> int:
    """``model.max_length``, or the model's ``own``; ``most`` is what the model can take at all."""
    wanted = settings.model.max_length
    if wanted is None:
        return own
    if wanted > most:
        raise SettingsError(
            f"model.max_length: {wanted} is above what {settings.model.id} can read ({most} tokens)"
        )
    if wanted <= special:
        raise SettingsError(
            f"model.max_length: {wanted} leaves no room for text, as {settings.model.id} adds {special} "
            f"tokens; set at least {special + 1}"
        )
    return wanted


def _check_worst_batch(settings: Settings, costs: Costs, max_length: int, most: int | None) -> None:
    """A partition that is revoked waits for the batches that run: none may outlast the time there is.

    ``most`` is how many tokens the device's memory holds, if it is known.
    """
    limit_s = settings.delivery.revoke_timeout_s
    budget = settings.batch.max_tokens or 0
    tokens = max(budget if most is None else min(budget, most), max_length)
    worst_s = tokens / costs.tokens_per_s
    if worst_s < limit_s:
        return
    fitting = int(limit_s * costs.tokens_per_s * 0.9)
    remedy = f"set batch.max_tokens to at most {fitting}"
    if fitting < max_length:
        remedy = f"set batch.max_tokens and model.max_length to at most {fitting}"
    raise SettingsError(
        f"batch.max_tokens: a batch of {tokens} tokens takes this machine about {worst_s:.0f} s, longer than "
        f"delivery.revoke_timeout_s ({limit_s:g}); {remedy}, or raise delivery.revoke_timeout_s"
    )


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """What a model's sentence-transformers files say; defaults where it has none.

    ``modules`` are those after the transformer, None without modules.json.  ``max_length`` in tokens.
    """

    folder: Path
    transformer: Path
    modules: list[dict[str, Any]] | None
    max_length: int | None
    lowercase: bool
    prompt: str
    truncate_dim: int | None


def read_sentence_files(folder: Path) -> SentenceFiles:
    """Raises ModelError for what is there and not supported."""
    modules = read_json(folder / "modules.json", missing=[])
    if modules and str(modules[0]["type"]).rsplit(".", 1)[-1] != "Transformer":
        raise ModelError(f"its first module {modules[0]['type']} is not supported, only a Transformer is")
    inner = transformer_folder(folder)
    found = (read_json(inner / name, missing={}) for name in SENTENCE_FILES)
    sentence: dict[str, Any] = next((config for config in found if config), {})
    supported = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    for key, value in supported.items():
        if sentence.get(key, value) != value:
            raise ModelError(f"{key} {sentence[key]!r} of sentence_bert_config.json is not supported")
    if {"text", "common"} & set(sentence.get("processing_kwargs") or ()):
        raise ModelError("processing_kwargs of sentence_bert_config.json are not supported")
    config = read_json(folder / "config_sentence_transformers.json", missing={})
    prompts, name = config.get("prompts") or {}, config.get("default_prompt_name")
    if name is not None and name not in (*prompts, "query", "document"):
        raise ModelError(f"its default_prompt_name {name!r} is not among the prompts it has")
    return SentenceFiles(
        folder,
        inner,
        modules[1:] if modules else None,
        sentence.get("max_seq_length"),
        bool(sentence.get("do_lower_case")),
        prompts.get(name) or "" if name else "",
        config.get("truncate_dim"),
    )


def load_tokenizer(
    sentence: SentenceFiles, *, trust_remote_code: bool = False
) -> tuple[TextTokenizer, int | None, int]:
    """The tokenizer, its own limit in tokens if it has one, and how many ids it can give."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    from inferstream.models.tokenizer import TextTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        sentence.transformer, local_files_only=True, trust_remote_code=trust_remote_code
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("its tokenizer has no tokenizer.json and cannot be converted to one")
    if sentence.lowercase:
        described = json.dumps(json.loads(backend.to_str())["normalizer"])
        if '"Lowercase"' not in described and '"lowercase": true' not in described:
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    limit = tokenizer.model_max_length
    text_tokenizer = TextTokenizer(
        backend,
        type_ids="token_type_ids" in tokenizer.model_input_names,
        keep_end=tokenizer.truncation_side == "left",
    )
    ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return text_tokenizer, limit if limit < 1 << 30 else None, ids


@dataclass(frozen=True, slots=True)
class Transformer:
    """A model's weights in host memory and its head; ``positions`` is the most tokens it takes (None: no limit)."""

    model: Any
    head: Head
    pad_id: int
    positions: int | None

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def flops(self) -> Flops | None:
        from inferstream.models.flops import flops_of

        return flops_of(self.model)

    def on_cpu(self, *, type_ids: bool) -> Encoder:
        """``type_ids``: the tokenizer gives token types."""
        from inferstream.models.execution import cpu_encoder

        return cpu_encoder(self.model, self.head, pad_id=self.pad_id, type_ids=type_ids)

    def on_gpus(self, free: Mapping[int, int], *, type_ids: bool) -> Forward:
        """Move the weights to the one GPU, or spread them over several, by the bytes ``free`` on each.

        Raises SettingsError if they cannot be spread, ModelError if the model then gives other vectors.
        """
        import torch

        from inferstream.models.execution import best_forward

        if len(free) > 1:
            return self._spread(free, type_ids=type_ids)
        [index] = free
        self.model.to(torch.device("cuda", index))
        return best_forward(self.model, self.head, pad_id=self.pad_id, type_ids=type_ids)

    def _spread(self, free: Mapping[int, int], *, type_ids: bool) -> Forward:
        """The forward of the model as accelerate dispatches it: padded, with the mask that any model takes.

        What packing and the faster masks hand to the layers, accelerate's hooks would not move to the layers' GPUs.
        """
        from inferstream.device.spread import SAME_COSINE, SpreadRunner, dispatch, plan
        from inferstream.models.padded import Mask, PaddedForward

        def run() -> tuple[Forward, np.ndarray]:
            device = self.model.device
            head = self.head.to(device)
            forward = PaddedForward(self.model, head, pad_id=self.pad_id, type_ids=type_ids, mask=Mask.FLAT)
            ids = np.arange(1, 9, dtype=np.int32) % self.model.get_input_embeddings().weight.shape[0]
            [row] = SpreadRunner(forward, device, ()).run([ids])
            return forward, row / np.linalg.norm(row)

        parts = plan(self.model, free)
        _, expected = run()
        dispatch(self.model, parts)
        forward, row = run()  # the first batch also completes what accelerate left undone
        if not row @ expected >= SAME_COSINE:
            raise ModelError(
                f"spread over {len(free)} GPUs it gives another vector than in host memory "
                f"(cosine {row @ expected:.3f})"
            )
        log.warning("the model is spread over several GPUs: documents run padded, one batch after the other")
        return forward


def load_transformer(
    sentence: SentenceFiles, dtype: str, ids: int, *, trust_remote_code: bool = False
) -> Transformer:
    """Read the weights into host memory; ``dtype`` is torch's name or FASTEST, ``ids`` how many the tokenizer gives.

    Raises ModelError for a model that cannot be served.
    """
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as transformers_logging

    from inferstream.models.pooling import Head, load_head, pools_prompt

    # Untyped functions.  What matters of the report on the weights is checked below.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.from_pretrained(
        sentence.transformer, local_files_only=True, trust_remote_code=trust_remote_code
    )
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder, which is not supported")
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    if sentence.modules is None:
        mode = "lasttoken" if causal and getattr(config, "is_causal", True) else "mean"
        head = Head((mode,), truncate_dim=sentence.truncate_dim)
        log.warning("the model has no modules.json: pooling is a guess", extra={"pooling": mode})
    else:
        head = load_head(sentence.folder, sentence.modules, sentence.truncate_dim)
        if sentence.prompt and not pools_prompt(sentence.folder, sentence.modules):
            raise ModelError("it does not pool the tokens of its prompt (include_prompt): not supported")
    if dtype == FASTEST:
        dtype = faster_dtype(config.hidden_size)
    config.use_cache = False  # keys and values of earlier tokens: only generation needs them
    transformer, report = AutoModel.from_pretrained(
        sentence.transformer,
        config=config,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise ModelError(f"its weights lack {len(missing)} tensors, the first is {missing[0]}")
    rows = transformer.get_input_embeddings().weight.shape[0]
    if ids > rows:
        raise ModelError(f"its tokenizer gives ids up to {ids - 1}, the model only knows {rows}")
    pad_id = getattr(config, "pad_token_id", None) or 0
    return Transformer(transformer.eval(), head, pad_id, most_tokens(config, pad_id))
