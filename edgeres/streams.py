"""What is written to stdout and stderr: nothing in it gives orders to the machine that reads a log."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import TextIO

# GitHub's runner obeys `::command` at the start of a line of either stream, after white space, and the older form
# `##[command]` anywhere in one. Source: "Workflow commands for GitHub Actions", and the runner's ActionCommand.cs.
NEW_FORM = re.compile(r"((?:^|[\r\n])(?:\s|\x1b\[[0-9;?]*[A-Za-z])*)::")


def on_github() -> bool:
    """Tell whether GitHub Actions is what runs this."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def unheard(text: str) -> str:
    """Return text in which GitHub's runner finds no command: a backslash breaks each, for everybody to see."""
    return NEW_FORM.sub(r"\1\\::", text).replace("##[", r"##\[")


class Unheard(io.TextIOWrapper):
    """A stream that GitHub's runner reads: what is written to it is text, and a command only by :meth:`command`."""

    def write(self, text: str) -> int:
        super().write(unheard(text))
        return len(text)

    def command(self, line: str) -> None:
        """Write a command for the runner."""
        super().write(f"{line}\n")


def guard() -> None:
    """Let a process write to its streams what a terminal cannot show as escapes; on GitHub, no commands either."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if on_github():
            lines = stream.line_buffering
            stream.flush()
            setattr(sys, name, Unheard(stream.buffer, "utf-8", "backslashreplace", line_buffering=lines))
        else:
            stream.reconfigure(errors="backslashreplace")


def order(stream: TextIO, line: str) -> None:
    """Write a command for GitHub's runner to a stream, guarded or not."""
    if isinstance(stream, Unheard):
        stream.command(line)
    else:
        stream.write(f"{line}\n")
