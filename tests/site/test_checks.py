"""The checks of the site find what they look for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.site import checks

URL = "https://github.com/owner/name"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site of two pages in which everything is right."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.css").write_text("b { background: url('data:image/png;base64,xx'); filter: url(#f) }")
    (tmp_path / "p.png").write_bytes(b"")
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="a.css"><h1 id="top">A</h1><a href="docs/two.html#part">two</a>'
        '<a href="#top">up</a><a href="https://example.org/x">out</a>'
        f'<a href="{URL}/blob/main/kvlab/a.py#L3">file</a><a href="{URL}/tree/main/kvlab">folder</a>'
    )
    (tmp_path / "docs" / "two.html").write_text(
        '<h2 id="part">B</h2><a href="../index.html">back</a><img src="../p.png" alt="two bars">'
    )
    return tmp_path


def complaints(site: Path) -> list[str]:
    """What all checks say."""
    pages = checks.read(site)
    return [
        *checks.broken_links(site, pages),
        *checks.malformed(pages),
        *checks.pictures_without_text(pages),
        *checks.foreign_parts(site, pages),
        *checks.missing_parts(site, pages),
    ]


def test_a_good_site_has_no_complaint(site: Path) -> None:
    assert complaints(site) == []
    assert len(list(checks.internal_links(checks.read(site)))) == 3
    assert checks.links_to_repository(checks.read(site), URL) == {"kvlab/a.py#L3", "kvlab"}


SPOILT = [
    '<a href="gone.html">x</a>',
    '<a href="docs/two.html#gone">x</a>',
    '<a href="#gone">x</a>',
    '<a href="p.png#anchor">x</a>',
    '<a href="../index.html">out of the site</a>',
    '<a href="docs/">a folder</a>',
    '<a href="http://example.org/">not encrypted</a>',
    '<a href="https://exa mple.org/">x</a>',
    '<a href="https://localhost/">x</a>',
    '<a href="javascript:alert(1)">x</a>',
    '<img src="p.png">',
    '<img src="p.png" alt="">',
    '<img src="p.png" alt="the file p.png">',
    '<img src="gone.png" alt="two bars">',
    '<img src="https://example.org/p.png" alt="two bars">',
    '<script src="https://example.org/x.js"></script>',
    '<script src="//example.org/x.js"></script>',
    '<script src="gone.js"></script>',
    '<link rel="stylesheet" href="https://example.org/x.css">',
    '<link rel="preload" href="https://example.org/x.woff2">',
    '<p style="background: url(https://example.org/p.png)">x</p>',
]


@pytest.mark.parametrize("html", SPOILT)
def test_a_check_finds_what_is_wrong(site: Path, html: str) -> None:
    (site / "index.html").write_text((site / "index.html").read_text() + html)
    assert len(complaints(site)) == 1


@pytest.mark.parametrize("css", ['@import "https://example.org/x.css";', "b { background: url(//example.org/x.png) }"])
def test_style_sheets_are_read_too(site: Path, css: str) -> None:
    (site / "a.css").write_text(css)
    assert len(complaints(site)) == 1
