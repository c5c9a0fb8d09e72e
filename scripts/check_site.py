"""Whether every link within a built site leads somewhere, and no page loads anything from elsewhere.

    python scripts/check_site.py FOLDER

mkdocs checks the links that Markdown writes; this also sees those of the theme, of docstrings and of the hooks, as a
browser does. Links to other sites are not followed: they need a network, and their owners.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ASSETS = {"link", "script", "img", "iframe", "source", "video", "audio", "object", "embed", "use", "image"}
FOREIGN = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
LOADED = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
# What a browser does not load though it stands in such a place.
UNLOADED_LINKS = {"canonical", "next", "prev", "edit", "license", "author"}


class Found(NamedTuple):
    """An address that a page names, in which element, and whether a browser loads it by itself."""

    element: str
    address: str
    loaded: bool


class Page(HTMLParser):
    """The addresses that a page names, and the places in it that can be named."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Found] = []
        self.places = {""}
        self._styles = False  # whether what comes is a style sheet
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.places.update(value for name, value in given.items() if name in ("id", "name") and tag != "meta")
        unloaded = tag == "link" and given.get("rel") in UNLOADED_LINKS
        for name in ("href", "src", "data", "poster", "xlink:href"):
            if name in given:
                self.found.append(Found(tag, given[name], tag in ASSETS and not unloaded))
        self.found += [Found(tag, address, True) for address in loaded(given.get("style", ""))]
        self._styles = tag == "style"
        for part in given.get("srcset", "").split(","):
            if part.strip():
                self.found.append(Found(tag, part.split()[0], True))

    def handle_data(self, data: str) -> None:
        if self._styles:
            self.found += [Found("style", address, True) for address in loaded(data)]

    def handle_endtag(self, tag: str) -> None:
        self._styles = False


def loaded(style: str) -> list[str]:
    """Return the addresses that a style sheet, or an attribute ``style``, has a browser load."""
    return [(match[1] or match[2]).strip() for match in LOADED.finditer(style)]


def problems(site: Path) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        place = path.relative_to(site)
        for found in page.found:
            if FOREIGN.match(found.address):
                if found.loaded:
                    yield f"{place}: <{found.element}> loads {found.address}"
            elif not urlsplit(found.address).scheme:
                yield from (f"{place}: {why}" for why in astray(found.address, path, site, pages))
    for path in sorted(site.rglob("*.css")):
        for address in loaded(path.read_text(encoding="utf-8")):
            if FOREIGN.match(address):
                yield f"{path.relative_to(site)}: loads {address}"


def astray(address: str, path: Path, site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Yield why a link within the site leads nowhere, if it does."""
    parts = urlsplit(address)
    start = site if parts.path.startswith("/") else path.parent
    target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site.resolve()):
        yield f"{address} leads out of the site"
    elif not target.is_file():
        yield f"{address} is not there"
    elif target in pages and unquote(parts.fragment) not in pages[target].places:
        yield f"{address}: there is no place of that name"


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    found = list(dict.fromkeys(problems(site)))
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    if found:
        sys.exit(f"{len(found)} links or assets are wrong")
    print(f"{len(list(site.rglob('*.html')))} pages: every link within the site leads somewhere, nothing is loaded")


if __name__ == "__main__":
    main()
