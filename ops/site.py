"""What mkdocs does not do by itself: pages from outside of docs/, and links to the files of the repository.

A hook of mkdocs (``hooks`` in mkdocs.yml).  README.md becomes the first page, the chart's README and the changelog a
page each.  A file that a page links to and that is no page is copied to ``source/``; a folder has no page, so of such a
link only the text stays.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = PurePosixPath("docs")
PAGES = {"README.md": "index.md", "helm/inferstream/README.md": "helm.md", "CHANGELOG.md": "changelog.md"}

_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside, and the files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    sources = {
        target
        for file in files.documentation_pages()
        for _, _, link in _LINK.findall(_text_of(file.src_uri))
        if (target := _target(file.src_uri, link)) is not None and _is_source(target)
    }
    for target in sorted(sources):
        files.append(File.generated(config, _copy(target), content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let every link into the repository lead somewhere within the site."""
    here = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        target = _target(here, link)
        if target is None:
            return match[0]
        if (ROOT / target).is_dir():
            return text
        anchor = link.partition("#")[2]
        if target in PAGES:
            place = PAGES[target]
        elif PurePosixPath(target).is_relative_to(DOCS):
            place = str(PurePosixPath(target).relative_to(DOCS))
        else:
            place = _copy(target)
        return f"{image}[{text}]({place}{'#' * bool(anchor)}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if n % 2 else _LINK.sub(rewritten, part) for n, part in enumerate(parts))


def _home(page: str) -> str:
    """Where a page lies in the repository."""
    return next((source for source, name in PAGES.items() if name == page), str(DOCS / page))


def _text_of(page: str) -> str:
    return "".join(_FENCE.split((ROOT / _home(page)).read_text(encoding="utf-8"))[::2])


def _target(page: str, link: str) -> str | None:
    """The path in the repository that a link leads to; None if it leads elsewhere, or to its own page."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    return normpath(relpath(str(PurePosixPath(_home(page)).parent / path)))


def _is_source(target: str) -> bool:
    return (
        target not in PAGES and not PurePosixPath(target).is_relative_to(DOCS) and (ROOT / target).is_file()
    )


def _copy(target: str) -> str:
    """A text file keeps its look in a browser whatever it is called."""
    return f"source/{target}" if target.endswith((".json", ".png", ".txt")) else f"source/{target}.txt"
