"""The demo's documents: docstrings of the standard library and of packages that inferstream needs anyway.

They are read from source files with :mod:`ast`; no module is imported and nothing is executed.  What comes
out is the same on every run of one installation, and nothing is kept between runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS = 80  # below it a docstring says little more than the name does
PACKAGES = ("aiokafka", "numpy", "prometheus_client", "pydantic", "rich", "typer", "yaml")
_SKIPPED = frozenset(
    (
        "site-packages",
        "dist-packages",
        "distutils",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "encodings",
        "testing",
    )
)
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Docstring:
    """``name`` is the qualified name (``json.decoder.JSONDecoder``); it is unique among the documents."""

    name: str
    text: str


def collect(cancelled: Callable[[], bool] = lambda: False) -> list[Docstring]:
    """All public docstrings that are long enough, each text once.  Takes about 3 s of CPU time.

    General things come before special ones (fewer dots in the name first), in no particular order
    otherwise, so that any number of documents from the front is a fair choice.  Returns early, with what it
    has, once ``cancelled`` says so.
    """
    found: list[Docstring] = []
    for prefix, folder in _folders():
        for path in _sources(folder):
            if cancelled():
                break
            found += docstrings(_module(prefix, path.relative_to(folder)), path)
    return in_order(found)


def in_order(found: Iterable[Docstring]) -> list[Docstring]:
    """From the general to the special, each name and each text once."""
    names: set[str] = set()
    texts: set[str] = set()
    chosen: list[Docstring] = []
    for each in sorted(found, key=_rank):
        if each.name not in names and each.text not in texts:
            names.add(each.name)
            texts.add(each.text)
            chosen.append(each)
    return chosen


def docstrings(module: str, path: Path) -> list[Docstring]:
    """The public docstrings of one source file; none if it is no Python that this version reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a doubtful escape in someone else's source is not our business
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return [
        Docstring(name, text)
        for name, node in _documented(module, tree)
        if (text := ast.get_docstring(node)) and len(text) >= MIN_CHARACTERS and _is_text(text)
    ]


def _documented(name: str, node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.Module | _Named]]:
    yield name, node
    for child in node.body:
        if isinstance(child, _NAMED) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from _documented(f"{name}.{child.name}", child)
            else:
                yield f"{name}.{child.name}", child


_Named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _rank(each: Docstring) -> tuple[int, bytes, str]:
    return each.name.count("."), hashlib.sha256(each.name.encode()).digest(), each.text


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, written as an escape: no JSON can carry it
        return False
    return True


def _folders() -> Iterator[tuple[str, Path]]:
    """Folders of sources and the module name their files begin with."""
    yield "", Path(ast.__file__).parent
    for package in PACKAGES:
        try:
            spec = importlib.util.find_spec(package)  # of a top-level name: looks, does not import
        except (ImportError, ValueError):
            continue
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield package, Path(folder)


def _sources(folder: Path) -> list[Path]:
    """The public modules below the folder, in a fixed order."""
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return sorted(folder / path for path in paths if _is_public(path))


def _is_public(path: Path) -> bool:
    parts = (*path.parts[:-1], path.stem)
    return not any(
        part in _SKIPPED or "-" in part or (part.startswith("_") and part != "__init__") for part in parts
    )


def _module(prefix: str, path: Path) -> str:
    parts = [prefix, *path.with_suffix("").parts] if prefix else [*path.with_suffix("").parts]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)
