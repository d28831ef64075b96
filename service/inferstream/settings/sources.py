"""Where settings come from: YAML files, the environment, flags.  Each gives texts with their origin.

A value stays the text that was written until the setting's own type reads it, whatever the source.  So YAML
cannot turn ``group_id: 007`` into 7, ``no`` into false or ``12:30`` into 750.  Nothing here stops at the
first problem; each becomes one line in a list.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from inferstream.errors import SettingsError
from inferstream.settings.keys import PREFIX, SETTINGS, Setting, close_keys

CONFIG_VARIABLE = PREFIX + "CONFIG"
SECTIONS = {key.rsplit(".", depth)[0] for key in SETTINGS for depth in range(1, key.count(".") + 1)}
_STANDARD_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")
}
_KEY_OF_VARIABLE = {setting.variable: key for key, setting in SETTINGS.items()}
_KEY_OF_FLAG = {setting.flag: key for key, setting in SETTINGS.items()}
# What a variable would be called by someone who took `_` for the separator.
_KEY_OF_MISTAKE = {setting.variable.replace("__", "_"): key for key, setting in SETTINGS.items()}


@dataclass(frozen=True, slots=True)
class Given:
    """What was written, None for ``auto``; and where: ``file:PATH:LINE``, ``env NAME``, ``flag --NAME``."""

    value: str | list[str] | None
    origin: str


@dataclass(slots=True)
class Problems:
    """What is wrong so far: a line each, and the keys and sections that they are about."""

    lines: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    unread: bool = False  # a whole file is missing: what it would have set is not known

    def add(self, key: str, text: str, origin: str) -> None:
        self.lines.append(f"{key}: {text} [{origin}]")
        self.keys.add(key)

    def add_file(self, where: str, text: str) -> None:
        """A file of which nothing can be read."""
        self.lines.append(f"file:{where}: {text}")
        self.unread = True

    def about(self, key: str) -> bool:
        """Whether the setting, or a section that it is in, has a problem."""
        return any(key == known or key.startswith(f"{known}.") for known in self.keys)


def brief(value: object) -> str:
    """A value for an error message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _given(setting: Setting, value: str | list[str], origin: str, problems: Problems) -> Given | None:
    """Bring a value into the shape of its setting: a text, a list of texts, or None for ``auto``."""
    if setting.is_secret:
        return Given(value, origin) if isinstance(value, str) else None
    if isinstance(value, str):
        value = value.strip()
        if value == "auto" and setting.auto is not None and "auto" not in setting.choices:
            return Given(None, origin)
        if not setting.is_list:
            return Given(value, origin)
        if value.startswith("[") and value.endswith("]"):
            try:
                items = json.loads(value)
            except ValueError:
                items = None
            if not isinstance(items, list) or any(not isinstance(item, str | int | float) for item in items):
                what = f"{brief(value)} must be a JSON list of texts, or texts with commas between"
                problems.add(setting.key, what, origin)
                return None
            return Given([str(item) for item in items], origin)
        return Given([item.strip() for item in value.split(",") if item.strip()], origin)
    if not setting.is_list:
        problems.add(setting.key, f"takes one value, not a list; must be {setting.allowed}", origin)
        return None
    return Given([item.strip() for item in value], origin)


# ---- YAML


def read_file(path: Path, problems: Problems) -> dict[str, Given]:
    """Key → what a settings file gives.  Errors of syntax name the line without quoting it."""
    try:
        node = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        problems.add_file(str(path), f"cannot be read: {error.strerror or error}")
        return {}
    except UnicodeDecodeError as error:
        problems.add_file(str(path), f"is not UTF-8 (byte {error.start})")
        return {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}: column {mark.column + 1}" if mark is not None else ""
        problems.add_file(f"{path}{where}", f"is not YAML: {error.problem or error.context}")
        return {}
    except yaml.YAMLError as error:
        problems.add_file(str(path), f"is not YAML: {' '.join(str(error).split())}")
        return {}
    except RecursionError:
        problems.add_file(str(path), "is nested too deep")
        return {}
    found: dict[str, Given] = {}
    if node is None or _is_null(node):
        return found
    if not isinstance(node, yaml.MappingNode):
        what = f"must be a mapping of sections, such as 'kafka:', not {_kind(node)}"
        problems.add_file(f"{path}:{_line(node)}", what)
        return found
    _read_section(node, "", f"file:{path}", found, problems)
    return found


