"""Finds the files of a model: a folder, an installed package, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferstream.errors import ModelError

PACKAGE = "package:"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)
HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
HUB_IGNORED = ["onnx/*", "openvino/*", "gguf/*"]
PACKAGE_DEPTH = 3  # folders below a package in which its model is looked for


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder with a model and its ``revision``: a hub commit, or ``sha256:<12>`` of the weights."""

    folder: Path
    revision: str


def locate(model_id: str, revision: str | None = None, *, with_code: bool = False) -> ModelFiles:
    """Find a model's files, downloading them only for a hub id that is not cached.

    ``revision`` is a commit, tag or branch for a hub id; for a folder or package it must be what their
    weights hash to.  ``with_code`` downloads Python files as well.  Raises ModelError with one line that says what
    to do.
    """
    if model_id.startswith(PACKAGE):
        folder = _in_package(model_id)
    elif _is_path(model_id):
        folder = Path(model_id).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.id {model_id}: there is no such folder")
    else:
        folder = _from_hub(model_id, revision, with_code)
        _check(model_id, folder)
        commit = folder.name
        return ModelFiles(folder, commit if re.fullmatch("[0-9a-f]{40}", commit) else _hash(folder))
    _check(model_id, folder)
    found = _hash(folder)
    if revision not in (None, found):
        raise ModelError(f"model.id {model_id}: its weights are {found}, model.revision asks for {revision}")
    return ModelFiles(folder, found)


def transformer_folder(folder: Path) -> Path:
    """The folder of the transformer itself: older sentence-transformers models have it in one of its own."""
    modules = read_json(folder / "modules.json", missing=[])
    return folder / str(modules[0].get("path", "")) if modules else folder


def read_json(path: Path, missing: Any = None) -> Any:
    """The content of a JSON file; ``missing``, if given, when there is none.  Raises ModelError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise ModelError(f"the file {path} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"the file {path} cannot be read: {error}") from error


def _is_path(model_id: str) -> bool:
    return model_id.startswith(("/", "./", "../", "~")) or Path(model_id).is_dir()


def _in_package(model_id: str) -> Path:
    """The one model folder inside an installed package, found without importing the package."""
    name = model_id.removeprefix(PACKAGE)
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.id {model_id}: no package {name!r} is installed here; pip install it first")
    found: list[Path] = []
    level = [Path(place) for place in spec.submodule_search_locations]
    for _ in range(PACKAGE_DEPTH):
        found += [folder for folder in level if _looks_like_model(folder)]
        if found:
            break
        level = [
            entry
            for folder in level
            for entry in sorted(folder.iterdir())
            if entry.is_dir() and entry.name != "__pycache__"
        ]
    if not found:
        raise ModelError(
            f"model.id {model_id}: the package {name!r} holds no model (config.json and weights)"
        )
    if len(found) > 1:
        raise ModelError(
            f"model.id {model_id}: the package holds several models; "
            f"set model.id to one of these folders: {', '.join(map(str, found))}"
        )
    return found[0]


def _looks_like_model(folder: Path) -> bool:
    return (folder / "modules.json").is_file() or (
        (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    )


def _from_hub(model_id: str, revision: str | None, with_code: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=[*HUB_PATTERNS, "*.py"] if with_code else HUB_PATTERNS,
                ignore_patterns=HUB_IGNORED,
            )
        )
    except errors.HFValidationError:
        why = "it is neither a folder nor a name on the Hugging Face hub"
    except errors.RevisionNotFoundError:
        why = f"the hub has no revision {revision!r} of it (model.revision)"
    except errors.GatedRepoError:
        why = "the hub lets only those read it who were granted it; set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "there is no such folder, and no such model on the hub (or it is private: set HF_TOKEN)"
    except errors.LocalEntryNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        why = (
            f"there is no such folder, the local cache ({constants.HF_HUB_CACHE}) does not hold it{at}, "
            "and the hub cannot be reached or HF_HUB_OFFLINE is set; give a folder or package:NAME, or "
            "download it first"
        )
    except (OSError, ValueError, RuntimeError) as error:
        why = f"it could not be downloaded: {one_line(error)}"
    raise ModelError(f"model.id {model_id}: {why}")


def one_line(error: BaseException) -> str:
    """What an error of a library says, short enough for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _check(model_id: str, folder: Path) -> None:
    """Raise ModelError naming the first file that a model needs and the folder has not."""
    inner = transformer_folder(folder)

    def has(*patterns: str) -> bool:
        return any(path.is_file() for pattern in patterns for path in inner.glob(pattern))

    if not has("config.json"):
        raise ModelError(f"model.id {model_id}: {inner} is no model: config.json is missing")
    if not _weights(inner):
        if has("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt"):
            raise ModelError(
                f"model.id {model_id}: {inner} has no model.safetensors; weights in other formats can run "
                "code and are never loaded: convert it with save_pretrained(…, safe_serialization=True)"
            )
        raise ModelError(f"model.id {model_id}: {inner} is no model: model.safetensors is missing")
    if not has(*TOKENIZER_FILES):
        raise ModelError(f"model.id {model_id}: {inner} is no model for text: tokenizer.json is missing")


def _weights(folder: Path) -> list[Path]:
    """The weight files in order, none if one of several is missing."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    parts = sorted(set(read_json(index).get("weight_map", {}).values()))
    for part in parts:
        if not (folder / part).is_file():
            raise ModelError(f"{folder} is no whole model: {part} is missing")
    return [folder / part for part in parts]


def _hash(folder: Path) -> str:
    """``sha256:`` and 12 digits over all weight files; half a second per GB."""
    state = hashlib.sha256()
    for path in _weights(transformer_folder(folder)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    return f"sha256:{state.hexdigest()[:12]}"
