"""Loads what ``model.*`` names: the task, and the device that runs it.  The one entry is :func:`load`.

Nothing here imports torch before it is known that a model needs it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inferstream.device import Device, Runner
from inferstream.device.cpu import CpuDevice
from inferstream.errors import ModelError, SettingsError
from inferstream.models.files import locate, one_line, read_json, transformer_folder
from inferstream.models.warmup import Costs, warm_up
from inferstream.settings import Settings, cores
from inferstream.tasks import ModelInfo, Task
from inferstream.tasks.hash import MAX_LENGTH as HASH_MAX_LENGTH
from inferstream.tasks.hash import MODEL_ID as HASH_MODEL
from inferstream.tasks.hash import WIDTH as HASH_WIDTH
from inferstream.tasks.hash import HashRunner, HashTask

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
OFFSET_POSITIONS = frozenset(("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl"))
"""Model types whose first position is the padding id + 1, so that this many fewer tokens fit."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A warm model.  ``max_length`` in tokens, ``dimensions`` of a vector; ``costs`` of a sample document."""

    task: Task
    device: Device
    info: ModelInfo
    max_length: int
    dimensions: int
    costs: Costs


def load(settings: Settings, encode_embedding: EncodeEmbedding) -> Loaded:
    """Load and warm the model that resolved ``settings`` name; ``encode_embedding`` makes outputs of vectors.

    Raises ModelError when the model cannot be had, SettingsError when a setting does not fit it.
    """
    if settings.model.id == HASH_MODEL:
        return _load_hash(settings, encode_embedding)
    if settings.model.device == "cuda":
        raise SettingsError("model.device: cuda is not in this version yet; set model.device to cpu")
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
    dtype = _cpu_dtype(model.dtype)
    files = locate(model.id, model.revision)
    # Read when tokenizers first works in a process: its own pool of threads would take every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        sentence = _SentenceFiles.read(files.folder)
        tokenizer, own_length = _load_tokenizer(sentence)
        encoder, positions = _load_transformer(sentence, dtype)
    except ModelError as error:
        raise ModelError(f"model.id {model.id}: {error}") from error
    except Exception as error:  # whatever transformers makes of files that are not as they should be
        log.debug("loading failed", exc_info=True)
        raise ModelError(
            f"model.id {model.id}: it could not be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error

    hard_limit = positions or own_length
    default = min(n for n in (sentence.max_length or own_length, hard_limit) if n is not None)
