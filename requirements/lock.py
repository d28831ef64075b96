"""Regenerate the pinned requirement files from pyproject.toml: ``make lock``.

One resolution over everything (Python 3.11 and later, every platform), so that the files agree with each
other, then split by who needs a package; the last three stand alone:

    base.txt    what the service needs, without torch and what torch alone brings
    torch.txt   torch and what it alone brings: gigabytes, so an image keeps it in a layer of its own
    dev.txt     the extras demo, test and dev; includes the two above
    demo.txt, accelerate.txt
                what an extra adds to the service, for an image that has it
    build.txt   what builds the service's wheel, for an image as well
    uv.txt      the installer itself, for machines that have none
    docs.txt    what makes the site of the documentation, in an environment of its own
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
IMAGE_EXTRAS = ("demo", "accelerate")  # those that a container image can have
OLDEST_PYTHON = "3.11"

Blocks = dict[str, list[str]]
"""The lines of each package by its name: pins (there may be one per Python version), hashes, annotations."""


def compile_pins(folder: Path, requirements: Iterable[str], constraints: Path | None = None) -> str:
    """Resolve the requirements; return the pinned file's text."""
    source = folder / "requirements.in"
    source.write_text("\n".join(requirements) + "\n")
    command = [os.environ.get("UV", "uv"), "pip", "compile", "--quiet", "--universal"]
    command += ["--python-version", OLDEST_PYTHON, "--generate-hashes", "--no-emit-index-url", "--no-header"]
    # Relative, in its own folder: annotations show the path, which must not differ from machine to machine.
    command += ["--no-config", "--upgrade", source.name]
    if constraints is not None:
        command += ["--constraints", str(constraints)]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def blocks(pins: str) -> Blocks:
    """Split a pinned file into packages."""
    found: Blocks = {}
    name = ""
    for line in pins.splitlines():
        if start := re.match(r"([A-Za-z0-9._-]+)==", line):
            name = start[1]
        # The packages we ask for ourselves are annotated with the temporary file's name.
        line = line.replace("-r requirements.in", "inferstream (pyproject.toml)")
        found.setdefault(name, []).append(line)
    return found


def write(name: str, header: str, packages: Blocks) -> None:
    lines = ["# Made by `make lock` from pyproject.toml; do not edit.", *header.splitlines(), ""]
    for package in sorted(packages):
        lines += packages[package]
    (HERE / name).write_text("\n".join(lines) + "\n")
    print(f"requirements/{name}: {len(packages)} packages", file=sys.stderr)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime: list[str] = project["dependencies"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    extras: list[str] = [need for extra in optional.values() for need in extra]
    build_needs = [need for need in optional["dev"] if need.startswith("hatchling")]
    without_torch = [need for need in runtime if not re.match(r"torch\b", need)]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        everything = compile_pins(folder, [*runtime, *extras])
        # The smaller closures are only asked for their names, under the versions found first.
        pinned = folder / "everything.txt"
        pinned.write_text(everything)
        base = set(blocks(compile_pins(folder, without_torch, pinned)))
        service = set(blocks(compile_pins(folder, runtime, pinned)))
        of_extras = {
            extra: set(blocks(compile_pins(folder, [*runtime, *optional[extra]], pinned))) - service
            for extra in IMAGE_EXTRAS
        }
        build = set(blocks(compile_pins(folder, build_needs, pinned)))
        uv = blocks(compile_pins(folder, ["uv"]))
        docs = blocks(compile_pins(folder, ["mkdocs-material"]))

    packages = blocks(everything)
    write("base.txt", "# The service, without torch.", {n: packages[n] for n in packages if n in base})
    write(
        "torch.txt",
        "# torch and what it alone brings. Install after base.txt (or with --no-deps): they share packages.",
        {n: packages[n] for n in packages if n in service - base},
    )
    write(
        "dev.txt",
        "# The extras demo, test and dev, on top of the service.\n-r base.txt\n-r torch.txt",
        {n: packages[n] for n in packages if n not in service},
    )
    for extra, names in of_extras.items():
        write(
            f"{extra}.txt",
            f"# The extra {extra}, on top of the service.",
            {n: packages[n] for n in packages if n in names},
        )
    write("build.txt", "# What builds the service's wheel.", {n: packages[n] for n in packages if n in build})
    write("uv.txt", "# The installer that `make setup` uses where there is none.", uv)
    write("docs.txt", "# What `make docs` builds the site with.", docs)


if __name__ == "__main__":
    main()
