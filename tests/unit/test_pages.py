"""Every link of every page leads somewhere."""

from pathlib import Path

import pytest
from support.pages import anchors, links

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "docs" / "api", ROOT / "docs" / "operations", ROOT / "k8s")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), link


def test_links_are_read_where_there_are_any() -> None:
    page = "# Some `code`, and more\n[a](b.md#c-d) ![no](x.png)\n```\n[not](here)\n# Nor this\n```\n"
    assert list(links(page)) == ["b.md#c-d"]
    assert anchors(page) == {"some-code-and-more"}
