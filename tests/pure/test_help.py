"""What the command line teaches: help with examples that can be typed, a man page, and what a shell completes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from edgeres import completion
from edgeres.architectures import ARCHITECTURES
from edgeres.cli import cli
from edgeres.guide import LESSONS, SHELLS
from edgeres.recipe import METHODS, TARGETS

COMMANDS: Dict[str, click.Command] = cli.commands
GATES = ("build", "validate", "verify")
WIDE = 100  # columns


def help_of(*arguments: str, width: int = 200) -> str:
    told = CliRunner().invoke(cli, [*arguments, "--help"], env={"COLUMNS": str(width)}, prog_name="edgeres")
    assert told.exit_code == 0, told.output
    return str(told.output)


def typed(line: str) -> List[str]:
    """Return the words behind ``edgeres`` of a line for a shell, up to a pipe or a file that it is written to."""
    inner = re.search(r"\$\((.*)\)", line)
    words = shlex.split(inner.group(1) if inner else line)
    ends = [number for number, word in enumerate(words) if word in ("|", ">")]
    words = words[: ends[0]] if ends else words
    assert words[0] == "edgeres"
    return words[1:]


def test_every_command_has_its_lesson_and_no_lesson_is_of_none() -> None:
    assert set(LESSONS) == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_says_what_it_does_shows_how_and_what_comes_next(name: str) -> None:
    lesson, text = LESSONS[name], help_of(name)
    assert len(lesson.examples) >= 2
    for what, line in lesson.examples:
        assert f"  # {what}\n    {line}\n" in text  # as it stands, in a line of its own
    assert re.search(r"\n  Next: \S", text)
    assert ("Exit codes: 0" in text) == (name in GATES)
    assert COMMANDS[name].help


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", ["", *sorted(COMMANDS)])
def test_no_line_of_help_is_wider_than_100_columns(name: str, width: int) -> None:
    lines = help_of(*([name] if name else []), width=width).splitlines()
    assert max(map(len, lines)) <= WIDE


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_example_is_a_line_that_the_command_takes(name: str) -> None:
    for _, line in LESSONS[name].examples:
        command, *words = typed(line)
        assert command == name
        context = COMMANDS[name].make_context(name, list(words))
        assert not context.args


def test_an_example_that_a_command_does_not_take_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        COMMANDS["verify"].make_context("verify", ["build/digits-int8", "--keys", "lab.key.pub"])


def test_the_same_is_said_in_a_narrow_terminal() -> None:
    for name in COMMANDS:
        for _, line in LESSONS[name].examples:
            assert f"    {line}\n" in help_of(name, width=40)


def loaded(environment: Dict[str, str], *arguments: str) -> List[str]:
    """Return the packages that a run of the command line loads."""
    code = (
        "import sys\nfrom edgeres.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.stderr.write(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "numba", "PIL", "cryptography", "jinja2"}


def test_neither_help_nor_completion_nor_the_manual_loads_what_builds_or_runs_networks() -> None:
    assert HEAVY.isdisjoint(loaded({}, "build", "--help"))
    assert HEAVY.isdisjoint(loaded({}, "completion", "bash"))
    assert HEAVY.isdisjoint(loaded({}, "manual"))
    asked = {"_EDGERES_COMPLETE": "bash_complete", "COMP_WORDS": "edgeres build --model res", "COMP_CWORD": "3"}
    assert HEAVY.isdisjoint(loaded(asked))


# Completion


def completed(line: str) -> List[str]:
    """Return what is offered behind a line; what ends in a blank asks for the next word."""
    words = line.split(" ")
    found = ShellComplete(cli, {}, "edgeres", "_EDGERES_COMPLETE").get_completions(words[:-1], words[-1])
    return [f"<{one.type}>" if one.type != "plain" else one.value for one in found]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with bundles at several depths, and other files."""
    for folder in ("build/net-int8", "build/net-fp16", "other/deep/net", "other/deeper/than/all/net", ".hidden/net"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text("{}")
    (tmp_path / "build/net-int8/engines").mkdir()
    for name in ("mine.toml", "net.onnx", "net.edgeres", "lab.key.pub", "lab.key", "notes.txt", "w.pth"):
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_options_and_choices_are_completed() -> None:
    assert completed("ve") == ["verify"]
    assert completed("completion ") == list(SHELLS)
    assert completed("build --meth") == ["--method"]
    assert completed("build --method ") == list(METHODS)
    assert set(completed("")) == set(COMMANDS)


def test_models_and_targets_are_completed(place: Path) -> None:
    names = completed("build --model resnext")
    assert names == [*(name for name in ARCHITECTURES if name.startswith("resnext")), "<file>"]
    assert completed("build --model n") == ["<file>", "net.onnx"]
    assert completed("compile --target dla") == ["dla0", "dla1"]
    assert completed("validate --backend ") == list(TARGETS)


def test_bundles_are_folders_with_a_manifest(place: Path) -> None:
    assert completed("compile b") == ["<dir>", "build/net-fp16", "build/net-int8"]
    assert completed("validate build/net-i") == ["<dir>", "build/net-int8"]
    assert completed("verify other/") == ["<file>", "other/deep/net"]  # four folders down is not looked for
    assert completed("diff build/net-int8 build/") == ["<dir>", "build/net-fp16", "build/net-int8"]
    assert completed("sign .h") == ["<dir>", ".hidden/net"]
    assert completed("pack nothing/here") == ["<dir>"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("build m", ["<file>", "mine.toml"]),
        ("unpack n", ["<file>", "net.edgeres"]),
        ("inspect n", ["<file>", "net.edgeres", "net.onnx"]),
        ("verify build/net-int8 --key l", ["<file>", "lab.key.pub"]),
        ("build --weights w", ["<file>", "w.pth"]),
        ("build --calibration b", ["<file>"]),
    ],
)
def test_files_are_completed_by_their_ending(line: str, found: List[str], place: Path) -> None:
    assert completed(line) == found


