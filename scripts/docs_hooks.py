"""What mkdocs does beside its own: the command line's reference, and names of Sphinx' kind in docstrings.

``mkdocs.yml`` names this file under ``hooks``. A page that says ``<!-- commands -->`` gets the reference of every
command there, from click's own objects, so that it cannot differ from ``edgeres COMMAND --help``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import click

from edgeres.cli import cli

PLACE = "<!-- commands -->"
ROLE = re.compile(r":(?:func|meth|class|mod|data|attr):<code>~?([^<]*)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands where a page asks for them."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Let docstrings say ``:func:`edgeres.load```, as Python's own tools read it, and show the name alone."""
    return ROLE.sub(r"<code>\1</code>", html)


def commands() -> str:
    """Return the reference of all commands in Markdown, in the order of their names."""
    return "\n\n".join("\n\n".join(reference(name, cli.commands[name])) for name in sorted(cli.commands))


def reference(name: str, command: click.Command) -> Iterator[str]:
    """Yield the parts of one command's reference."""
    context = click.Context(command, info_name=f"edgeres {name}")
    yield f"## edgeres {name}"
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    yield from (escaped(" ".join(part.split())) for part in inspect.cleandoc(command.help or "").split("\n\n"))
    records = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
    rows = [f"| `{option.replace('|', chr(92) + '|')}` | {escaped(text)} |" for option, text in records]
    yield "\n".join(["| option | |", "| --- | --- |", *rows])


def escaped(text: str) -> str:
    """Return plain text as Markdown that shows it as it is; what stands in backticks stays code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<>\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