def _read_section(
    node: yaml.MappingNode, path: str, file: str, found: dict[str, Given], problems: Problems
) -> None:
    lines: dict[str, int] = {}
    for name_node, value in node.value:
        origin = f"{file}:{_line(name_node)}"
        if not isinstance(name_node, yaml.ScalarNode):
            problems.add(path or "the file", f"a name must be a text, not {_kind(name_node)}", origin)
            continue
        name = name_node.value
        key = f"{path}.{name}" if path else name
        if name in lines:
            problems.add(key, f"stands here twice, the first time on line {lines[name]}", origin)
            continue
        lines[name] = _line(name_node)
        if name_node.tag == "tag:yaml.org,2002:merge":
            problems.add(key, "YAML merge keys are not supported; give several --config files", origin)
        elif "." in name:
            problems.add(
                key, "sections are nested in YAML: write 'kafka:' and below it 'group_id: …'", origin
            )
        elif key in SECTIONS:
            if isinstance(value, yaml.MappingNode):
                _read_section(value, key, file, found, problems)
            elif not _is_null(value):
                problems.add(key, f"is a section and takes settings below it, not {_kind(value)}", origin)
        elif key in SETTINGS:
            _read_leaf(SETTINGS[key], value, origin, found, problems)
        else:
            problems.add(key, f"no such setting{_unknown_in_file(value, key)}", origin)


def _unknown_in_file(value: yaml.Node, key: str) -> str:
    """A hint for an unknown key; for an unknown section, by the first setting below it."""
    if sections := difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.75):
        return _did_you_mean(sections)
    probe = key
    if isinstance(value, yaml.MappingNode) and value.value and isinstance(value.value[0][0], yaml.ScalarNode):
        probe = f"{key}.{value.value[0][0].value}"
    return _did_you_mean(close_keys(probe))


def _read_leaf(
    setting: Setting, node: yaml.Node, origin: str, found: dict[str, Given], problems: Problems
) -> None:
    key = setting.key
    if _is_null(node):
        return  # says nothing, as if the line were not there
    if setting.is_secret:
        what = f"a secret does not belong in a settings file; use {setting.variable} or {key}_file"
        problems.add(key, what, origin)
        return
    odd = next((part for part in _parts(node) if not _is_plain(part)), None)
    if odd is not None:
        problems.add(key, f"must be {setting.allowed}, not {_kind(odd)}", origin)
        return
    given: Given | None
    if isinstance(node, yaml.SequenceNode):
        given = _given(setting, [item.value for item in node.value], origin, problems)
    else:
        given = _given(setting, node.value, origin, problems)
    if given is not None:
        found[key] = given


def _parts(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) and _is_standard(node) else [node]


def _is_standard(node: yaml.Node) -> bool:
    return node.tag in _STANDARD_TAGS


