"""``inferstream`` with other constants: those of CONSTANTS, JSON of the form ``{"module:NAME": value}``."""

from __future__ import annotations

import importlib
import json
import os

from inferstream.cli.main import main

for place, value in json.loads(os.environ["CONSTANTS"]).items():
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    assert type(getattr(found, name)) is type(value), f"{place} is not what it was"
    setattr(found, name, value)

if __name__ == "__main__":
    main()
