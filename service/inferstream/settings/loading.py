"""The layers put together: defaults < the image's file < --config files < environment < flags."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inferstream.errors import SettingsError
from inferstream.settings.checks import conflicts, without_effect
from inferstream.settings.derive import derive_names
from inferstream.settings.keys import REQUIRED, SETTINGS, show, value_of
from inferstream.settings.sources import Given, brief, config_files, read_environment, read_file, read_flags
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
    ``environ`` is ``os.environ`` unless given.  ``flags`` maps keys to values, as :func:`parse_flags` gives them.
    ``require=False`` lets the settings be missing that only a worker needs.  ``image_file`` is read if it exists.
    Raises SettingsError with one line for each problem: key, what is allowed, where the value comes from.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    warnings: list[str] = []
    given: dict[str, Given] = {}
    for path in [*([image_file] if image_file.exists() else []), *(files or config_files(environ))]:
        given |= read_file(Path(path), problems)
    given |= read_environment(environ, problems, warnings)
    given |= read_flags(flags or {}, problems)

    settings, wrong = _validated(given, problems)
    if require:
        problems += [
            f"{key}: required, and not set; set it with {SETTINGS[key].flag}, {SETTINGS[key].variable} or a --config file"
            for key in REQUIRED
            if key not in wrong and not value_of(settings, key)
        ]
    try:
        settings = derive_names(settings)
    except SettingsError as error:
        problems.append(str(error))
    origins = {key: given[key].origin if key in given else "default" for key in SETTINGS}
    for conflict in conflicts(settings):
        if not wrong.intersection(conflict.keys):
            problems.append(
                f"{conflict.keys[0]}: {conflict.text} [{_named(conflict.keys, settings, origins)}]"
            )
    if problems:
        raise SettingsError("\n".join(problems))
    for note in without_effect(settings):
        warnings.append(f"{note.keys[0]}: {note.text} [{origins[note.keys[0]]}]")
    return Loaded(settings, origins | _without_auto(given), tuple(warnings))


def _without_auto(given: Mapping[str, Given]) -> dict[str, str]:
    """The origin of a setting that was put back to `auto` is its derivation, or the default."""
    return {key: "default" for key, entry in given.items() if entry.value is None}


def _validated(given: Mapping[str, Given], problems: list[str]) -> tuple[Settings, set[str]]:
    """The tree, and the keys of values that were wrong and were left at their defaults in it."""
    try:
        return Settings.model_validate(_nested(given)), set()
    except ValidationError as error:
        wrong = dict(_translated(error, given))
    problems += wrong.values()
    right = {key: entry for key, entry in given.items() if key not in wrong}
    return Settings.model_validate(_nested(right)), set(wrong)


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


def _translated(error: ValidationError, given: Mapping[str, Given]) -> Iterator[tuple[str, str]]:
    for entry in error.errors(include_url=False):
        parts = [str(part) for part in entry["loc"]]
        key = next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in SETTINGS)
        setting = SETTINGS[key]
        if setting.is_secret:
            what = "********"
        else:
            written = given[key].value
            place = entry["loc"][len(key.split(".")) :]
            inside = (
                written[place[0]]
                if isinstance(written, list) and place and isinstance(place[0], int)
                else written
            )
            what = brief(inside)
        raised = entry.get("ctx", {}).get("error")
        why = str(raised) if isinstance(raised, ValueError) else f"must be {setting.allowed}"
        yield key, f"{key}: {what} {why} [{given[key].origin}]"


def _named(keys: Sequence[str], settings: Settings, origins: Mapping[str, str]) -> str:
    """The settings of a conflict, each with its value and origin."""

    def origin(key: str) -> str:
        return f"derived: {settings.derived[key]}" if key in settings.derived else origins[key]

    if len(keys) == 1:
        return origin(keys[0])
    return "; ".join(f"{key} = {show(value_of(settings, key))}, {origin(key)}" for key in keys)
