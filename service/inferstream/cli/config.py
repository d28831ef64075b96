"""`inferstream config`: what the settings are and where each comes from, and whether they are right."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from inferstream.cli.common import ConfigFiles, warn
from inferstream.settings import (
    SETTINGS,
    Loaded,
    Settings,
    cores,
    device_kind,
    help_text,
    load_settings,
    origins_of,
    parse_flags,
    resolve,
    show,
    value_of,
)

app = typer.Typer(no_args_is_help=True, help="Show the settings and where each comes from, or check them.")

TAKES_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


class SettingsCommand(TyperCommand):
    """A command that takes every setting as a flag, and lists them all at the end of its help.

    For ``@app.command(cls=SettingsCommand, context_settings=TAKES_SETTINGS)``; ``ctx.args`` is then what
    :func:`parse_flags` reads.
    """

    def get_help(self, ctx: Any) -> str:
        return f"{super().get_help(ctx)}\n\n{help_text()}".lstrip("\n")


class Format(StrEnum):
    TABLE = "table"
    YAML = "yaml"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Row:
    """One setting as it is: its value (None until the start tells, stars for a secret), its origin."""

    key: str
    value: Any
    origin: str

    @property
    def text(self) -> str:
        auto = SETTINGS[self.key].auto
        if auto is not None and self.value in (None, "", "auto"):
            return f"auto ({auto.replace('`', '')})"
        return show(self.value)


@app.command("show", cls=SettingsCommand, context_settings=TAKES_SETTINGS)
def show_command(
    ctx: typer.Context,
    config: ConfigFiles = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="A table for people; a settings file again, or JSON, for tools."),
    ] = Format.TABLE,
) -> None:
    """Print every setting with its value and where it comes from.

    What a worker would find by itself on this machine is shown with how it is found; secrets are starred.

    inferstream config show --config prod.yaml --batch.max-tokens 4096
    """
    loaded, settings = _load(config, ctx.args, require=False)
    rows = list(_rows(settings, origins_of(settings, loaded.origins)))
    if form is Format.JSON:
        typer.echo(
            json.dumps({row.key: {"value": row.value, "origin": row.origin} for row in rows}, indent=2)
        )
    elif form is Format.YAML:
        typer.echo("\n".join(_yaml(rows)))
    elif sys.stdout.isatty():
        Console().print(_table(rows))
    else:
        typer.echo("\n".join(_aligned(rows)))


@app.command(
    "check",
    short_help="Check all settings as `run` does.",
    cls=SettingsCommand,
    context_settings=TAKES_SETTINGS,
)
def check_command(
    ctx: typer.Context,
    config: ConfigFiles = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="Also ask Kafka (topics, limits, the group) and load the model.")
    ] = False,
) -> None:
    """Check all settings as `run` does, and end with `ok` or with one line for each mistake (exit 2).

    inferstream config check --config prod.yaml --connect
    """
    from inferstream.kafka.security import security_options

    _, settings = _load(config, ctx.args, require=True)
    security_options(settings.kafka.security)
    if connect:
        from inferstream.kafka.preflight import check
        from inferstream.telemetry.logs import configure

        configure("text", "warning")
        for finding in asyncio.run(check(settings)):
            typer.echo(finding)
        typer.echo(_model(settings))
    typer.echo("ok")


def _model(settings: Settings) -> str:
    """Load the model as `run` does and say what it is; raises ModelError or SettingsError."""
    from inferstream.models.loading import load

    loaded = load(settings, lambda vector: {})
    loaded.device.close()
    return (
        f"model.id {loaded.info.id}: revision {loaded.info.revision}, {loaded.info.dtype}, {loaded.dimensions} "
        f"dimensions, at most {loaded.max_length} tokens, {loaded.device.lanes} compute threads"
    )


def _load(files: list[Path] | None, arguments: list[str], *, require: bool) -> tuple[Loaded, Settings]:
    loaded = load_settings(files or [], flags=parse_flags(arguments), require=require)
    warn(loaded)
    return loaded, resolve(loaded.settings, device_kind(loaded.settings), cores())


def _rows(settings: Settings, origins: dict[str, str]) -> Iterator[Row]:
    for key in SETTINGS:
        value = value_of(settings, key)
        if isinstance(value, SecretStr):
            value = show(value)
        elif isinstance(value, Path):
            value = str(value)
        yield Row(key, value, origins[key])


def _table(rows: Iterable[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold", min_width=16)
    table.add_column("from", overflow="fold")
    section = None
    for row in rows:
        path, _, name = row.key.rpartition(".")
        if section not in (None, path):
            table.add_row()
        section = path
        style = "dim" if row.origin == "default" else "cyan" if row.origin.startswith("derived") else "green"
        table.add_row(Text.assemble((f"{path}.", "dim"), name), Text(row.text), Text(row.origin, style=style))
    return table


def _aligned(rows: list[Row]) -> Iterator[str]:
    keys = max(len(row.key) for row in rows)
    values = max(len(row.text) for row in rows)
    for row in rows:
        yield f"{row.key:<{keys}}  {row.text:<{values}}  {row.origin}"


def _yaml(rows: list[Row]) -> Iterator[str]:
    """A settings file with these values; what it must not hold, or only the start will tell, is a comment."""
    earlier: list[str] = []
    for row in rows:
        *path, name = row.key.split(".")
        for depth, part in enumerate(path):
            if earlier[: depth + 1] != path[: depth + 1]:
                yield f"{'  ' * depth}{part}:"
        earlier = path
        unset = row.value in (None, "", []) or SETTINGS[row.key].is_secret
        value = row.text if unset else json.dumps(row.value, ensure_ascii=False)
        yield f"{'  ' * len(path)}{'# ' * unset}{name}: {value}  # {row.origin}"
