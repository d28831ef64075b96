"""The version of this installation, without importing anything of it."""

from __future__ import annotations

import functools
import importlib.metadata


@functools.cache
def version() -> str:
    """As in pyproject.toml; ``0+source`` when run from a checkout that is not installed."""
    try:
        return importlib.metadata.version("inferstream")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
