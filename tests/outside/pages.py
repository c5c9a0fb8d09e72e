"""The blocks of code in Markdown pages: found, run as a reader would, and what they print held against the page.

What a fenced block is, its info string says:

- ``sh``: is run by ``bash -euo pipefail``; ``python``: by Python. A page's blocks are run in order, in one folder.
- any language with ``title="FILE.EXT"``: is that file, and is written into the folder; one of ``examples/`` has to be
  what the repository has.
- ``sh title="on the Jetson"``, or another title of ``ELSEWHERE``: cannot run here. Its ``edgeres`` commands are parsed.
- ``text`` right behind a block that is run: what that prints, stdout and stderr. ``...`` stands for anything; times and
  hashes for any of their kind, boxes of tables for any width, numbers with a decimal point for whatever is near. All
  other words and numbers have to be the same. ``text title="on one machine"`` lets all numbers and layers be others.
- any other block is only shown.

Of a block that is run, lines of ``SETUP`` are left out, for they need a network; the requirements that they name are
checked. Code in the text that begins with ``edgeres`` is parsed, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from typed_commands import REPOSITORY, PageError, check_command, check_commands

from edgeres.recipe import dossier

WARM = Path(__file__).with_name("warm.py")
LOOSE = "on one machine"
ELSEWHERE = {
    "on the Jetson": "a board",
    "on a PC with a GPU": "a GPU",
    "on the robot": "a camera, or ROS",
    "on several machines": "other machines",
    "where TensorRT is": "trtexec, or TensorRT's headers",
    "with your own files": "files that only the reader has",
    "with push rights": "the right to publish",
}
"""The titles of blocks that cannot run here, and what is missing."""

BARE = {"tutorial.md"}
"""The pages that take nothing for granted, and make their own images."""

SETUP = re.compile(r"\s*(python3? -m venv|pip install|sudo apt|scripts/test\b|[A-Z]+=\S+ pip install|\. \.venv/)")
SECONDS = 600
NEAR = 0.15  # of a number with a decimal point
LEAST = 0.05  # what it may be off by however small it is

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")
TITLE = re.compile(r'title="([^"]*)"')
FILE = re.compile(r"[\w./-]+\.\w+")
BOXES = re.compile(r"[─━│┃┏┓┗┛┡┩┳┻╇┴┬├┤┼└┘┌┐]+")
TIMES = re.compile(r"\b[\d,]+(\.\d+)? ?(s|ms|µs)(?![\w%])|\breused\b")
HASHES = re.compile(r"\b[0-9a-f]{12,}\b")
LAYERS = re.compile(r"\b(layer\d+(\.\w+)*|conv1|fc|avgpool)\b( (Conv|Gemm)\b)?")
NUMBERS = re.compile(r"[+-]?\d[\d,.]*\d|[+-]?\d")
DECIMAL = re.compile(r"\d[\d,]*\.\d+")
CODE = re.compile(r"(?<!`)`(edgeres [^`\n]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block of a page, and what the page shows as its output."""

    line: int
    language: str
    title: str
    code: str
    shown: str | None = None
    exact: bool = True  # whether what is shown also has the right numbers
    output: tuple[int, int] = (0, 0)  # the lines of what is shown, from 0, without the fences

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.title

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, if it is one."""
        return self.title if FILE.fullmatch(self.title) else None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, each with the output that is shown right behind it."""
    found: list[Block] = []
    lines = text.split("\n")
    number, end = 0, -1
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            number += 1
            continue
        start, closing = number, re.compile(rf"^ *{opening['fence']}`* *$")
        number += 1
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        code = textwrap.dedent("\n".join(lines[start + 1 : number])) + "\n"
        language, title = opening["info"].strip().partition(" ")[0], TITLE.search(opening["info"])
        block = Block(start + 1, language, title[1] if title else "", code)
        behind = bool(found) and not "".join(lines[end + 1 : start]).strip()
        shows = language == "text" and block.title in ("", LOOSE) and behind and bool(found) and found[-1].runs
        if shows and found[-1].shown is None:
            found[-1] = found[-1]._replace(shown=code, exact=not block.title, output=(start + 1, number))
        else:
            found.append(block)
        end = number
        number += 1
    return found


def run_page(page: Path, folder: Path, environment: dict[str, str]) -> list[tuple[Block, str]]:
    """Run the blocks of a page in a folder, check those that cannot run here, and return what was run and printed.

    Raises:
        PageError: a block fails, or names what is not there.
    """
    ran: list[tuple[Block, str]] = []
    text = page.read_text(encoding="utf-8")
    for block in blocks(text):
        place = f"{page.name}:{block.line}"
        if block.file is not None:
            write_file(block, folder, place)
        elif block.runs:
            ran.append((block, run_block(block, folder, environment, place)))
        elif block.language in ("sh", "python") and block.title not in ELSEWHERE:
            raise PageError(f"{place}: {block.title!r} is neither a file nor one of {', '.join(ELSEWHERE)}")
        elif block.language == "sh":
            check_commands(block.code, place)
    check_prose(text, page.name)
    return ran


def write_file(block: Block, folder: Path, place: str) -> None:
    """Write a block that is a file, or compare it with the repository's."""
    assert block.file is not None
    ours, path = REPOSITORY / block.file, folder / block.file
    if block.file.startswith("examples/"):
        if not ours.is_file() or ours.read_text(encoding="utf-8") != block.code:
            raise PageError(f"{place}: {block.file} of the repository is another")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.code, encoding="utf-8")


