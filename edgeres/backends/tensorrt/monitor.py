"""A build's progress, and the way to stop it, where TensorRT has a progress monitor (from 10.0)."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional

Report = Callable[[str, int, int], None]
"""Called with the name of a phase, its steps done, and all its steps."""


class Watch:
    """What the monitor's calls lead to.

    TensorRT swallows exceptions of a monitor, so what a callback raised is kept in ``failure``: the build stops, and
    its caller raises it.
    """

    def __init__(self, report: Report, cancelled: Callable[[], bool]) -> None:
        self._report = report
        self._cancelled = cancelled
        self._steps: Dict[str, int] = {}
        self.stopped = False
        self.failure: Optional[BaseException] = None

    def start(self, phase: str, steps: int) -> None:
        """A phase begins; phases nest, and only their names tell them apart."""
        self._steps[phase] = steps
        self._guarded(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """A step is done; return whether to go on."""
        self._guarded(phase, step + 1)
        return not self.stopped

    def finish(self, phase: str) -> None:
        """A phase is over, early perhaps."""
        self._guarded(phase, self._steps.get(phase, 0))

    def raise_failure(self) -> None:
        """Raise what a callback raised, once; nothing keeps the exception, and so its frames, alive afterwards."""
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure

    def _guarded(self, phase: str, done: int) -> None:
        if self.stopped:
            return
        try:
            total = self._steps.get(phase, done)
            self._report(phase, min(done, total), total)
            self.stopped = self._cancelled()
        except BaseException as problem:  # KeyboardInterrupt too: it must reach the caller, not TensorRT
            self.failure, self.stopped = problem, True


def make_monitor(trt: Any, watch: Watch) -> Optional[Any]:
    """Return a monitor of the loaded package that tells ``watch``, or None where the version has none."""
    base = getattr(trt, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[valid-type, misc]  # the package is chosen at run time
        """TensorRT calls these from the thread that builds."""

        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    return Monitor()
