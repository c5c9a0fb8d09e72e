"""The answer of a command, on stdout: JSON for programs, and an exit code that does not depend on who reads it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any, Iterator

import click
import msgspec

from edgeres.streams import on_github


def print_json(data: Any) -> None:
    """Print plain data as indented JSON."""
    finite = msgspec.json.decode(msgspec.json.encode(data))  # JSON has no NaN and no infinity: they are null
    text = json.dumps(finite, indent=2, ensure_ascii=False)
    # Names of strangers may hold what moves a terminal's cursor or its direction of writing: the same JSON, in letters.
    text = "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)
    click.echo(text.replace("##[", r"#\u0023[") if on_github() else text)  # the same JSON, and no command: see streams


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Let a command that has done its work keep its exit code when nobody reads its answer: a gate piped into `head`
    must not change its verdict. A full disk behind stdout is told, and nothing more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        click.echo(f"warning: the answer could not be written: {problem.strerror or problem}", err=True)
