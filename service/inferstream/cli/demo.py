"""`inferstream demo`: the whole thing on this machine, in under a minute."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from inferstream.errors import InferstreamError, SettingsError

_STOPS = (signal.SIGTERM, signal.SIGHUP)


def demo(
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUESTION", help="A question of yours instead of the three; repeat it for more."
        ),
    ] = None,
    kill: Annotated[
        bool,
        typer.Option("--kill/--no-kill", help="Kill the worker with -9 at about half, or leave it alone."),
    ] = True,
    documents: Annotated[
        int | None,
        typer.Option(
            min=10,
            max=4_000,
            metavar="N",
            help="So many docstrings, not as many (600 to 3,000) as fit a minute.",
        ),
    ] = None,
) -> None:
    """See it work: real documents, a real model, the Kafka protocol, and a worker killed in the middle.

    Docstrings of the Python standard library and of installed packages go into a topic of an embedded
    broker; a worker (`inferstream run`, in a process of its own) embeds them with all-MiniLM-L6-v2.  At about
    half it is killed with -9 and another one started.  In the end the topics are counted: nothing may be
    missing (else exit 1).  Needs no network, leaves nothing behind, takes about a minute.

    \b
    inferstream demo
    inferstream demo --ask "How do I measure how long a function takes?" --no-kill
    """
    from inferstream.tools.demo import Options, require_extras, run
    from inferstream.tools.demo_report import report
    from inferstream.tools.demo_view import make_view

    if not all(question.strip() for question in ask or ()):
        raise SettingsError("--ask: the question is empty")
    require_extras()
    stopped: list[int] = []

    async def main() -> str | None:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            stopped.append(number)
            task.cancel()

        for number in _STOPS:
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        with make_view() as view:
            outcome = await run(Options(documents, kill, tuple(ask or ())), view)
        print(report(outcome), flush=True)
        if outcome.missing:
            return f"{len(outcome.missing):,} documents have no answer"
        return None

    try:
        failure = asyncio.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except asyncio.CancelledError:
        raise typer.Exit(128 + stopped[0] if stopped else 1) from None
    if failure is not None:
        raise InferstreamError(failure)
