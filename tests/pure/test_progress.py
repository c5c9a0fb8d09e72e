"""Whoever watches long work."""

from __future__ import annotations

import pytest

from edgeres.progress import Progress, counted


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
