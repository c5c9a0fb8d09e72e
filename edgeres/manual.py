"""The man page, written from the commands themselves: what ``--help`` says of each, in roff."""

from __future__ import annotations

import re
from typing import Dict, Iterator, List

import click

from edgeres import __version__
from edgeres.exits import BUG, FAILED, INTERRUPTED, OK, TERMINATED, UNDECIDED, USAGE

CODES = {
    OK: "good",
    FAILED: "an error that can be acted on, or a gate that failed",
    USAGE: "wrong usage",
    UNDECIDED: "a gate that these samples cannot decide",
    BUG: "a bug in edgeres, with its traceback",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}
ENVIRONMENT = {
    "EDGERES_PASSPHRASE": "Unlocks a private key, where nobody can be asked.",
    "NO_COLOR": "Set to anything: no colours.",
    "COLUMNS": "How wide tables are, where there is no terminal.",
    "GITHUB_ACTIONS, CI": "Set by CI systems: verdicts are annotations too, and no baseline is accepted there.",
}
SEE = "Everything else is in the README.md of edgeres, and in SECURITY.md, whom to trust with what."


def page(root: click.Context) -> str:
    """Return the page about a group of commands."""
    group = root.command
    assert isinstance(group, click.Group)
    lines = [
        f'.TH EDGERES 1 "" "edgeres {_plain(__version__)}" "User commands"',
        ".SH NAME",
        "edgeres \\- a PyTorch ResNet becomes a verified INT8 bundle, and the bundle runs on a robot",
        ".SH SYNOPSIS",
        ".B edgeres",
        ".I COMMAND",
        "[\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...",
        ".SH DESCRIPTION",
        *_text(group.help or ""),
        ".SH COMMANDS",
    ]
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        if command is not None and not command.hidden:
            lines += _command(command, click.Context(command, info_name=name, parent=root))
    lines += [".SH EXIT STATUS", *_list({str(code): words for code, words in CODES.items()})]
    lines += [".SH ENVIRONMENT", *_list(ENVIRONMENT), ".SH SEE ALSO", _plain(SEE)]
    return "\n".join(lines)


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f".SS edgeres {_plain(context.info_name or '')} {_plain(usage)}"
    yield from _text(command.help or "")
    records = [param.get_help_record(context) for param in command.get_params(context)]
    for names, words in (record for record in records if record is not None and record[1]):
        yield from (".TP", f"\\fB{_plain(names)}\\fR", _plain(" ".join(words.split())))
    yield from _text(command.epilog or "")


def _text(text: str) -> Iterator[str]:
    """Yield paragraphs; one that click leaves as it stands is set as it stands."""
    for paragraph in re.split(r"\n[ \t]*\n", re.sub(r"(?m)^[ \t]+(?=\x08)", "", _dedented(text)).strip("\n")):
        if paragraph.startswith("\b"):
            yield from (".PP", ".EX", *(_plain(line) for line in paragraph[1:].strip("\n").split("\n")), ".EE")
        elif paragraph.strip():
            yield from (".PP", _plain(" ".join(paragraph.split())))


def _dedented(text: str) -> str:
    """Return a docstring without the spaces in front of every line."""
    first, *others = text.split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in others if line.strip()), default=0)
    return "\n".join([first.lstrip(" "), *(line[margin:] for line in others)])


def _list(items: Dict[str, str]) -> List[str]:
    return [line for name, words in items.items() for line in (".TP", f"\\fB{_plain(name)}\\fR", _plain(words))]


def _plain(text: str) -> str:
    """Return text that roff sets as it is, in ASCII, which every roff reads."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("'", "\\(aq")
    escaped = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in escaped)
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
