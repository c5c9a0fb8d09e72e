"""Whoever watches long work."""

from __future__ import annotations

import json
import threading

import pytest

from edgeres import answers
from edgeres.progress import Progress, counted
from edgeres.terminal import TerminalProgress


@pytest.mark.parametrize(("number", "words"), [(0, "0 samples"), (1, "1 sample"), (1000, "1,000 samples")])
def test_one_thing_is_no_plural(number: int, words: str) -> None:
    assert counted(number, "sample") == words


def test_progress_is_silent_unless_overridden(capfd: pytest.CaptureFixture) -> None:
    class Watcher(Progress):
        def __init__(self) -> None:
            self.warnings = [""]

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    for watcher in (Progress(), Watcher()):
        watcher.stage("export", "resnet18")
        watcher.advance(1, 2)
        watcher.reused("export", "resnet18")
        watcher.finished("export", 1.0, "done")
        watcher.warn("no weights")
    assert isinstance(watcher, Watcher)
    assert watcher.warnings == ["", "no weights"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("unrest", "threads"), [(False, 0), (True, 1)])
def test_a_bar_without_unrest_has_no_thread(unrest: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing but the caller's own work runs while it is timed."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    progress, before = TerminalProgress(unrest), set(threading.enumerate())
    progress.stage("bench", "digits")
    try:
        started = set(threading.enumerate()) - before
        assert len(started) == threads
        progress.advance(1, 2)
    finally:
        progress.stop()
    for thread in started:
        thread.join(30)  # it is told to end, and does so a moment later
        assert not thread.is_alive()


def test_json_has_no_numbers_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    answers.print_json({"scale": [float("nan"), float("inf"), 0.5], "name": "ü"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"scale": [None, None, 0.5], "name": "ü"}
