"""Whoever watches long work."""

from __future__ import annotations

import pytest

from edgeres.progress import Progress


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
