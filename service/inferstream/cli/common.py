"""What the commands around a worker have in common: their options, and the settings they are for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferstream.errors import SettingsError

if TYPE_CHECKING:
    from inferstream.settings import Loaded, Settings

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option("--config", metavar="FILE", help="A YAML file with settings; a later one wins."),
]
Bootstrap = Annotated[
    str | None,
    typer.Option(
        "--bootstrap",
        metavar="HOST:PORT,…",
        help="The brokers; otherwise kafka.bootstrap_servers of the settings.",
    ),
]


def load(files: Sequence[Path] | None, bootstrap: str | None) -> Settings:
    """The settings of files, environment and --bootstrap, with the brokers set; logs are for people."""
    from inferstream.settings import load_settings
    from inferstream.telemetry.logs import configure

    configure("text", "warning")
    flags = {"kafka.bootstrap_servers": bootstrap} if bootstrap else {}
    loaded = load_settings(files or (), os.environ, flags, require=False)
    warn(loaded)
    settings = loaded.settings
    if not settings.kafka.bootstrap_servers:
        raise SettingsError(
            "kafka.bootstrap_servers: not set; give --bootstrap HOST:PORT, --config FILE or "
            "INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS"
        )
    return settings


def warn(loaded: Loaded) -> None:
    """What the settings deserve a word about, a line each."""
    for warning in loaded.warnings:
        print(f"inferstream: warning: {warning}", file=sys.stderr)


def checked_topic(option: str, name: str) -> str:
    """The name as it is, if Kafka takes such a one; ``option`` says where it was given."""
    from inferstream.settings.tree import topic_name

    try:
        return topic_name(name)
    except ValueError as error:
        raise SettingsError(f"{option}: {name!r} {error}") from error
