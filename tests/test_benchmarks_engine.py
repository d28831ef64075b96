"""The engine behind `inferstream bench`, with the model that needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferstream.cli.bench import read_texts
from inferstream.codec import Codec
from inferstream.device.cpu import CpuDevice
from inferstream.errors import SettingsError
from inferstream.models.loading import Loaded, load
from inferstream.settings import Settings, load_settings, resolve
from inferstream.tasks.hash import HashRunner
from inferstream.tools.bench import Engine


def settings_of(**flags: Any) -> Settings:
    tree = {key.replace("__", "."): value for key, value in flags.items()}
    loaded = load_settings(environ={}, flags={"model.id": "builtin:hash", **tree}, require=False)
    return resolve(loaded.settings, "hash", 2)


def loaded(settings: Settings) -> Loaded:
    return load(settings, Codec.from_settings(settings).embedding)


async def test_engine_when_it_runs_twice_then_each_round_counts_its_own_documents_and_tokens() -> None:
    settings = settings_of()
    model = loaded(settings)
    engine = Engine(settings, model.task, model.device)

    first = await engine.run(["four"] * 100)
    second = await engine.run(["a longer text of several words"] * 1_000)
    engine.close()

    assert (first.documents, first.tokens) == (100, 200)
    assert (second.documents, second.tokens, second.refused) == (1_000, 8_000, 0)
    assert second.padded_tokens == second.tokens and second.padding_efficiency == 1.0
    assert second.seconds > 0 and second.prepare_cpu_s > 0 and second.finish_cpu_s > 0


async def test_engine_when_the_buffer_is_smaller_than_the_documents_then_all_go_through() -> None:
    settings = settings_of(buffer__max_documents=70, batch__max_tokens=64, buffer__max_tokens=64)
    model = loaded(settings)
    engine = Engine(settings, model.task, model.device)

    measured = await engine.run([f"document number {n}" for n in range(1_000)])
    engine.close()

    assert measured.documents == 1_000


async def test_engine_when_a_document_is_refused_then_it_is_counted_and_holds_nothing_up() -> None:
    settings = settings_of(model__max_length=16, model__long_documents="reject")
    model = loaded(settings)
    engine = Engine(settings, model.task, model.device)

    measured = await engine.run(["short", "long " * 100, "short"])
    engine.close()

    assert (measured.documents, measured.refused) == (2, 1)


async def test_engine_when_a_document_has_several_chunks_then_it_counts_once() -> None:
    settings = settings_of(model__max_length=16, model__long_documents="chunk")
    model = loaded(settings)
    engine = Engine(settings, model.task, model.device)

    measured = await engine.run(["word " * 100, "short"])
    engine.close()

    assert measured.documents == 2 and measured.tokens > 100


async def test_engine_when_the_device_raises_then_run_raises_it() -> None:
    class Broken(HashRunner):
        def run(self, items: Sequence[Any]) -> np.ndarray:
            raise ArithmeticError("broken")

    settings = settings_of()
    engine = Engine(settings, loaded(settings).task, CpuDevice(Broken(), 1))

    with pytest.raises(ArithmeticError):
        await engine.run(["one", "two"])
    engine.close()


def test_read_texts_when_lines_are_json_then_the_pointer_finds_the_text(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"body": {"text": "one"}}\n\n{"body": {"text": "two"}}\n')

    assert read_texts(path, "/body/text") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', ":2: there is no text at /text"),
        ("a.jsonl", "{\n", ":1: is not JSON"),
        ("a.txt", " \n\n", "there is no document in it"),
    ],
)
def test_read_texts_when_there_is_none_then_the_line_is_named(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(content)

    with pytest.raises(SettingsError, match=said):
        read_texts(path, "/text")


def test_read_texts_when_the_file_is_missing_then_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_texts(tmp_path / "nowhere.txt", "/text")
