"""`inferstream run`: one worker until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from inferstream.cli.common import warn
from inferstream.errors import InferstreamError


def run(files: Sequence[Path], arguments: Sequence[str], trace: Path | None = None) -> None:
    """Load the settings, start a worker and wait for its end; raises InferstreamError.

    ``trace`` is the file for a trace of the stages.
    """
    # The tokenizer's own pool takes every core; it reads this before it is imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from inferstream.device.gpus import gpu_of
    from inferstream.settings import cores, device_kind, load_settings, parse_flags, resolve
    from inferstream.settings.machine import HASH_MODEL
    from inferstream.telemetry.logs import configure

    loaded = load_settings(files, os.environ, parse_flags(list(arguments)))
    warn(loaded)
    settings = resolve(loaded.settings, device_kind(loaded.settings), cores())
    configure(settings.telemetry.log_format, settings.telemetry.log_level)
    if settings.model.id != HASH_MODEL:
        gpu_of(settings.model.device)  # what this machine has not is told before Kafka is asked for anything

    from inferstream import app
    from inferstream.cli.main import report

    embedded = settings.kafka.bootstrap_servers == ["embedded"]
    error: InferstreamError | None = None
    try:
        if embedded:
            from inferstream.tools.embedded import EmbeddedBroker

            with EmbeddedBroker() as broker:
                for topic in (*settings.input.topics, settings.output.topic, settings.dead_letter.topic):
                    broker.create_topic(topic)
                print(f"bootstrap={broker.bootstrap}", flush=True)
                kafka = settings.kafka.model_copy(update={"bootstrap_servers": [broker.bootstrap]})
                asyncio.run(app.run(settings.model_copy(update={"kafka": kafka}), embedded=True, trace=trace))
        else:
            asyncio.run(app.run(settings, trace=trace))
    except InferstreamError as caught:
        error = caught
    if error is not None:
        report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # A model that was still loading, or a batch that hangs on the device, must not hold the exit.
    os._exit(error.exit_code if error is not None else 0)
