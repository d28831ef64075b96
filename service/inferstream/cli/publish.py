"""`inferstream publish`: documents into a topic."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inferstream.cli.common import Bootstrap, ConfigFiles, checked_topic, load
from inferstream.errors import Incomplete, SettingsError

if TYPE_CHECKING:
    from inferstream.settings import Settings
    from inferstream.tools.publish import Counts, Options

PLAIN_INTERVAL_S = 5.0
BAR_INTERVAL_S = 0.1


def publish(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE|FOLDER|-]…", help="What to publish; otherwise stdin."),
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option("--topic", metavar="NAME", help="Otherwise input.topics of the settings, if it is one."),
    ] = None,
    form: Annotated[
        Literal["auto", "jsonl", "text", "files"],
        typer.Option(
            "--format",
            help="jsonl: a document per line; text: a text per line; files: a text per file.  auto: files for a "
            "folder, jsonl if the first line begins with {, else text.",
        ),
    ] = "auto",
    key_field: Annotated[
        str | None,
        typer.Option(
            "--key-field",
            metavar="POINTER",
            help="The field that becomes the record's key, as in id or /user/id.  A document without it has no key.",
        ),
    ] = None,
    id_from: Annotated[
        Literal["path", "line", "none"] | None,
        typer.Option(
            "--id-from",
            help="The id of a document without one: FILE or FILE:LINE, the line's number, or none, which makes it "
            "topic:partition:offset.  Otherwise path for text and files, none for jsonl.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send lines or files as they are, and refuse nothing.")
    ] = False,
    bootstrap: Bootstrap = None,
    config: ConfigFiles = None,
) -> None:
    """Publish documents and wait until the brokers have acknowledged each.

    A document that a worker would refuse (no text, not JSON, …) is refused here, counted, and named by line;
    the others are sent.  Exit 9 if any document was not accepted.

    \b
    inferstream publish --topic documents documents.jsonl
    inferstream publish --topic documents --key-field id --id-from line notes.txt
    inferstream publish --topic documents ~/articles/
    zcat dump.jsonl.gz | inferstream publish --topic documents
    """
    settings = load(config, bootstrap)
    if topic is None:
        if len(settings.input.topics) != 1:
            raise SettingsError("--topic: not given, and the settings have no single topic in input.topics")
        topic = settings.input.topics[0]
    topic = checked_topic("--topic", topic)
    if not sources and sys.stdin.isatty():
        raise SettingsError(
            "nothing to publish: name files or folders, or pipe something in (`-` reads the terminal)"
        )

    from inferstream.tools.publish import Counts, Options

    options = Options(tuple(sources or ["-"]), topic, form, key_field, id_from, raw)
    counts = Counts()
    started = time.monotonic()
    done = False
    try:
        asyncio.run(_publish(settings, options, counts))
        done = True
    finally:
        if done or counts.accepted or counts.failed:
            _summary(options, counts, time.monotonic() - started)
    if counts.failed:
        raise Incomplete(
            f"{counts.failed:,} of {counts.accepted + counts.failed:,} documents were not accepted"
        )


async def _publish(settings: Settings, options: Options, counts: Counts) -> None:
    from inferstream.tools.publish import publish as send

    showing = asyncio.create_task(_bar(counts) if sys.stderr.isatty() else _plain(counts))
    try:
        await send(settings, options, counts)
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _bar(counts: Counts) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.fields[accepted]:,} accepted, {task.fields[failed]:,} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=counts.total_bytes, accepted=0, failed=0)
        try:
            while True:
                progress.update(
                    task,
                    total=counts.total_bytes,
                    completed=counts.read_bytes,
                    accepted=counts.accepted,
                    failed=counts.failed,
                )
                await asyncio.sleep(BAR_INTERVAL_S)
        finally:
            progress.update(task, completed=counts.read_bytes, accepted=counts.accepted, failed=counts.failed)


async def _plain(counts: Counts) -> None:
    before = 0
    while True:
        await asyncio.sleep(PLAIN_INTERVAL_S)
        share = f", {counts.read_bytes / counts.total_bytes:.0%} read" if counts.total_bytes else ""
        rate = (counts.accepted - before) / PLAIN_INTERVAL_S
        before = counts.accepted
        print(
            f"{counts.accepted:,} accepted, {counts.failed:,} failed{share}, {rate:,.0f}/s",
            file=sys.stderr,
            flush=True,
        )


def _summary(options: Options, counts: Counts, seconds: float) -> None:
    for problem in counts.problems:
        print(f"not accepted: {problem}", file=sys.stderr)
    if counts.failed > len(counts.problems):
        print(f"not accepted: … and {counts.failed - len(counts.problems):,} more", file=sys.stderr)
    if counts.keyless:
        print(
            f"without a key: {counts.keyless:,} documents have no {options.key_field} (--key-field)",
            file=sys.stderr,
        )
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in counts.reasons.most_common())
    print(
        f"{counts.accepted:,} accepted by {options.topic}, {counts.failed:,} failed"
        + (f" ({reasons})" if reasons else "")
        + f", {seconds:.1f} s, {counts.accepted / max(seconds, 0.001):,.0f}/s",
        file=sys.stderr,
    )
