"""The layers put together: defaults < the image's file < --config files < environment < flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inferstream.errors import SettingsError
from inferstream.settings.checks import conflicts, without_effect
from inferstream.settings.derive import derive_names
from inferstream.settings.keys import REQUIRED, SETTINGS, show, value_of
from inferstream.settings.sources import (
    Given,
    Problems,
    brief,
    config_files,
    read_environment,
    read_file,
    read_flags,
)
from inferstream.settings.tree import Settings

IMAGE_FILE = Path("/etc/inferstream/defaults.yaml")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid tree; key → where its value comes from; and lines that deserve a warning."""

    settings: Settings
    origins: dict[str, str]
    warnings: tuple[str, ...] = ()


def load_settings(
    files: Sequence[Path] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    *,
    require: bool = True,
    image_file: Path = IMAGE_FILE,
) -> Loaded:
    """Read every layer and check the whole.

    ``files`` are the --config files, later ones over earlier; without any, INFERSTREAM_CONFIG names them.
    ``environ`` is ``os.environ`` unless given.  ``flags`` maps keys to values, as :func:`parse_flags` gives
    them.  ``require=False`` lets the settings be missing that only a worker needs.  ``image_file`` is read if
    it exists.
    Raises SettingsError with one line for each problem: key, what is allowed, where the value comes from.
    """
    environ = os.environ if environ is None else environ
    problems = Problems()
    warnings: list[str] = []
    given: dict[str, Given] = {}
    for path in [*([image_file] if image_file.exists() else []), *(files or config_files(environ))]:
        given |= read_file(Path(path), problems)
    given |= read_environment(environ, problems, warnings)
    given |= read_flags(flags or {}, problems)

    settings = _validated(given, problems)
    for key in REQUIRED if require else ():
        if not problems.unread and not problems.about(key) and not value_of(settings, key):
            setting = SETTINGS[key]
            problems.lines.append(
                f"{key}: required, and not set; set it with {setting.flag}, {setting.variable} or a file"
            )
    try:
        settings = derive_names(settings)
    except SettingsError as error:
        problems.lines.append(str(error))
    origins = dict.fromkeys(SETTINGS, "default")
    origins |= {key: entry.origin for key, entry in given.items() if entry.value is not None}
    possible = [found for found in conflicts(settings) if not any(map(problems.about, found.keys))]
    for conflict in possible:
        problems.add(conflict.keys[0], conflict.text, _named(conflict.keys, settings, origins))
    if problems.lines:
        raise SettingsError("\n".join(problems.lines))
    for note in without_effect(settings):
        warnings.append(f"{note.keys[0]}: {note.text} [{origins[note.keys[0]]}]")
    return Loaded(settings, origins, tuple(warnings))


def _validated(given: Mapping[str, Given], problems: Problems) -> Settings:
    """The tree; values that are wrong are problems, and at their defaults in it."""
    try:
        return Settings.model_validate(_nested(given))
    except ValidationError as error:
        wrong = _translated(error, given)
    for key, text in wrong.items():
        problems.add(key, text, given[key].origin)
    return Settings.model_validate(_nested({key: entry for key, entry in given.items() if key not in wrong}))


def _nested(given: Mapping[str, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, entry in given.items():
        if entry.value is None:
            continue
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[name] = entry.value
    return tree


def _translated(error: ValidationError, given: Mapping[str, Given]) -> dict[str, str]:
    """Key → what is wrong with its value; of several wrong items of a list, the last."""
    found: dict[str, str] = {}
    for entry in error.errors(include_url=False):
        parts = [str(part) for part in entry["loc"]]
        key = next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in SETTINGS)
        setting = SETTINGS[key]
        value: object = given[key].value
        place = entry["loc"][key.count(".") + 1 :]
        if isinstance(value, list) and place and isinstance(place[0], int):
            value = value[place[0]]
        raised = entry.get("ctx", {}).get("error")
        why = str(raised) if isinstance(raised, ValueError) else f"must be {setting.allowed}"
        found[key] = f"{'********' if setting.is_secret else brief(value)} {why}"
    return found


def _named(keys: Sequence[str], settings: Settings, origins: Mapping[str, str]) -> str:
    """The settings of a conflict, each with its value and origin."""

    def origin(key: str) -> str:
        return f"derived: {settings.derived[key]}" if key in settings.derived else origins[key]

    if len(keys) == 1:
        return origin(keys[0])
    return "; ".join(f"{key} = {show(value_of(settings, key))}, {origin(key)}" for key in keys)
