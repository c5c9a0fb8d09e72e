"""A page's content → HTML. The only file that imports jinja2.

All that comes from a bundle is foreign text: jinja2 escapes it, control characters are spelled out, and the page itself
forbids the browser to run anything or to fetch anything.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import Any, Match, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from edgeres.errors import printable
from edgeres.page import plots
from edgeres.page.content import Contents

PLACE = Path(__file__).parent
TEMPLATE = "page.html"
STYLE = "page.css"
CODE = re.compile(r"`(?P<command>[^`]+)`|(?<!\S)--[a-z][a-z-]*")


def render(contents: Contents) -> bytes:
    """Return the page, UTF-8; equal contents give equal bytes."""
    style = (PLACE / STYLE).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    text = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            page=contents,
            manifest=contents.manifest,
            report=contents.manifest.report,
            plots=plots,
            style=Markup(style),  # our own file
            digest=digest,
        )
    )
    return text.encode("utf-8")


@functools.lru_cache(maxsize=None)  # it compiles the templates once
def _environment() -> Environment:
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(PLACE),
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(percent=_percent, points=_points, decibels=_decibels, flags=_flags)
    return made


def _shown(value: Any) -> Any:
    """Return text with its control characters spelled out; lone surrogates, which UTF-8 has not, are among these."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _flags(text: str) -> Markup:
    """Return text in which commands between backticks, and flags, are set as code: no line breaks within a flag."""

    def code(found: Match[str]) -> str:
        command = found["command"]
        return f"<code>{found[0]}</code>" if command is None else f'<code class="command">{command}</code>'

    return Markup(CODE.sub(code, str(escape(_shown(text)))))  # escaped before


def _percent(value: Optional[float], digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _points(value: Optional[float]) -> str:
    return "–" if value is None else f"{value:+.2f} pp"


def _decibels(value: Optional[float]) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
