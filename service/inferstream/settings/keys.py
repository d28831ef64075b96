"""What can be known of each setting from the tree: its names, default, bounds and manual."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from inferstream.settings.tree import Auto, Pattern, Section, Settings

PREFIX = "INFERSTREAM_"
REQUIRED = ("kafka.bootstrap_servers", "input.topics", "output.topic")  # by `run`


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree.  ``type`` is its type without None; ``choices`` is empty unless it is closed;
    ``pattern`` is what a text, or each item of a list, must match as a whole."""

    key: str
    type: Any
    choices: tuple[str, ...]
    default: Any
    auto: str | None
    bounds: tuple[float | None, float | None]
    above: float | None
    pattern: str | None
    doc: str

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper().replace(".", "__")

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list

    @property
    def is_secret(self) -> bool:
        return self.type is SecretStr

    @property
    def line(self) -> str:
        """The first sentence of the manual, on one line."""
        return _first_sentence(" ".join(self.doc.split()))

    @property
    def default_text(self) -> str:
        if self.key in REQUIRED:
            return "required"
        if self.auto is not None and self.default in (None, "", "auto"):
            return self.auto
        return show(self.default)

    @property
    def allowed(self) -> str:
        """What a value must be, to stand after 'must be'."""
        if self.choices:
            return one_of(self.choices)
        unit = {"ms": " (milliseconds)", "s": " (seconds)", "bytes": " (bytes)"}.get(
            self.key.rsplit("_", 1)[-1], ""
        )
        low, high = self.bounds
        if self.type is int or self.type is float:
            noun = "a whole number" if self.type is int else "a number"
            if self.above is not None:
                noun += f" above {show(self.above)}"
            if low is not None and high is not None:
                noun += f" from {show(low)} to {show(high)}"
            elif high is not None:
                noun += f" and at most {show(high)}"
            return noun + unit + (" or auto" if self.auto else "")
        if self.type is bool:
            return "true or false"
        if self.is_list:
            return "a list, its items not empty"
        return "a file's path" if self.type is Path else "a text, not empty"


def _first_sentence(text: str) -> str:
    for end in (". ", "; "):
        head, found, _ = text.partition(end)
        if found:
            return head
    return text.rstrip(".")


def show(value: Any) -> str:
    """A value as people read it: secrets starred, lists with commas, '–' for nothing."""
    if isinstance(value, SecretStr):
        return "********"
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def one_of(choices: Iterable[str]) -> str:
    *head, last = choices
    return f"{', '.join(head)} or {last}" if head else last


def _leaves(section: type[Section], path: str) -> Iterator[Setting]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{path}{name}.")
        else:
            yield _leaf(f"{path}{name}", field)


def _leaf(key: str, field: FieldInfo) -> Setting:
    inner: Any = field.annotation
    metadata = list(field.metadata)
    if get_origin(inner) in (Union, types.UnionType):
        inner = next(part for part in get_args(inner) if part is not types.NoneType)
    while hasattr(inner, "__metadata__"):
        metadata += inner.__metadata__
        inner = get_args(inner)[0]
    low = high = above = None
    auto = pattern = None
    for entry in metadata:
        for part in entry.metadata if isinstance(entry, FieldInfo) else (entry,):
            if isinstance(part, annotated_types.Ge):
                low = part.ge
            elif isinstance(part, annotated_types.Le):
                high = part.le
            elif isinstance(part, annotated_types.Gt):
                above = part.gt
            elif isinstance(part, Auto):
                auto = part.how
            elif isinstance(part, Pattern):
                pattern = part.regex
    choices = tuple(get_args(inner)) if get_origin(inner) is Literal else ()
    return Setting(
        key=key,
        type=inner,
        choices=choices,
        default=field.default,
        auto=auto,
        bounds=(low, high),  # type: ignore[arg-type]  # annotated_types bounds are "anything comparable"
        above=above,  # type: ignore[arg-type]
        pattern=pattern,
        doc=field.description or "",
    )


SETTINGS: dict[str, Setting] = {leaf.key: leaf for leaf in _leaves(Settings, "")}


def value_of(settings: Settings, key: str) -> Any:
    """The value at a key's path."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def close_keys(key: str) -> list[str]:
    """Known keys that an unknown one may have meant, the likeliest first; at most three."""
    near = difflib.get_close_matches(key, SETTINGS, n=3, cutoff=0.75)
    last = key.rsplit(".", 1)[-1]
    by_name: dict[str, list[str]] = {}
    for known in SETTINGS:
        by_name.setdefault(known.rsplit(".", 1)[-1], []).append(known)
    for name in difflib.get_close_matches(last, by_name, n=1, cutoff=0.8):
        near += [known for known in by_name[name] if known not in near]
    return near[:3]
