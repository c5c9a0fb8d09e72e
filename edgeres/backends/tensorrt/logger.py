"""What TensorRT says while it works, kept in bounds: the table of layers, its complaints, and its last words."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Deque, Dict, List, MutableSet, Tuple
from weakref import WeakSet

from edgeres.backends.tensorrt.module import member

COMPLAINTS = 200
LAST = 40
WORDS = 3
LONGEST = 2000
TABLES = ("Layers:", "Engine Layer Information")

ERRORS = ("INTERNAL_ERROR", "ERROR")

_LOCK = threading.Lock()
_LOGGERS: Dict[Any, Tuple[Any, MutableSet[Record]]] = {}


class Record:
    """What was said, by severity. Nothing in here raises, and its size does not grow with the build's length.

    ``tables`` are the messages that describe the layers of an engine, whole; ``complaints`` the first errors and
    warnings, as (severity, text); ``last`` the newest messages of any kind.
    """

    def __init__(self) -> None:
        self.tables: List[str] = []
        self.complaints: List[Tuple[str, str]] = []
        self.last: Deque[Tuple[str, str]] = deque(maxlen=LAST)

    def add(self, severity: str, text: str) -> None:
        """Keep one message."""
        if severity == "VERBOSE" and text.lstrip().startswith(TABLES):
            self.tables.append(text)
        short = text[:LONGEST]
        if severity in (*ERRORS, "WARNING") and len(self.complaints) < COMPLAINTS:
            self.complaints.append((severity, short))
        self.last.append((severity, short))

    def take(self, start: int) -> List[str]:
        """Return the complaints from number ``start`` on, and forget them: they have been dealt with."""
        taken = [text for _, text in self.complaints[start:]]
        del self.complaints[start:]
        return taken

    @property
    def errors(self) -> List[str]:
        """The errors, oldest first, each once."""
        return list(dict.fromkeys(text for severity, text in self.complaints if severity in ERRORS))

    @property
    def warnings(self) -> List[str]:
        """The warnings, oldest first, each once."""
        return list(dict.fromkeys(text for severity, text in self.complaints if severity == "WARNING"))

    def last_words(self) -> str:
        """Return what TensorRT said to why it failed: its last errors, else its last warnings, as one line."""
        said = self.errors[-WORDS:] or self.warnings[-WORDS:]
        return " | ".join(" ".join(text.split()) for text in said) or "it gave no reason"


def make_logger(trt: Any, record: Record) -> Any:
    """Return the logger of the loaded package, which from now on writes into ``record`` too, as long as that lives.

    TensorRT has one logger per process: a second one is ignored while anything made with the first is alive. So there
    is one here as well, and every living record hears everything.
    """
    with _LOCK:
        if trt not in _LOGGERS:
            _LOGGERS[trt] = _new_logger(trt)
        logger, records = _LOGGERS[trt]
        records.add(record)
    return logger


def _new_logger(trt: Any) -> Tuple[Any, MutableSet[Record]]:
    names = {member(trt.ILogger, name): name for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")}
    records: MutableSet[Record] = WeakSet()

    class Logger(trt.ILogger):  # type: ignore[misc]  # the package is chosen at run time
        """TensorRT calls ``log`` from its own threads and swallows what is raised there."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            with _LOCK:
                listening = list(records)
            for record in listening:
                record.add(names.get(severity, "INFO"), str(message))

    return Logger(), records
