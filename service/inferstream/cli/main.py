"""The command line: which commands there are, and what an error ends with.

Commands import what they need when they run, so that `inferstream --help` and a usage error take no time:
nothing here imports torch, aiokafka or pydantic.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from inferstream.cli import broker, consume, dead_letters, health, publish, topics
from inferstream.errors import InferstreamError, SettingsError
from inferstream.version import version

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk that our output goes to

PASS_ON: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}
PASS_ON_HELP: dict[str, Any] = {**PASS_ON, "help_option_names": []}

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: quick, and the same in a pipe
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inferstream {version()}")
        raise typer.Exit()


@app.callback()
def inferstream(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Documents from one Kafka topic, a model's results to another; nothing lost.

    \b
    See it work, with nothing but this package:
      inferstream demo

    \b
    With a Kafka of your own (examples/service.yaml is a start):
      inferstream topics create --config service.yaml
      inferstream publish --config service.yaml documents.jsonl
      inferstream run --config service.yaml
      inferstream consume --config service.yaml --from-beginning --max 3

    \b
    Exit codes: 0 done or drained, 1 unexpected, 2 usage or settings, 3 Kafka refused or unreachable,
    4 model not loaded, 5 device failed, 6 drain too long, 7 dead letter refused, 8 no progress,
    9 publish, consume or dead-letters did not do all of it, 130 interrupted.
    """


class SettingsHelp(TyperCommand):
    """A command that takes every setting as a flag, and lists them at the end of its help."""

    def get_help(self, ctx: Any) -> str:
        from inferstream.settings import help_text

        return f"{super().get_help(ctx)}\n\n{help_text()}"


@app.command(cls=SettingsHelp, context_settings=PASS_ON)
def run(
    ctx: typer.Context,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", metavar="FILE", help="A YAML file with settings; a later one wins."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what each stage does when; ui.perfetto.dev and chrome://tracing open it.",
        ),
    ] = None,
) -> None:
    """Run one worker until it is told to stop.

    Every setting is a flag.  SIGTERM or Ctrl-C drains: what is held is finished, committed, and the group
    left; a second Ctrl-C ends at once.  More workers with the same kafka.group_id share the partitions.

    \b
    inferstream run --config service.yaml
    inferstream run --config service.yaml --kafka.group-id trial --batch.max-tokens 4096
    inferstream run --kafka.bootstrap-servers localhost:9092 --input.topics documents --output.topic embeddings
    """
    from inferstream.cli.run import run as run_worker

    run_worker(config or [], ctx.args, trace)


@app.command(context_settings=PASS_ON_HELP, help="See it work: a real model, and a worker killed half-way.")
def demo(ctx: typer.Context) -> None:
    _delegate(ctx, "inferstream.cli.demo", "demo")


app.command()(broker.broker)
app.command(short_help="Publish documents and wait until each is acknowledged.")(publish.publish)
app.command(short_help="Write the records of a topic, a line of JSON each.")(consume.consume)
app.command(short_help="Ask the worker on this machine whether it lives and is ready.")(health.health)
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(topics.app, name="topics")


@app.command(
    context_settings=PASS_ON_HELP, help="Show the settings and where each comes from, or check them."
)
def config(ctx: typer.Context) -> None:
    _delegate(ctx, "inferstream.cli.config", "app")


@app.command(context_settings=PASS_ON_HELP, help="Measure a model on this machine, with no Kafka around it.")
def bench(ctx: typer.Context) -> None:
    _delegate(ctx, "inferstream.cli.bench", "bench")


def _delegate(ctx: typer.Context, module: str, name: str) -> None:
    """Hand the arguments, --help included, to a command whose module is imported only now."""
    target = getattr(importlib.import_module(module), name)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command()(function)
    target.rich_markup_mode = None
    target._add_completion = False
    _invoke(target, ctx.args, ctx.command_path)


def _invoke(target: typer.Typer, arguments: Sequence[str], name: str) -> None:
    """Run a command and let everything out that it raises; ``target()`` would print and end some of it itself."""
    command = typer.main.get_command(target)
    with command.make_context(name, list(arguments), **CONTEXT) as ctx:
        command.invoke(ctx)


def report(error: InferstreamError) -> None:
    """Each line of the message (settings may have several problems) as one line on stderr."""
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"inferstream: error: {line}", file=sys.stderr)


def _usage(error: typer.TyperException) -> None:
    """A usage error as one line, as any other; no command at all gets the help instead."""
    text = error.format_message()
    if text.startswith("Usage:"):
        print(text, file=sys.stderr)
        return
    context = getattr(error, "ctx", None)
    where = f"; see `{context.command_path} --help`" if context is not None else ""
    report(SettingsError(" ".join(text.replace(": Value error, ", ": ").split()).rstrip(".") + where))


def _run() -> int:
    """Run the command that the arguments name; its exit code comes back."""
    try:
        _invoke(app, sys.argv[1:], "inferstream")
        sys.stdout.flush()
    except typer.Exit as ended:
        return ended.exit_code
    except typer.TyperException as error:
        _usage(error)
        return error.exit_code
    except InferstreamError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # who read our output has seen enough
    except OSError as error:
        if error.errno not in FULL:
            traceback.print_exc()
        else:
            report(InferstreamError(f"the output cannot be written: {error.strerror}"))
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Run a command; the exit code is the process's."""
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        # Said already, if there is a word to say.  The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