def _is_plain(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and _is_standard(node) and not _is_null(node)


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if not _is_standard(node):
        return f"a value with the tag {node.tag}"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if _is_null(node) else "a single value"


# ---- environment


def read_environment(environ: Mapping[str, str], problems: Problems, warnings: list[str]) -> dict[str, Given]:
    """Key → what the environment gives.  An empty variable says nothing: compose files write such.

    Only names with ``__`` after the prefix are settings: for a Service called ``inferstream``, Kubernetes
    puts ``INFERSTREAM_PORT=tcp://…`` and its like into every pod of the namespace.
    """
    found: dict[str, Given] = {}
    for variable in sorted(environ):
        upper, value = variable.upper(), environ[variable]
        if not upper.startswith(PREFIX):
            continue
        origin = f"env {variable}"
        if "__" not in upper.removeprefix(PREFIX):
            mistaken = _KEY_OF_MISTAKE.get(variable)
            if mistaken is not None and not value.startswith("tcp://"):
                warnings.append(f"{variable} is not read; did you mean {SETTINGS[mistaken].variable}?")
            elif upper.removeprefix(PREFIX).lower() in SECTIONS:
                warnings.append(f"{variable} is not read; a variable is one setting: {upper}__NAME")
            continue
        key = _KEY_OF_VARIABLE.get(variable)
        if key is None:
            names = [SETTINGS[near].variable for near in _close_to_variable(upper)]
            problems.add(variable, f"no such setting{_did_you_mean(names)}", "env")
        elif value.strip():
            given = _given(SETTINGS[key], value, origin, problems)
            if given is not None:
                found[key] = given
    return found


def _close_to_variable(upper: str) -> list[str]:
    if upper in _KEY_OF_VARIABLE:  # only the case is wrong
        return [_KEY_OF_VARIABLE[upper]]
    return close_keys(upper.removeprefix(PREFIX).strip("_").lower().replace("__", "."))


def config_files(environ: Mapping[str, str]) -> list[Path]:
    """The files that INFERSTREAM_CONFIG names, with commas or colons between them."""
    text = environ.get(CONFIG_VARIABLE, "")
    return [Path(part.strip()) for part in re.split(f"[,{re.escape(os.pathsep)}]", text) if part.strip()]


# ---- flags


def parse_flags(arguments: Sequence[str]) -> dict[str, str | list[str]]:
    """Turn ``["--kafka.group-id", "x", "--input.topics=a"]`` into key → value, for :func:`load_settings`.

    A list takes its flag several times, or commas; of any other flag the last one counts.  ``_`` is as good
    as ``-``.  Raises SettingsError with a line for each argument that is wrong; none quotes a value, which
    may be a password.
    """
    found: dict[str, str | list[str]] = {}
    problems = Problems()
    rest = list(arguments)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("--") or name == "--":
            what = "an option" if name.startswith("-") else "an argument"
            problems.lines.append(
                f"{brief(name)}: unexpected; settings are flags such as --kafka.group-id, this is {what}"
            )
            continue
        key = _KEY_OF_FLAG.get(name.replace("_", "-"))
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, value = "=", rest.pop(0)
        if key is None:
            near = [SETTINGS[known].flag for known in close_keys(name[2:].replace("-", "_"))]
            problems.lines.append(f"{name}: no such flag{_did_you_mean(near)}")
            continue
        setting = SETTINGS[key]
        if setting.is_secret:
            problems.lines.append(
                f"{name}: a secret has no flag, as every process could read it; use {setting.variable} or "
                f"{SETTINGS[f'{key}_file'].flag}"
            )
        elif not has_value:
            problems.lines.append(
                f"{name}: needs a value; must be {setting.allowed} (if it begins with '--': {name}=VALUE)"
            )
        elif not value.strip():
            problems.lines.append(f"{name}: the value is empty; must be {setting.allowed}")
        elif setting.is_list:
            earlier = found.get(key, [])
            given = _given(setting, value, f"flag {setting.flag}", problems)
            if given is not None and isinstance(earlier, list) and isinstance(given.value, list):
                found[key] = [*earlier, *given.value]
        else:
            found[key] = value
    if problems.lines:
        raise SettingsError("\n".join(problems.lines))
    return found


def read_flags(flags: Mapping[str, object], problems: Problems) -> dict[str, Given]:
    """Key → what flags, or a caller that sets settings itself, give.  None says nothing."""
    found: dict[str, Given] = {}
    for key, value in flags.items():
        if value is None:
            continue
        setting = SETTINGS.get(key)
        if setting is None:
            problems.add(key, f"no such setting{_did_you_mean(close_keys(key))}", "flag")
            continue
        text = [str(item) for item in value] if isinstance(value, list | tuple) else str(value)
        given = _given(setting, text, f"flag {setting.flag}", problems)
        if given is not None:
            found[key] = given
    return found
