"""`inferstream broker`: the embedded broker in the foreground."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from inferstream.cli.common import checked_topic
from inferstream.errors import SettingsError

MOST_PARTITIONS = 10_000  # the mock takes memory for each and ends the process when there is none


def broker(
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", metavar="NAME[:PARTITIONS]", help="Create a topic; repeat it for more."),
    ] = None,
) -> None:
    """Run a small Kafka broker in memory, for trying things out.

    Prints bootstrap=HOST:PORT and runs until Ctrl-C or SIGTERM.  It keeps about 5 MB per partition, drops the
    oldest silently and forgets everything at its end.  A topic that is not created here appears with 4
    partitions when a client first writes to it.

    \b
    inferstream broker --topic documents:8 --topic embeddings:8 --topic embeddings.dead-letters:8
    inferstream publish --bootstrap 127.0.0.1:PORT --topic documents documents.jsonl
    """
    from inferstream.tools.embedded import DEFAULT_PARTITIONS, EmbeddedBroker

    wanted: dict[str, int] = {}
    for text in topic or ():
        name, partitions = _topic(text, DEFAULT_PARTITIONS)
        if wanted.setdefault(name, partitions) != partitions:
            raise SettingsError(f"--topic {name}: given with {wanted[name]} and with {partitions} partitions")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with EmbeddedBroker() as running:
        for name, partitions in wanted.items():
            running.create_topic(name, partitions)
        print(f"bootstrap={running.bootstrap}", flush=True)
        ended.wait()


def _topic(text: str, default_partitions: int) -> tuple[str, int]:
    name, colon, number = text.rpartition(":")
    if not colon:
        return checked_topic("--topic", text), default_partitions
    if not number.isdecimal() or not 1 <= int(number) <= MOST_PARTITIONS:
        raise SettingsError(
            f"--topic {text}: give NAME or NAME:PARTITIONS, as in documents:8; at most {MOST_PARTITIONS:,}"
        )
    return checked_topic("--topic", name), int(number)
