"""`inferstream topics`: make the topics of a service."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from inferstream.cli.common import Bootstrap, ConfigFiles, checked_topic, load
from inferstream.errors import SettingsError

# What the protocol's fields hold; the brokers refuse less, and say so.
MOST_PARTITIONS = 2**31 - 1
MOST_REPLICAS = 2**15 - 1

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Create the topics of a service.")


@app.callback()
def topics() -> None:
    """Create the topics of a service.

    \b
    inferstream topics create --config service.yaml --dry-run
    """


@app.command(short_help="Create what is missing, and leave alone what exists.")
def create(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]…",
            help="Topics to create; otherwise input, output and dead-letter topic of the settings.",
        ),
    ] = None,
    partitions: Annotated[
        int | None,
        typer.Option(
            "--partitions",
            min=1,
            max=MOST_PARTITIONS,
            metavar="N",
            help="Of each new topic; otherwise as many as the input topic has, or 8.",
        ),
    ] = None,
    replication: Annotated[
        int | None,
        typer.Option(
            "--replication",
            min=1,
            max=MOST_REPLICAS,
            metavar="N",
            help="Replicas of each; otherwise 3, or the number of brokers if that is less.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Create nothing; the brokers say whether they would.")
    ] = False,
    bootstrap: Bootstrap = None,
    config: ConfigFiles = None,
) -> None:
    """Create what is missing; say how what exists differs, and leave it alone.

    A line per topic goes to stdout.  Output and dead-letter topic take records 64 KiB larger than the input's;
    the dead-letter topic is not compacted and keeps its records for 30 days.

    \b
    inferstream topics create --config service.yaml --partitions 12
    inferstream topics create --bootstrap localhost:9092 --partitions 8 --replication 1 documents
    """
    settings = load(config, bootstrap)

    from inferstream.tools.topics import Wanted, create_topics, wanted_topics

    wanted = (
        [Wanted(checked_topic("NAME", name), partitions, replication) for name in dict.fromkeys(names)]
        if names
        else wanted_topics(settings, partitions, replication)
    )
    if not wanted:
        raise SettingsError("no topic: name some, or give settings with input.topics and output.topic")
    for report in asyncio.run(create_topics(settings.kafka, wanted, dry_run=dry_run)):
        typer.echo(str(report))