def test_folders_of_many_files_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: List[str] = []
    scandir = os.scandir

    @contextlib.contextmanager
    def counted(path: str) -> Iterator[Iterator[Any]]:
        with scandir(path) as entries:
            yield (looked.append(entry.path) or entry for entry in entries)  # type: ignore[func-returns-value]

    for number in range(20):
        (tmp_path / f"a{number}").mkdir()
        for inner in range(20):
            (tmp_path / f"a{number}/{inner}.png").touch()
    (tmp_path / "a7/net").mkdir()
    (tmp_path / "a7/net/manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    assert completed("pack a") == ["<dir>", "a7/net"]
    monkeypatch.setattr(completion, "MOST", 100)
    monkeypatch.setattr(os, "scandir", counted)
    for question in ("isfile", "isdir"):
        asked = getattr(os.path, question)
        monkeypatch.setattr(os.path, question, lambda path, asked=asked: looked.append(path) or asked(path))
    assert "<dir>" in completed("pack a")
    assert len(looked) <= 2 * 100


def test_a_folder_that_may_not_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    assert completed("pack build/") == ["<dir>"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_are_for_our_command(shell: str) -> None:
    told = CliRunner().invoke(cli, ["completion", shell], standalone_mode=False)
    assert told.exception is None
    assert f"_EDGERES_COMPLETE={shell}_complete" in told.output
    assert "edgeres" in told.output


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_real_bash_completes(place: Path) -> None:
    (place / "bin").mkdir()
    (place / "bin/edgeres").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeres "$@"\n')
    (place / "bin/edgeres").chmod(0o755)
    script = """eval "$(edgeres completion bash)"
COMP_WORDS=(edgeres validate build/net-); COMP_CWORD=2
compopt() { :; }
_edgeres_completion edgeres
printf '%s\\n' "${COMPREPLY[@]}"
"""
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path}
    )
    assert done.stdout.split() == ["build/net-fp16", "build/net-int8"], done.stderr


# The man page


@pytest.fixture(scope="module")
def page() -> str:
    told = CliRunner().invoke(cli, ["manual"], standalone_mode=False, prog_name="edgeres")
    assert told.exception is None
    return str(told.output)


def test_the_manual_has_every_command_option_and_example(page: str) -> None:
    set_as = page.replace("\\-", "-").replace("\\(aq", "'").replace("\\(ga", "`")
    for name, command in COMMANDS.items():
        assert f".SS edgeres {name} " in set_as
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(one in set_as for one in option.opts)
        for _, line in LESSONS[name].examples:
            assert f"\n  {line.replace(chr(92), chr(92) + 'e')}\n" in set_as
    assert page.isascii()
    for code in (0, 1, 2, 3, 70, 130, 143):
        assert f"\\fB{code}\\fR" in page


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff")
def test_groff_has_nothing_against_it(page: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-c"], input=page, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    plain = re.sub(r".\x08", "", done.stdout)
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "EXIT STATUS", "ENVIRONMENT", "SEE ALSO"):
        assert f"\n{heading}\n" in plain
    assert "  edgeres pack build/digits-int8\n" in plain
    assert "edgeres - a PyTorch ResNet" in plain
