"""What the commands around a worker have in common: their options, and the settings they are for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferstream.errors import SettingsError

if TYPE_CHECKING:
    from inferstream.settings import Settings

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
    settings = load_settings(files or (), os.environ, flags, require=False).settings
    if not settings.kafka.bootstrap_servers:
        raise SettingsError(
            "kafka.bootstrap_servers: not set; give --bootstrap HOST:PORT, --config FILE or "
            "INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS"
        )
    return settings
