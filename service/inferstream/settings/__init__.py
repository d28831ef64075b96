"""The settings: one typed tree (:mod:`.tree`), read in layers (:mod:`.loading`), completed for the machine
(:mod:`.derive`).  Start with ``tree.py``: it is the reference manual.
"""

from inferstream.settings.derive import origins_of, resolve
from inferstream.settings.keys import SETTINGS, show, value_of
from inferstream.settings.loading import Loaded, load_settings
from inferstream.settings.machine import cores, device_kind
from inferstream.settings.reference import help_text, json_schema, reference
from inferstream.settings.sources import parse_flags
from inferstream.settings.tree import Settings

__all__ = [
    "SETTINGS",
    "Loaded",
    "Settings",
    "cores",
    "device_kind",
    "help_text",
    "json_schema",
    "load_settings",
    "origins_of",
    "parse_flags",
    "reference",
    "resolve",
    "show",
    "value_of",
]
