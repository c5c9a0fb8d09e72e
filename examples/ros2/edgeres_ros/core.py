"""The node without ROS: the newest image in, its classes out, and how that goes.

Images come by :meth:`Classifier.offer`, from any thread and as fast as they like. One waits at most: a newer one takes
its place, so an engine that is slower than the camera is never behind by more than the image that it works on. A thread
of its own answers; whatever fails there is told by :meth:`Classifier.health`, and the next image is taken.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

import edgeres
from edgeres.errors import EdgeresError, SampleError, first_line, numbered
from edgeres.runtime import LoadedEngine
from edgeres_ros.image import frame_of

OK, WARN, ERROR = range(3)  # as in diagnostic_msgs/DiagnosticStatus
WINDOW = 512  # answers whose latencies are remembered
NOT_ASKED = "not asked"  # of a signature: then whoever could write the bundle runs code here
PATIENCE = 5.0  # seconds that closing waits for the image that is being answered


class SettingsError(EdgeresError):
    """Parameters that the node cannot work with."""


class Settings(NamedTuple):
    """What the node is told.

    ``backend`` is one that ``edgeres.load`` takes, or a target. ``threads`` 0 leaves them to the backend. ``top_k`` 0
    means all classes, and those less probable than ``threshold`` are left out. ``labels`` is a text file with the name
    of one class per line; where it is empty, classes are called by their numbers. ``trusted_keys`` are files of public
    keys, with a colon between them; where it is empty, nobody has to have signed the bundle.
    """

    bundle: str
    backend: str = "auto"
    threads: int = 0
    top_k: int = 5
    threshold: float = 0.0
    labels: str = ""
    diagnostics_period: float = 1.0
    trusted_keys: str = ""


class Answer(NamedTuple):
    """The classes of one image, the most probable first, under the header that the image came with."""

    header: Any
    classes: List[Tuple[str, float]]


class Health(NamedTuple):
    """How the node does: ``level`` is OK, WARN or ERROR, ``values`` are for people to read."""

    level: int
    message: str
    values: Dict[str, str]


class _Counts:
    """What happened to images."""

    def __init__(self) -> None:
        self.received = self.answered = self.dropped = self.refused = self.failed = 0
        self.problem = ""
        """The last sentence about an image that was refused or failed."""


def open_classifier(settings: Settings, deliver: Callable[[Answer], None]) -> Classifier:
    """Return a classifier that works, with its engine loaded and run once.

    Raises:
        SettingsError: with every parameter that makes no sense.
        EdgeresError: there is no such bundle, or its engine cannot be opened.
    """
    wrong = _mistakes(settings)
    names: List[str] = []
    if settings.labels:
        try:
            names = Path(settings.labels).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            wrong.append(f"labels cannot be read: {problem}")
    if wrong:
        raise SettingsError(numbered("parameters", wrong))
    keys = settings.trusted_keys.split(os.pathsep) if settings.trusted_keys else None
    engine = edgeres.load(
        settings.bundle, backend=settings.backend, threads=settings.threads or None, trusted_keys=keys
    )
    try:
        black = np.zeros((1, *engine.input_shape[1:], 3), np.uint8)
        classes = engine(black).shape[1]
        if names and len(names) != classes:
            raise SettingsError(f"{settings.labels} names {len(names)} classes, and the bundle knows {classes}")
        return Classifier(engine, names or [str(number) for number in range(classes)], settings, deliver)
    except BaseException:
        engine.close()
        raise


def _mistakes(settings: Settings) -> List[str]:
    wrong = []
    if not settings.bundle:
        wrong.append("bundle is empty. Name the folder that `edgeres build` made: --ros-args -p bundle:=FOLDER")
    if settings.threads < 0:
        wrong.append(f"threads is {settings.threads}: give 1 or more, or 0 for the backend's own choice")
    if settings.top_k < 0:
        wrong.append(f"top_k is {settings.top_k}: give 1 or more, or 0 for all classes")
    if not 0 <= settings.threshold <= 1:
        wrong.append(f"threshold is {settings.threshold}: a probability is between 0 and 1")
    if not settings.diagnostics_period > 0:
        wrong.append(f"diagnostics_period is {settings.diagnostics_period}: give seconds, more than 0")
    return wrong


class Classifier:
    """An engine with a place for one image in front of it; made by :func:`open_classifier`, which it is closed after.

    ``deliver`` is called with each answer, in the thread that answers.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        names: Sequence[str],
        settings: Settings,
        deliver: Callable[[Answer], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._names = names
        self._settings = settings
        self._deliver = deliver
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: Optional[Tuple[Any, float]] = None  # an image, and when it came
        self._stopped = False
        self._total, self._lately, self._since = _Counts(), _Counts(), clock()
        self._seconds: Deque[float] = deque(maxlen=WINDOW)
        # A daemon: an engine that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="edgeres-classifier", daemon=True)
        self._thread.start()

    def offer(self, message: Any) -> None:
        """Take an image message (the fields of sensor_msgs/Image), in place of the one that waits; never blocks."""
        with self._changed:
            self._count("received")
            if self._waiting is not None:
                self._count("dropped")
            self._waiting = message, self._clock()
            self._changed.notify_all()

    def close(self) -> None:
        """Finish the image that is being answered, forget the one that waits, and free the engine."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(PATIENCE)
        if not self._thread.is_alive():
            self.engine.close()

    def health(self) -> Health:
        """Return how it went since this was last asked."""
        with self._changed:
            now = self._clock()
            lately, seconds = self._lately, max(now - self._since, 1e-9)
            self._lately, self._since = _Counts(), now
            total, latencies = self._total, list(self._seconds)
            values = {name: str(getattr(total, name)) for name in ("received", "answered", "dropped")}
            values["refused or failed"] = str(total.refused + total.failed)
            values["last problem"] = total.problem
        p50, p99 = (f"{value:.1f}" for value in np.percentile(latencies, (50, 99))) if latencies else ("", "")
        report = self.engine.manifest.report
        verdict = report.verdict if report and report.judges(self.engine.record) else "none on this engine"
        values = {
            "frame rate (Hz)": f"{lately.received / seconds:.1f}",
            "answers (Hz)": f"{lately.answered / seconds:.1f}",
            "latency p50 (ms)": p50,
            "latency p99 (ms)": p99,
            **values,
            "bundle": self._settings.bundle,
            "network": self.engine.manifest.name,
            "precision": self.engine.record.precision,
            "backend": self.engine.record.backend,
            "target": self.engine.record.target,
            "signature": "by a trusted key" if self._settings.trusted_keys else NOT_ASKED,
            "verdict": verdict,
        }
        return Health(*_judged(lately, seconds, verdict), values)

    def _count(self, name: str, problem: str = "") -> None:
        for counts in (self._total, self._lately):
            setattr(counts, name, getattr(counts, name) + 1)
            counts.problem = problem or counts.problem

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting is not None)
                if self._stopped or self._waiting is None:
                    return
                (message, came), self._waiting = self._waiting, None
            try:
                self._deliver(Answer(message.header, self._classes(message)))
            except SampleError as problem:
                outcome = "refused", str(problem)
            except Exception as problem:  # an engine or a subscriber that fails once may work the next time
                outcome = "failed", f"{type(problem).__name__}: {first_line(problem)}"
            else:
                outcome = "answered", ""
            with self._changed:
                self._count(*outcome)
                if outcome[0] == "answered":
                    self._seconds.append(1000 * (self._clock() - came))
            del message  # or its pixels would live until the next one comes

    def _classes(self, message: Any) -> List[Tuple[str, float]]:
        logits = self.engine(frame_of(message)[np.newaxis])[0].astype(np.float64)
        powers = np.exp(logits - logits.max())
        probabilities = powers / powers.sum()
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the engine's logits are not finite")
        best = np.argsort(-probabilities, kind="stable")[: self._settings.top_k or None]
        found = [(self._names[number], float(probabilities[number])) for number in best]
        return [one for one in found if one[1] >= self._settings.threshold]


def _judged(lately: _Counts, seconds: float, verdict: str) -> Tuple[int, str]:
    """Return the level of a period, and a sentence for people."""
    went = f"{lately.received} images came in {seconds:.1f} s, {lately.answered} answered, {lately.dropped} left out"
    bad = lately.refused + lately.failed
    if bad:
        level = ERROR if lately.failed or not lately.answered else WARN
        return level, f"{went}, {bad} not answered: {lately.problem}"
    if not lately.received:
        return WARN, f"no image came in {seconds:.1f} s"
    if not lately.answered:
        return WARN, f"{went}: the engine has been at one image all the time"
    if verdict == "fail":
        return WARN, f"{went}; the bundle's verdict is fail: it loses more accuracy than its budget"
    return OK, went
