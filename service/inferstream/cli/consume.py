"""`inferstream consume`: records as lines of JSON."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from inferstream.cli.common import Bootstrap, ConfigFiles, checked_topic, load
from inferstream.errors import SettingsError

if TYPE_CHECKING:
    from inferstream.documents import Record


def consume(
    topic: Annotated[
        list[str] | None,
        typer.Option(
            "--topic", metavar="NAME", help="Repeat it for more; otherwise output.topic of the settings."
        ),
    ] = None,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Start at the oldest record, not at the next that comes.")
    ] = False,
    max_records: Annotated[
        int | None, typer.Option("--max", min=1, metavar="N", help="End after so many records.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0, metavar="SECONDS", help="End after so long; exit 9 if --max was not reached."
        ),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Write vectors that are in base64 as lists of numbers.")
    ] = False,
    headers: Annotated[
        bool,
        typer.Option(
            "--headers",
            help="Write the whole record: topic, partition, offset, timestamp_ms, key, headers and value.",
        ),
    ] = False,
    bootstrap: Bootstrap = None,
    config: ConfigFiles = None,
) -> None:
    """Write the records of a topic to stdout, one line of JSON each.

    Joins no group and commits nothing, so it disturbs no one.  Records of open and aborted transactions are
    left out.  A value that is JSON is written as it is, other text as a JSON string, a null value as null.

    \b
    inferstream consume --topic embeddings --from-beginning --max 3
    inferstream consume --topic embeddings --decode | jq -c '.output.embedding[:4]'
    inferstream consume --topic embeddings.dead-letters --from-beginning --timeout 5 --headers \\
      | jq -r '.headers["inferstream.error.reason"]' | sort | uniq -c
    """
    settings = load(config, bootstrap)
    given = [checked_topic("--topic", name) for name in topic or ()]
    names = tuple(dict.fromkeys(given or ([settings.output.topic] if settings.output.topic else [])))
    if not names:
        raise SettingsError("--topic: not given, and the settings have no output.topic")

    from inferstream.tools.consume import Format, Selection, line
    from inferstream.tools.consume import consume as read

    form = Format(decode=decode, whole=headers)
    out = sys.stdout.buffer

    reader = select.poll()
    reader.register(out, 0)  # of a pipe without a reader it tells, without anything being written

    def write(records: Sequence[Record]) -> None:
        if not records and any(event & select.POLLERR for _, event in reader.poll(0)):
            raise BrokenPipeError
        out.writelines(line(record, form) + b"\n" for record in records)
        out.flush()

    def ready(partitions: int) -> None:
        if sys.stderr.isatty() and not from_beginning:
            print(
                f"waiting for new records on {partitions} partitions of {', '.join(names)} "
                "(--from-beginning reads all)",
                file=sys.stderr,
            )

    try:
        asyncio.run(
            read(settings.kafka, Selection(names, from_beginning, max_records, timeout), write, ready)
        )
    except BrokenPipeError:
        # Who read our output has seen enough.  The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
