"""`inferstream bench`: how fast this machine runs a model, before any Kafka is there."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferstream.cli.common import ConfigFiles, warn
from inferstream.cli.config import TAKES_SETTINGS, SettingsCommand
from inferstream.errors import SettingsError

if TYPE_CHECKING:
    from inferstream.models.loading import Loaded
    from inferstream.settings import Settings
    from inferstream.tools.bench import Measured

CALIBRATION = 128
LEAST_DOCUMENTS = 256

bench = typer.Typer(add_completion=False)


@bench.command(cls=SettingsCommand, context_settings=TAKES_SETTINGS)
def bench_command(
    ctx: typer.Context,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your documents: JSON lines (input.text_field says where the text is) if it ends in .jsonl, else a "
            "text per line; '-' reads text lines from stdin.  Without it: Python docstrings.",
        ),
    ] = None,
    config: ConfigFiles = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="About how long one round takes; documents are repeated to fill it.")
    ] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the fastest and the slowest are shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what each stage does when in the last round; ui.perfetto.dev opens it.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Draw the middle of the last round: how the stages overlap (matplotlib)."
        ),
    ] = None,
) -> None:
    """Measure a model on this machine: documents and tokens per second, padding, CPU time per stage.

    It runs the worker's own stages on texts in memory, so a worker reading from Kafka comes close to it.  All
    settings of `run` are taken; those of Kafka are not needed.

    \b
    inferstream bench
    inferstream bench --texts documents.jsonl --model.id ./my-model --batch.max-tokens 4096
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from inferstream.settings import cores, device_kind, load_settings, parse_flags, resolve
    from inferstream.telemetry.logs import configure

    loaded = load_settings(config or [], os.environ, parse_flags(ctx.args), require=False)
    warn(loaded)
    settings = resolve(loaded.settings, device_kind(loaded.settings), cores())
    configure(settings.telemetry.log_format, "warning")
    documents = read_texts(texts, settings.input.text_field)
    if plot is not None:
        from inferstream.tools.plot import check_picture, draw

        check_picture(plot)
    with tempfile.TemporaryDirectory(prefix="inferstream-bench-") as folder:
        if trace is None and plot is not None:
            trace = Path(folder) / "trace.json"
        model, results = asyncio.run(_measure(settings, documents, seconds, rounds, trace))
        if plot is not None and trace is not None:
            draw(trace, plot, f"{model.info.id} in {model.info.dtype} on {model.device.name}")
    if as_json:
        typer.echo(json.dumps(_as_json(model, results), indent=2))
    else:
        typer.echo("\n".join(_lines(settings, model, results)))
    sys.stdout.flush()


def read_texts(path: Path | None, text_field: str) -> list[str]:
    """The documents to measure with; raises SettingsError when there are none."""
    if path is None:
        from inferstream.tools.demo_corpus import collect

        return [docstring.text for docstring in collect()]
    try:
        lines = (sys.stdin if str(path) == "-" else path.open(encoding="utf-8")).read().splitlines()
    except OSError as error:
        raise SettingsError(f"--texts {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"--texts {path}: is not UTF-8 (byte {error.start:,})") from error
    texts = [_text(path, number, line, text_field) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise SettingsError(f"--texts {path}: there is no document in it")
    return texts


def _text(path: Path, number: int, line: str, text_field: str) -> str:
    if path.suffix != ".jsonl":
        return line
    from inferstream.codec import pointer_parts, resolve

    try:
        text = resolve(json.loads(line), pointer_parts("input.text_field", text_field))
    except ValueError as error:
        raise SettingsError(f"{path}:{number}: is not JSON: {error}") from error
    if not isinstance(text, str):
        raise SettingsError(f"{path}:{number}: there is no text at {text_field}; set --input.text-field")
    return text


async def _measure(
    settings: Settings, documents: list[str], seconds: float, rounds: int, trace: Path | None
) -> tuple[Loaded, list[Measured]]:
    from inferstream.codec import Codec
    from inferstream.models.loading import load
    from inferstream.telemetry.timeline import Timeline, TraceFile
    from inferstream.tools.bench import Engine

    file = TraceFile(trace) if trace is not None else None
    _say("loading the model")
    model = load(settings, Codec.from_settings(settings).embedding)
    timeline = Timeline()
    engine = Engine(settings, model.task, model.device, timeline)
    try:
        calibration = await engine.run(_repeated(documents, CALIBRATION))
        count = max(LEAST_DOCUMENTS, int(calibration.documents_per_s * seconds))
        batch = _repeated(documents, count)
        results = []
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}: {count:,} documents")
            if number == rounds - 1:
                timeline.trace = file
            results.append(await engine.run(batch))
        return model, results
    finally:
        engine.close()
        if file is not None:
            file.close()


def _repeated(documents: list[str], count: int) -> list[str]:
    return (documents * (count // len(documents) + 1))[:count]


def _lines(settings: Settings, model: Loaded, results: list[Measured]) -> list[str]:
    ordered = sorted(results, key=lambda measured: measured.documents_per_s)
    typical = ordered[len(ordered) // 2]
    info = model.info
    stages = typical.cpu_us_per_document()
    whole = sum(stages.values()) or 1.0
    lines = [
        f"model        {info.id} ({info.revision}), {info.dtype}, {model.dimensions} dimensions",
        f"device       {model.device.name}; batches side by side: {model.device.lanes}, of at most "
        f"{settings.batch.max_tokens:,} tokens; prepare threads: {settings.prepare.threads}",
        f"documents    {typical.documents_per_s:,.0f}/s  (slowest {ordered[0].documents_per_s:,.0f}, fastest "
        f"{ordered[-1].documents_per_s:,.0f})",
        f"tokens       {typical.tokens_per_s:,.0f}/s, {typical.tokens / max(1, typical.documents):.0f} a document",
        f"batches      {typical.documents / max(1, typical.batches):.1f} documents each, "
        f"{typical.padding_efficiency:.0%} of them tokens and the rest padding",
        f"device busy  {typical.busy_ratio:.1%}",
        "CPU time     per document, µs:",
        *(f"  {name:<11}{us:>10,.0f}  {us / whole:>4.0%}" for name, us in stages.items()),
    ]
    if typical.refused:
        lines.append(f"refused      {typical.refused:,} documents (too long, or without text)")
    return lines


def _as_json(model: Loaded, results: list[Measured]) -> dict[str, Any]:
    return {
        "model": asdict(model.info) | {"dimensions": model.dimensions, "max_length": model.max_length},
        "device": {"name": model.device.name, "lanes": model.device.lanes},
        "rounds": [
            asdict(measured)
            | {
                "documents_per_s": measured.documents_per_s,
                "tokens_per_s": measured.tokens_per_s,
                "padding_efficiency": measured.padding_efficiency,
                "device_busy_ratio": measured.busy_ratio,
                "cpu_us_per_document": measured.cpu_us_per_document(),
            }
            for measured in results
        ],
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
