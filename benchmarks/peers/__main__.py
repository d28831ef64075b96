"""``python -m benchmarks.peers NAME``: make a peer's environment."""

from __future__ import annotations

import sys

from benchmarks.peers import HERE, PeerUnavailable, environment


def main() -> int:
    names = sorted(path.stem for path in HERE.glob("*.txt"))
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        print(f"usage: python -m benchmarks.peers {'|'.join(names)}", file=sys.stderr)
        return 2
    try:
        print(environment(sys.argv[1]))
    except PeerUnavailable as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
