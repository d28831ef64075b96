"""What the worker finds by itself for settings that are not set, each with the sentence that says why."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from typing import Any

from inferstream.errors import SettingsError
from inferstream.settings.tree import MAX_TOPIC_NAME, MIB, Settings

WINDOW_BATCHES = 16  # below about 16 batches in the window, padding grows
MAX_PREPARE_THREADS = 32  # beyond it the threads wait for the interpreter's lock more than they work

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768, "hash": 65_536}
BUFFER_DOCUMENTS = {"cpu": 2048, "cuda": 16_384, "hash": 8192}
BUFFER_BYTES = {"cpu": 64 * MIB, "cuda": 256 * MIB, "hash": 64 * MIB}

Derivations = dict[str, tuple[Any, str]]


def derive_names(settings: Settings) -> Settings:
    """Fill what follows from other settings: the dead-letter topic, the client id, the commit interval, the
    transactional id."""
    found: Derivations = {}
    if not settings.dead_letter.topic and settings.output.topic:
        name = f"{settings.output.topic}.dead-letters"
        if len(name) > MAX_TOPIC_NAME:
            raise SettingsError(
                f"dead_letter.topic: {name[:40]}… (derived from output.topic) is longer than the "
                f"{MAX_TOPIC_NAME} characters that Kafka allows; set dead_letter.topic"
            )
        found["dead_letter.topic"] = (name, "output.topic with .dead-letters")
    if not settings.kafka.client_id:
        found["kafka.client_id"] = (f"inferstream-{socket.gethostname()}", "the host's name")
    delivery = settings.delivery
    if delivery.guarantee == "exactly-once" and "commit_interval_ms" not in delivery.model_fields_set:
        found["delivery.commit_interval_ms"] = (100, "what readers wait for under exactly-once")
    if delivery.guarantee == "exactly-once" and settings.kafka.transactional_id is None:
        unique = f"{settings.kafka.group_id}-{uuid.uuid4().hex[:12]}"
        found["kafka.transactional_id"] = (unique, "kafka.group_id and what no other worker has")
    return _filled(settings, found)


def resolve(settings: Settings, device: str, cores: int) -> Settings:
    """Fill what depends on the device (``cpu``, ``cuda``, ``hash``) and the cores; see ``Settings.derived``.

    What only the model or a topic can tell stays None: ``model.max_length``, ``model.compute_threads``,
    ``output.max_message_bytes``, ``dead_letter.max_message_bytes``.  Raises SettingsError when what is set
    leaves no room for what is derived.
    """
    settings = derive_names(settings)
    model, batch, buffer = settings.model, settings.batch, settings.buffer
    found: Derivations = {}

    if model.device == "auto":
        why = {
            "cpu": "no NVIDIA GPU here that torch can use",
            "cuda": "there is an NVIDIA GPU",
            "hash": "builtin:hash runs on the CPU",
        }[device]
        found["model.device"] = ("cuda" if device == "cuda" else "cpu", why)
    if model.dtype == "float16" and device == "cpu":
        raise SettingsError(
            "model.dtype: float16 is not for CPUs: use float32, or bfloat16 where the CPU has it"
        )

    batch_tokens = batch.max_tokens
    if batch_tokens is None:
        batch_tokens, why = BATCH_TOKENS[device], f"by device ({device})"
        if model.max_length is not None and model.max_length > batch_tokens:
            batch_tokens, why = model.max_length, "model.max_length, so that one full document fits"
        found["batch.max_tokens"] = (batch_tokens, why)
    elif model.max_length is not None and batch_tokens < model.max_length:
        raise SettingsError(
            f"batch.max_tokens: {batch_tokens} is below model.max_length ({model.max_length}), so that a "
            "full document would fit no batch; raise batch.max_tokens or lower model.max_length"
        )

    if buffer.max_tokens is None:
        why = f"{WINDOW_BATCHES} x batch.max_tokens ({batch_tokens}), to choose documents of like length from"
        found["buffer.max_tokens"] = (WINDOW_BATCHES * batch_tokens, why)
    elif buffer.max_tokens < batch_tokens:
        raise SettingsError(
            f"buffer.max_tokens: {buffer.max_tokens} is below batch.max_tokens ({batch_tokens}), so that no "
            f"batch would ever be full; set at least {batch_tokens}, better {WINDOW_BATCHES * batch_tokens}"
        )

    if buffer.max_documents is None:
        found["buffer.max_documents"] = (BUFFER_DOCUMENTS[device], f"by device ({device})")
    if buffer.max_bytes is None:
        size = BUFFER_BYTES[device]
        found["buffer.max_bytes"] = (size, f"by device ({device}): {size // MIB} MiB")
    if settings.prepare.threads is None:
        found["prepare.threads"] = _prepare_threads(device, cores)
    return _filled(settings, found)


def _prepare_threads(device: str, cores: int) -> tuple[int, str]:
    of = f"of {cores} core{'s' * (cores != 1)}"
    if device == "cpu":
        return max(1, cores // 2), f"half {of}, the model computes on the others"
    return min(MAX_PREPARE_THREADS, max(1, cores - 1)), f"all but one {of}, at most {MAX_PREPARE_THREADS}"


def _filled(settings: Settings, found: Derivations) -> Settings:
    if not found:
        return settings
    sections: dict[str, dict[str, Any]] = {}
    for key, (value, _) in found.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    update = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    filled = settings.model_copy(update=update)
    filled._derived = {**settings._derived, **{key: why for key, (_, why) in found.items()}}
    return filled


def origins_of(settings: Settings, origins: Mapping[str, str]) -> dict[str, str]:
    """Key → where its value comes from, derivations included; ``origins`` as :class:`Loaded` has them."""
    return {**origins, **{key: f"derived: {why}" for key, why in settings.derived.items()}}
