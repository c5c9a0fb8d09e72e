"""What is kept of what TensorRT says, and that saying it stops nobody."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edgeres.backends.tensorrt import logger
from edgeres.backends.tensorrt.logger import Record, make_logger


class ILogger:
    """The base class of TensorRT's bindings, as far as a logger needs it."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Package:
    """Stands for the package."""

    ILogger = ILogger


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Record]:
    monkeypatch.setattr(logger, "_LOGGERS", {})
    record = Record(("falling back",))
    return make_logger(Package(), record), record


def test_the_newest_are_kept_of_each_kind(said: tuple[Any, Record]) -> None:
    log, record = said
    for number in range(1000):
        log.log(ILogger.ERROR, f"error {number}")
        log.log(ILogger.WARNING, f"warning {number}")
        log.log(ILogger.VERBOSE, "nothing")
    assert record.last_words() == "error 997 | error 998 | error 999"
    assert record.warnings[-1] == "warning 999"
    assert max(len(record.errors), len(record.warnings)) <= 200


def test_what_is_listened_for_is_never_lost(said: tuple[Any, Record]) -> None:
    log, record = said
    log.log(ILogger.WARNING, "conv1 is not supported on DLA, falling back to GPU")
    for number in range(1000):
        log.log(ILogger.WARNING, f"warning {number}")
    log.log(ILogger.INFO, "fc: falling back to GPU")
    assert record.noticed("falling back") == [
        "conv1 is not supported on DLA, falling back to GPU",
        "fc: falling back to GPU",
    ]
    for number in range(1000):
        log.log(ILogger.WARNING, f"{number} falling back")
    assert len(record.noticed("falling back")) <= 50


def test_complaints_that_were_dealt_with_are_forgotten(said: tuple[Any, Record]) -> None:
    log, record = said
    log.log(ILogger.WARNING, "before")
    start = record.count
    log.log(ILogger.ERROR, "one")
    log.log(ILogger.WARNING, "two")
    assert record.take(start) == ["one", "two"]
    assert (record.errors, record.warnings) == ([], ["before"])


def test_an_object_that_is_freed_while_a_message_is_passed_on_may_speak(said: tuple[Any, Record]) -> None:
    """The garbage collector may free an object of TensorRT anywhere, and that says so in its destructor."""
    log, record = said

    class Freed:
        def __del__(self) -> None:
            log.log(ILogger.INFO, "freed")
            log.log(ILogger.ERROR, "freed in disorder")

    def free_one() -> None:
        held = [Freed()]
        with logger._LOCK:
            held.clear()

    thread = threading.Thread(target=free_one, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert record.errors == ["freed in disorder"]
