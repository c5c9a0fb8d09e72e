"""What TensorRT says while it works, kept in bounds: the table of layers, its complaints, and its last words."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Deque, Dict, Iterable, List, MutableSet, Tuple
from weakref import WeakSet

from edgeres.backends.tensorrt.module import member

COMPLAINTS = 200
WORDS = 3
LONGEST = 2000
NOTICED = 50
TABLE = "Layers:"

ERRORS = ("INTERNAL_ERROR", "ERROR")

# TensorRT's objects log when they are freed, and the garbage collector may free one of them while this is held.
_LOCK = threading.RLock()
_LOGGERS: Dict[Any, Tuple[Any, MutableSet[Record]]] = {}


class Record:
    """What was said, by severity. Nothing in here raises, and its size does not grow with the build's length.

    ``tables`` are the messages that describe the layers of an engine, whole; of errors and of warnings the newest are
    kept, each kind for itself, so that a flood of warnings hides no error.

    Args:
        signs: words to listen for, of whatever severity: see :meth:`noticed`.
    """

    def __init__(self, signs: Iterable[str] = ()) -> None:
        self.tables: List[str] = []
        self.count = 0
        self._errors: Deque[Tuple[int, str]] = deque(maxlen=COMPLAINTS)
        self._warnings: Deque[Tuple[int, str]] = deque(maxlen=COMPLAINTS)
        self._noticed: Dict[str, Dict[str, None]] = {sign: {} for sign in signs}

    def add(self, severity: str, text: str) -> None:
        """Keep one message."""
        if severity == "VERBOSE" and text.lstrip().startswith(TABLE):
            self.tables.append(text)
        short = text[:LONGEST]
        for sign, found in self._noticed.items():
            if sign in short and len(found) < NOTICED:
                found[short] = None
        if severity in ERRORS or severity == "WARNING":
            self.count += 1
            (self._errors if severity in ERRORS else self._warnings).append((self.count, short))

    def noticed(self, *signs: str) -> List[str]:
        """Return the messages that held one of these signs, however many others came before or after; each once."""
        return list(dict.fromkeys(text for sign in signs for text in self._noticed[sign]))

    def take(self, start: int) -> List[str]:
        """Return the complaints after the first ``start``, and forget them: they have been dealt with."""
        taken = sorted(said for said in (*self._errors, *self._warnings) if said[0] > start)
        for kind in (self._errors, self._warnings):
            while kind and kind[-1][0] > start:
                kind.pop()
        return [text for _, text in taken]

    @property
    def errors(self) -> List[str]:
        """The errors, oldest first, each once."""
        return list(dict.fromkeys(text for _, text in self._errors))

    @property
    def warnings(self) -> List[str]:
        """The warnings, oldest first, each once."""
        return list(dict.fromkeys(text for _, text in self._warnings))

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
