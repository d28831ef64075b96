"""`inferstream dead-letters`: look at the documents that got no result, and send them again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from inferstream.cli.common import Bootstrap, ConfigFiles, checked_topic, load
from inferstream.errors import Incomplete, SettingsError

if TYPE_CHECKING:
    from inferstream.settings import Settings
    from inferstream.tools.dead_letters import Filter, Letter
    from inferstream.tools.dead_letters_replay import Options, Replayer, Tally

INTERVAL_S = 5.0
ROWS_AT_ONCE = 200  # of one table
BYTES_AT_ONCE = 64 << 20

Topic = Annotated[
    str | None,
    typer.Option("--topic", metavar="NAME", help="Otherwise dead_letter.topic of the settings."),
]
Reasons = Annotated[
    list[str] | None,
    typer.Option("--reason", metavar="REASON", help="Only letters with it; repeat it for more."),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="TOPIC[:PARTITION[:OFFSET]]",
        help="Only letters of documents that were read there; repeat it for more.",
    ),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME",
        help="Only letters from then on: 2h, 1d12h, 45m for so long ago, or a date and time, local unless it "
        "names a zone.",
    ),
]
Until = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="Only letters before then; as --since.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Lines of JSON on a terminal too; a pipe or file always gets them.")
]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def dead_letters() -> None:
    """Look at the documents that got no result, and replay them.

    \b
    inferstream dead-letters list --config service.yaml --since 2h
    inferstream dead-letters show --config service.yaml documents:3:17
    inferstream dead-letters replay --config service.yaml --reason out_of_memory --dry-run
    """


@app.command("list", short_help="The letters and their reasons, a line each.")
def list_letters(
    reasons: Reasons = None,
    sources: Sources = None,
    since: Since = None,
    until: Until = None,
    most: Annotated[
        int | None, typer.Option("--max", min=1, metavar="N", help="End after so many letters.")
    ] = None,
    as_json: Json = False,
    topic: Topic = None,
    bootstrap: Bootstrap = None,
    config: ConfigFiles = None,
) -> None:
    """List dead letters: where, when, why, from which document, and how often it was replayed.

    A table on a terminal, otherwise a line of JSON each; the number per reason goes to stderr.  Joins no group and
    changes nothing.  Partition by partition, oldest first; letters that are replayed stay until the topic's
    retention deletes them.

    \b
    inferstream dead-letters list --config service.yaml
    inferstream dead-letters list --config service.yaml --since 1d --reason invalid_json --reason missing_text
    inferstream dead-letters list --config service.yaml --source documents:3
    inferstream dead-letters list --config service.yaml | jq -r .reason | sort | uniq -c
    """
    settings = load(config, bootstrap)
    name, chosen = _topic(settings, topic), _filter(reasons, sources, since, until)
    counts: Counter[str] = Counter()
    with _writer(as_json) as write:

        def found(letters: Sequence[Letter]) -> None:
            write(letters)
            counts.update(letter.reason or "no reason" for letter in letters)

        asyncio.run(_list(settings, name, chosen, most, found))
    print(f"{_number(counts.total(), 'dead letter')} in {name}{_by(counts)}", file=sys.stderr)


@app.command(short_help="All of a letter: reason, headers, key and value.")
def show(
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            help="PARTITION:OFFSET in the dead-letter topic, or TOPIC:PARTITION:OFFSET of the document.",
        ),
    ],
    as_json: Json = False,
    topic: Topic = None,
    bootstrap: Bootstrap = None,
    config: ConfigFiles = None,
) -> None:
    """Show all of a dead letter, its value included.

    Named by where the document was read, as in logs and ids, the whole topic is searched, and each letter that it
    became is shown.  What is no text is written in base64.  Exit 9 if there is none.

    \b
    inferstream dead-letters show --config service.yaml documents:3:17
    inferstream dead-letters show --config service.yaml 0:4
    inferstream dead-letters show --config service.yaml 0:4 | jq -r .value > document.json
    """
    settings = load(config, bootstrap)
    name = _topic(settings, topic)

    from inferstream.tools.dead_letters import place_of
    from inferstream.tools.dead_letters_lines import details, whole
    from inferstream.tools.dead_letters_reading import find

    wanted = place_of("PLACE", f"{name}:{place}" if place.count(":") == 1 else place)
    if wanted.offset is None:
        raise SettingsError(
            f"PLACE: {place!r} must be PARTITION:OFFSET in {name}, or TOPIC:PARTITION:OFFSET of the document"
        )
    letters = asyncio.run(find(settings.kafka, name, wanted))
    if not letters:
        raise Incomplete(f"there is no dead letter {wanted} in {name} (or no longer)")
    if as_json or not sys.stdout.isatty():
        sys.stdout.buffer.writelines(whole(letter) + b"\n" for letter in letters)
        return

    from rich.console import Console

    console = Console(highlight=False)
    for number, letter in enumerate(letters):
        if number:
            console.print()
        for text in details(letter):
            console.print(text, soft_wrap=True)


@app.command(short_help="Send letters again, each once.")
def replay(
    reasons: Reasons = None,
    sources: Sources = None,
    since: Since = None,
    until: Until = None,
    most: Annotated[
        int | None, typer.Option("--max", min=1, metavar="N", help="Replay at most so many.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TOPIC", help="Otherwise the topic that each document was read from."),
    ] = None,
    max_replays: Annotated[
        int,
        typer.Option(
            "--max-replays", min=1, metavar="N", help="Leave a document that was replayed so often already."
        ),
    ] = 3,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0.001, metavar="N", help="Replay at most so many a second."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Replay nothing, and list what would be, as `list` does.")
    ] = False,
    dismiss: Annotated[
        bool, typer.Option("--dismiss", help="Send nothing: count the letters as done, for good.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="NAME",
            help="The service's group; otherwise kafka.group_id.  What was replayed is kept in NAME.replay.",
        ),
    ] = None,
    as_json: Json = False,
    topic: Topic = None,
    bootstrap: Bootstrap = None,
    config: ConfigFiles = None,
) -> None:
    """Send dead letters to the topic they were read from, and remember which.

    Key, value and headers are those of the document; it keeps its partition and, if it has none of its own, its
    id.  A second call replays nothing again, and still reaches what a filter of the first left out.  Only one call
    at a time works for a group.  Ctrl-C ends it once what is on its way is acknowledged and committed; killed, the
    next call repeats at most 500 letters.  Every group that reads the source topic gets the documents: `--to` names
    another.

    Exit 9 if a letter was refused, or its topic is gone.

    \b
    inferstream dead-letters replay --config service.yaml --reason out_of_memory --dry-run
    inferstream dead-letters replay --config service.yaml --reason out_of_memory
    inferstream dead-letters replay --config service.yaml --since 2h --source documents:3 --max 100 --rate 20
    inferstream dead-letters replay --config service.yaml --to documents.repair
    inferstream dead-letters replay --config service.yaml --reason invalid_json --dismiss
    """
    settings = load(config, bootstrap)
    name, chosen = _topic(settings, topic), _filter(reasons, sources, since, until)
    if dismiss and (to is not None or rate is not None):
        raise SettingsError("--dismiss sends nothing: leave out --to and --rate")
    if to is not None and checked_topic("--to", to) == name:
        raise SettingsError(f"--to: {to} is the dead-letter topic itself")

    from inferstream.tools.dead_letters_replay import Options, Tally

    options = Options(name, chosen, to, max_replays, most, rate, dismiss)
    kafka = settings.kafka.model_copy(update={"group_id": f"{group or settings.kafka.group_id}.replay"})
    settings = settings.model_copy(update={"kafka": kafka})
    tally = Tally()
    verb = "dismissed" if dismiss else "replayed"
    started = time.monotonic()
    ended = finished = False
    try:
        with _writer(as_json) if dry_run else contextlib.nullcontext() as write:
            finished = asyncio.run(_replay(settings, options, tally, write))
        ended = True
    finally:
        if ended or tally.total or tally.failed:
            _summary(tally, f"would be {verb}" if dry_run else verb, time.monotonic() - started)
    if not finished:
        raise KeyboardInterrupt
    if tally.failed or tally.full:
        raise Incomplete(
            f"{tally.failed:,} of {tally.failed + tally.total:,} letters could not be {verb}"
            if tally.failed
            else f"not every letter could be {verb}"
        )


async def _list(
    settings: Settings,
    topic: str,
    chosen: Filter,
    most: int | None,
    found: Callable[[Sequence[Letter]], None],
) -> None:
    from inferstream.tools.dead_letters_reading import reading

    left = most
    async with reading(settings.kafka, topic) as reader:
        for stretch in await reader.stretches(chosen):
            async for page in reader.pages(stretch):
                letters = [letter for letter in page.letters if chosen.wants(letter)][:left]
                found(letters)
                if left is not None:
                    left -= len(letters)
                    if left == 0:
                        return


async def _replay(
    settings: Settings,
    options: Options,
    tally: Tally,
    dry_run: Callable[[Sequence[Letter]], None] | None,
) -> bool:
    """Whether it came to its end: False if it was told to stop."""
    from inferstream.tools.dead_letters_replay import Replayer

    stopping = asyncio.Event()
    replayer = Replayer(settings.kafka, options, tally, stopping)
    if dry_run is not None:
        await replayer.dry_run(dry_run)
        return True
    work = asyncio.create_task(replayer.replay())
    with _stopped_by_signals(stopping, replayer, work):
        async with _shown(tally):
            try:
                await work
            except asyncio.CancelledError:
                if not stopping.is_set():
                    raise
    return not stopping.is_set()


@contextlib.contextmanager
def _stopped_by_signals(
    stopping: asyncio.Event, replayer: Replayer, work: asyncio.Task[None]
) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops it in order, the second at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        stopping.set()
        if not replayer.working:
            work.cancel()
        for each in signals:
            loop.remove_signal_handler(each)  # the next one ends it at once

    for each in signals:
        loop.add_signal_handler(each, stop)
    try:
        yield
    finally:
        for each in signals:
            loop.remove_signal_handler(each)


@contextlib.asynccontextmanager
async def _shown(tally: Tally) -> AsyncIterator[None]:
    showing = asyncio.create_task(_progress(tally))
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _progress(tally: Tally) -> None:
    while True:
        await asyncio.sleep(INTERVAL_S)
        print(f"{tally.total:,} done, {tally.failed:,} failed", file=sys.stderr, flush=True)


def _summary(tally: Tally, verb: str, seconds: float) -> None:
    for problem in (*tally.problems, *tally.full):
        print(problem, file=sys.stderr)
    more = tally.failed + tally.left.total() - len(tally.problems)
    if more > 0:
        print(f"… and {more:,} more", file=sys.stderr)
    left = f", {tally.left.total():,} left{_by(tally.left)}" if tally.left else ""
    print(
        f"{tally.total:,} {verb}{_by(tally.done)}, {tally.failed:,} failed{left}, {seconds:.1f} s",
        file=sys.stderr,
    )


def _topic(settings: Settings, given: str | None) -> str:
    name = given if given is not None else settings.dead_letter.topic
    if not name and given is None:
        raise SettingsError("--topic: not given, and the settings have no dead_letter.topic or output.topic")
    return checked_topic("--topic", name)


def _filter(
    reasons: Sequence[str] | None, sources: Sequence[str] | None, since: str | None, until: str | None
) -> Filter:
    from inferstream.tools.dead_letters import Filter, moment_of, place_of, reason_of

    now = datetime.now().astimezone()
    chosen = Filter(
        frozenset(reason_of("--reason", text) for text in reasons or ()),
        tuple(place_of("--source", text) for text in sources or ()),
        moment_of("--since", since, now) if since is not None else None,
        moment_of("--until", until, now) if until is not None else None,
    )
    if chosen.since_ms is not None and chosen.until_ms is not None and chosen.since_ms >= chosen.until_ms:
        raise SettingsError(f"--until {until} is not after --since {since}: no letter can lie between")
    return chosen


@contextlib.contextmanager
def _writer(as_json: bool) -> Iterator[Callable[[Sequence[Letter]], None]]:
    """What writes letters to stdout: as tables on a terminal, else as lines of JSON."""
    from inferstream.tools.dead_letters_lines import line, table

    if as_json or not sys.stdout.isatty():
        out = sys.stdout.buffer

        def write(letters: Sequence[Letter]) -> None:
            out.writelines(line(letter) + b"\n" for letter in letters)
            out.flush()

        yield write
        return

    from rich.console import Console

    console = Console(highlight=False)
    rows: list[Letter] = []

    def draw() -> None:
        if rows:
            console.print(table(rows))
            rows.clear()

    def gather(letters: Sequence[Letter]) -> None:
        rows.extend(letters)
        if len(rows) >= ROWS_AT_ONCE or sum(len(row.record.value or b"") for row in rows) > BYTES_AT_ONCE:
            draw()

    yield gather
    draw()


def _by(counts: Counter[str]) -> str:
    named = ", ".join(f"{name} {number:,}" for name, number in counts.most_common())
    return f" ({named})" if named else ""


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
