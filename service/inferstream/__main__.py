"""``python -m inferstream``: the same as the console script ``inferstream``."""

from inferstream.cli.main import main

main()
