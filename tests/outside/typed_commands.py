"""Commands as a page types them, checked without running them: edgeres' own, requirements, files that are named."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
from packaging.requirements import InvalidRequirement, Requirement

from edgeres import cli

REPOSITORY = Path(__file__).resolve().parents[2]


class PageError(AssertionError):
    """A page that says what does not hold."""


def check_commands(code: str, place: str) -> None:
    """Check of commands what can be checked without running them: edgeres' own, requirements, files named."""
    for words in commands(code):
        if words[0] == "edgeres":
            check_command(words[1:], place)
        elif "pip" in words and "install" in words:
            check_requirements(words[words.index("install") + 1 :], place)
        for word in words:
            if word.startswith(("examples/", "scripts/")) and not (REPOSITORY / word).exists():
                raise PageError(f"{place}: {word} is not in the repository")


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script, without redirections and variables set before it."""
    for tokens in lines_of_tokens(code):
        words: list[str] = []
        skip = False
        for token in [*tokens, ";"]:
            if set(token) <= set("<>"):
                skip = True  # what follows is a file
            elif set(token) <= set("|&;()"):
                while words and re.fullmatch(r"\w+=.*|!|if|then|do|sudo|exec", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words, skip = [], False
            elif not skip:
                words.append(token)
            else:
                skip = False


def lines_of_tokens(code: str) -> Iterator[list[str]]:
    """Yield the tokens of each line of a shell script; a line goes on where a backslash or an open quote says so."""
    line = ""
    for part in re.sub(r"\\\n", " ", code).split("\n"):
        line += part
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a quote is open
            line += "\n"
            continue
        line = ""
        yield tokens


def check_command(arguments: list[str], place: str, complete: bool = True) -> None:
    """Parse an edgeres command as click does: command, options and choices have to exist.

    ``complete``: whether what a command cannot do without has to be there.
    """
    said = f"edgeres {' '.join(arguments)}"
    if not arguments or arguments[0] in ("--help", "-h", "--version", "COMMAND"):
        return
    command = cli.cli.commands.get(arguments[0])
    if command is None:
        raise PageError(f"{place}: {said}: there is no such command")
    try:
        command.make_context(f"edgeres {arguments[0]}", arguments[1:])
    except click.exceptions.Exit:  # --help
        return
    except (click.MissingParameter, click.BadOptionUsage) as problem:
        if complete or isinstance(problem, click.NoSuchOption):
            raise PageError(f"{place}: {said}: {problem.format_message()}") from None
    except click.ClickException as problem:
        raise PageError(f"{place}: {said}: {problem.format_message()}") from None


def check_requirements(words: list[str], place: str) -> None:
    """Check the requirements that a pip command names: that they are some, and that edgeres has the extras."""
    known = set(re.findall(r"^(\w+) = \[$", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    for word in words:
        if word.startswith("-") or word.endswith(".whl"):
            continue
        local = re.fullmatch(r"(?:\.|.*\.whl)(\[[\w,]+\])?", word)
        try:
            need = Requirement(f"edgeres{local[1] or ''}" if local else word)
        except InvalidRequirement as problem:
            raise PageError(f"{place}: pip install {word}: {problem}") from None
        if need.name == "edgeres" and need.extras - known:
            raise PageError(f"{place}: edgeres has no extra {', '.join(sorted(need.extras - known))}")
