"""``python -m inferstream.settings > docs/settings.md``; with ``--schema``, the JSON Schema of a file."""

import json
import sys

from inferstream.settings.reference import json_schema, reference

if __name__ == "__main__":
    schema = sys.argv[1:] == ["--schema"]
    print(
        json.dumps(json_schema(), indent=2, ensure_ascii=False) if schema else reference(),
        end="\n" if schema else "",
    )
