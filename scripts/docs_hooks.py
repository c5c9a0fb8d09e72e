"""What mkdocs does beside its own: references of commands and recipes, and names of Sphinx' kind in docstrings.

``mkdocs.yml`` names this file under ``hooks``. A page that says ``<!-- commands -->`` gets the reference of every
command there, from click's own objects, so that it cannot differ from ``edgeres COMMAND --help``; where it says
``<!-- recipe -->``, the keys of a recipe, from the nouns that read it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from edgeres import OPTIONS
from edgeres.cli import cli
from edgeres.guide import LESSONS
from edgeres.recipe import SECTIONS

COMMANDS, RECIPE = "<!-- commands -->", "<!-- recipe -->"
ROLE = re.compile(r":(?:func|meth|class|mod|data|attr):<code>~?([^<]*)</code>")
ROLE_IN_TEXT = re.compile(r":(?:func|meth|class|mod|data|attr):`~?([^`]*)`")


SECURITY = "SECURITY.md"  # at the top of the repository, where readers of code look for it; a page of the site as well


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make SECURITY.md a page."""
    content = Path(config.config_file_path).with_name(SECURITY).read_text(encoding="utf-8")
    files.append(File.generated(config, SECURITY.lower(), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the references where a page asks for them, and lead links out of docs/ to where the site has them."""
    markdown = markdown.replace(f"](../../{SECURITY}", f"](../{SECURITY.lower()}").replace("](docs/", "](")
    for place, made in ((COMMANDS, commands), (RECIPE, recipe_keys)):
        if place in markdown:
            markdown = markdown.replace(place, made())
    return markdown


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
    lesson = LESSONS.get(name)
    if lesson is not None:
        lines = [line for what, example in lesson.examples for line in (f"# {what}", example)]
        yield "\n".join(["```sh", *lines, "```"])
        yield from (
            escaped(f"{word}: {text}") for word, text in (("Exit codes", lesson.codes), ("Next", lesson.after)) if text
        )


def recipe_keys() -> str:
    """Return a table of each section's keys in Markdown: the default, the flag that overrides it, and what it is."""
    flags = {key: name for name, key in OPTIONS.items()}
    options = {one.name: one for one in cli.commands["build"].params if isinstance(one, click.Option)}
    parts = []
    for section, kind in SECTIONS.items():
        rows = []
        for field in msgspec.structs.fields(kind):
            key = f"{section}.{field.name}"
            flag = options.get(flags.get(key, ""))
            default = "" if field.default is None else f"`{json.dumps(field.default)}`"
            said, what = (f"`{flag.opts[0]}`", escaped(flag.help or "")) if flag else ("", "")
            rows.append(f"| `{field.name}` | {default} | {said} | {what} |")
        text = " ".join(inspect.cleandoc(kind.__doc__ or "").replace("``", "`").split())
        text = ROLE_IN_TEXT.sub(r"`\1`", text)
        table = "\n".join(["| key | default | flag | |", "| --- | --- | --- | --- |", *rows])
        parts.append(f"## [{section}]\n\n{text}\n\n{table}")
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Return plain text as Markdown that shows it as it is; what stands in backticks stays code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<>\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
