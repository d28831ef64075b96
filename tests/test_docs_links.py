"""Every relative link of the documentation leads to a file and a heading that exist; the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("helm/*/README.md*")]
)
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them: lower case, spaces as hyphens, punctuation left out."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(slug if not number else f"{slug}-{number}")
    return found


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures, those of other sites left out."""
    prose = re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", text))
    found: list[str] = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def wrong(page: Path) -> list[str]:
    problems = []
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists():
            problems.append(f"{link}: there is no such file")
        elif anchor and anchor not in anchors(target):
            problems.append(f"{link}: there is no such heading")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_when_followed_then_each_leads_somewhere(page: Path) -> None:
    assert not wrong(page)


def test_tests_when_named_as_proof_then_they_exist() -> None:
    existing = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in (
            file.stem,
            *re.findall(r"^ *(?:async )?def (test_\w+)\(", file.read_text(), re.MULTILINE),
        )
    }
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 50
    assert sorted(named - existing) == []


def test_links_when_broken_then_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_docs_links.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b.c`: d\n# E\n# E\n[1](#a-bc-d) [2](#e-1) [3](#e-2) [4](none.md) [5](../x) `[6](no)`\n"
        "```\n# f\n[7](no)\n```\n[8](#f) [`9`](page.md#e) [10](http://x)\n"
    )

    assert [problem.partition(":")[0] for problem in wrong(page)] == ["#e-2", "none.md", "../x", "#f"]


def test_site_when_built_then_every_page_is_in_its_menu() -> None:
    # The rest of the file is of Python objects that this loader need not make.
    text = (ROOT / "mkdocs.yml").read_text()
    menu = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    pages = re.findall(r"[\w-]+\.md", str(menu))

    assert sorted(pages) == sorted(
        ["index.md", "helm.md", "changelog.md", *(page.name for page in ROOT.glob("docs/*.md"))]
    )
