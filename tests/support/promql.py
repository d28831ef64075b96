"""Reads the names of metrics out of PromQL."""

from __future__ import annotations

import re

_NOT_A_NAME = re.compile(
    r"""
    "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'      # strings
  | \{[^}]*\}                                  # matchers
  | \[[^\]]*\]                                 # ranges
  | \b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)   # labels
  | \boffset\s+\w+
  | \b(?:and|or|unless|bool|inf|nan)\b
  | \b\d[\w.]*                                 # numbers and durations
    """,
    re.VERBOSE | re.IGNORECASE,
)
_AGGREGATION = re.compile(r"\b(?:sum|avg|min|max|count|group|topk)\b")


def metric_names(query: str) -> set[str]:
    """The names of the metrics in a query: what is left without strings, matchers, labels, words and functions."""
    rest = _NOT_A_NAME.sub(" ", query)
    functions = re.findall(r"\b([a-z_]\w*)\s*\(", rest)
    names = set(re.findall(r"[a-zA-Z_:][\w:]*", rest))
    return {name for name in names - set(functions) if not _AGGREGATION.fullmatch(name)}
