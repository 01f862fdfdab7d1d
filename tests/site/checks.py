"""What is checked of a built site, from its HTML alone: links, anchors, pictures, and where its parts come from."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {  # element: the attribute whose file a browser loads with the page
    "img": "src",
    "script": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "embed": "src",
    "object": "data",
}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}


@dataclass
class Page(HTMLParser):
    """What one page of the site has: anchors, links, pictures with their texts, and what it loads."""

    html: str
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag == "img":
            self.pictures.append((named.get("src", ""), named.get("alt", "")))
        if LOADED.get(tag) in named:
            self.loaded.append(named[LOADED[tag]])
        if tag == "link":
            is_loaded = LOADED_LINKS & set(named.get("rel", "").split())
            (self.loaded if is_loaded else self.links).append(named["href"])
        self.loaded += _urls(named.get("style", ""))


def read(folder: Path) -> dict[str, Page]:
    """The pages of a site by name."""
    files = sorted(folder.rglob("*.html"))
    return {path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8")) for path in files}


def is_foreign(url: str) -> bool:
    """Whether a URL names another host or another scheme; `data:` has its bytes in itself."""
    parts = urlsplit(url)
    return bool(parts.netloc or (parts.scheme and parts.scheme != "data"))


def internal_links(pages: Mapping[str, Page]) -> Iterator[tuple[str, str]]:
    """Each link within the site: the page it is on, and its target."""
    return ((name, link) for name, page in pages.items() for link in page.links if not is_foreign(link))


def broken_links(folder: Path, pages: Mapping[str, Page]) -> list[str]:
    """Links within the site to a file or an anchor that is not there."""
    return [f"{name}: {link}" for name, link in internal_links(pages) if not _resolves(folder, pages, name, link)]


def _resolves(folder: Path, pages: Mapping[str, Page], name: str, link: str) -> bool:
    parts = urlsplit(link)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
    if path not in pages:
        return not path.startswith("..") and (folder / path).is_file() and not parts.fragment
    return not parts.fragment or unquote(parts.fragment) in pages[path].anchors


def links_to_repository(pages: Mapping[str, Page], url: str) -> set[str]:
    """The paths and anchors behind links to files and folders of the repository at `url`."""
    pattern = re.compile(rf"{re.escape(url)}/(?:blob|tree)/main/(.+)")
    matches = (pattern.fullmatch(link) for page in pages.values() for link in page.links)
    return {match[1] for match in matches if match}


def malformed(pages: Mapping[str, Page]) -> list[str]:
    """Links to other hosts that no browser could follow, or that are not encrypted."""
    foreign = ((name, link) for name, page in pages.items() for link in page.links if is_foreign(link))
    return [f"{name}: {link}" for name, link in foreign if not _is_well_formed(link)]


def _is_well_formed(link: str) -> bool:
    parts = urlsplit(link)
    host = parts.hostname or ""
    return parts.scheme == "https" and re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", host) is not None and " " not in link


def pictures_without_text(pages: Mapping[str, Page]) -> list[str]:
    """Pictures whose alternative text is missing, or is only the name of the file."""
    every = ((name, src, alt) for name, page in pages.items() for src, alt in page.pictures)
    return [f"{name}: {src}" for name, src, alt in every if len(alt.split()) < 2 or posixpath.basename(src) in alt]


def foreign_parts(folder: Path, pages: Mapping[str, Page]) -> list[str]:
    """What a browser would load from another host: by an element, a style, or a style sheet."""
    parts = [(name, part) for name, page in pages.items() for part in page.loaded]
    for sheet in folder.rglob("*.css"):
        parts += [(sheet.name, part) for part in _urls(sheet.read_text(encoding="utf-8"))]
    return [f"{name}: {part}" for name, part in parts if is_foreign(part)]


def missing_parts(folder: Path, pages: Mapping[str, Page]) -> list[str]:
    """What a page would load from the site and does not find."""
    parts = ((name, part) for name, page in pages.items() for part in page.loaded if not is_foreign(part))
    return [
        f"{name}: {part}" for name, part in parts if not part.startswith("data:") and not _there(folder, name, part)
    ]


def _there(folder: Path, name: str, part: str) -> bool:
    return (folder / posixpath.dirname(name) / unquote(urlsplit(part).path)).is_file()


def _urls(css: str) -> Iterable[str]:
    """The URLs of a style sheet; those of fragments of the page itself, such as url(#a), name no file."""
    found = re.findall(r"""url\(\s*['"]?([^'")]+)['"]?\s*\)|@import\s+['"]([^'"]+)['"]""", css)
    return [one or other for one, other in found if not (one or other).startswith("#")]