def run_block(block: Block, folder: Path, environment: dict[str, str], place: str) -> str:
    """Run one block, and return what it prints."""
    code = block.code
    if block.language == "sh":
        check_commands(code, place)
        code = "\n".join(line for line in code.split("\n") if not SETUP.match(line))
        command = ["bash", "-euo", "pipefail", "-c", code]
    else:
        command = [sys.executable, "-c", code]
    try:
        ended = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PageError(f"{place}: has not ended after {SECONDS} s\n{block.code}") from None
    if ended.returncode != 0 or "Traceback" in ended.stdout:
        raise PageError(f"{place}: exit code {ended.returncode}\n{block.code}\nprinted:\n{ended.stdout}")
    return ended.stdout


def untrue(ran: list[tuple[Block, str]]) -> list[str]:
    """Return what of the shown outputs is not what was printed."""
    found = []
    for block, printed in ran:
        why = "" if block.shown is None else difference(block.shown, printed, block.exact)
        if why:
            found.append(f"line {block.line}: {why}\n{block.code}\nshown:\n{block.shown}\nprinted:\n{printed}")
    return found


def prepare(folder: Path, bundle: Path | None) -> None:
    """Put into a folder what the pages take for granted, with the embedded digits in place of a reader's own data.

    These are ``net.safetensors``, ``images/`` to calibrate on, ``labelled/`` to judge on, the repository's
    ``examples/``, and the bundle of ``edgeres build --precision int8``, so that no page waits for it; None: nothing.
    """
    if bundle is not None:
        (folder / "examples").symlink_to(REPOSITORY / "examples")
        shutil.copy(dossier() / "digits/weights.safetensors", folder / "net.safetensors")
        shutil.copytree(dossier() / "digits/calibration", folder / "images")
        shutil.copytree(dossier() / "digits/validation", folder / "labelled")
        shutil.copytree(bundle, folder / "build/digits-int8")


@contextlib.contextmanager
def warm_command() -> Iterator[str]:
    """Keep a server of the command ``edgeres`` (:mod:`warm`), and yield its socket."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        server = subprocess.Popen(
            [sys.executable, WARM, "serve", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": import_path(), "ORT_DISABLE_TELEMETRY": "1"},
        )
        with server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield path
            server.communicate()


def import_path() -> str:
    """Return PYTHONPATH with this checkout in front."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def environment_of(tools: Path, server: str) -> dict[str, str]:
    """Return the environment of a reader with edgeres installed: this Python and this checkout, tables 100 wide.

    ``tools`` is a folder to be made, for the commands; ``server`` is the socket of :func:`warm_command`.
    """
    python = shlex.quote(sys.executable)
    tools.mkdir()
    for name, command in {
        "edgeres": f"{python} -I -S {shlex.quote(str(WARM))} {shlex.quote(server)}",
        "pytest": f"{python} -m pytest",
        "python": python,
        "python3": python,
    }.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tools / name).chmod(0o755)
    others = ("CI", "GITHUB_", "PYTEST_", "EDGERES_")  # what would change the answers
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {
        **kept,
        "PATH": os.pathsep.join([str(tools), kept.get("PATH", os.defpath)]),
        "PYTHONPATH": import_path(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "100",
    }


def difference(shown: str, printed: str, exact: bool = True) -> str:
    """Return in what an output differs from what a page shows; an empty text where it does not."""
    wanted, found = plain(shown), plain(printed)
    if not exact:
        texts = (LAYERS.sub("<layer>", text) for text in (wanted, found))
        wanted, found = (re.sub(r"[+-]?\d[\d,.]*\d|[+-]?\d", "0", text) for text in texts)
    pattern = "".join(
        r"(?:.*?)" if part == "..." else r"(\d[\d,]*\.\d+)" if DECIMAL.fullmatch(part) else re.escape(part)
        for part in re.split(r"(\.\.\.|\d[\d,]*\.\d+)", wanted)
    )
    # A space beside "..." may be one of what it stands for.
    pattern = pattern.replace(r"\ (?:.*?)\ ", r"(?:\ .*?)?\ ").replace(r"(?:.*?)\ ", r"(?:.*?)\ ?")
    match = re.fullmatch(pattern, found, re.DOTALL)
    if match is None:
        return f"prints something else\nwanted: {wanted}\nfound:  {found}\n"
    pairs = zip(DECIMAL.findall(wanted), match.groups(), strict=True)
    far = [f"{there}, not {here}" for here, there in pairs if not near(number(here), number(there))]
    return f"prints other numbers: {'; '.join(far)}\n" if far else ""


def plain(text: str) -> str:
    """Return an output without what differs from one machine and one terminal to another."""
    text = BOXES.sub(" ", text)
    text = HASHES.sub("<hash>", TIMES.sub("<time>", text))
    return " ".join(text.split())


def number(text: str) -> float:
    return float(text.replace(",", ""))


def near(wanted: float, found: float) -> bool:
    """Tell whether two numbers are about the same."""
    return abs(wanted - found) <= max(LEAST, NEAR * abs(wanted)) + 1e-9


def check_prose(text: str, place: str) -> None:
    """Parse the edgeres commands that stand in a page's text and tables."""
    fenced = {line for block in blocks(text) for line in range(block.line, block.line + block.code.count("\n") + 2)}
    for line, content in enumerate(text.split("\n"), start=1):
        if line not in fenced:
            for said in CODE.findall(content):
                typed = re.sub(r"[\[\]]|…", "", said).partition(" | ")[0]
                check_command(shlex.split(typed)[1:], f"{place}:{line}", complete=False)
