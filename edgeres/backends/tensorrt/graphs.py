"""CUDA graphs: what an execution context puts on its stream, recorded once and launched from then on.

TensorRT's rules: a batch size must have run once before it is recorded, for what is deferred when a shape changes. A
graph holds the shapes and addresses of then, and once the context it came from is changed it must not be launched any
more. So a lane has one graph at a time, of the batch size that comes again and again.

Source: NVIDIA, TensorRT Documentation, Performance, CUDA Graphs; CUDA Driver API, cuStreamBeginCapture.
"""

from __future__ import annotations

from typing import Callable, Optional

from edgeres.backends.tensorrt.device.interface import Device, Graph
from edgeres.errors import BackendError

STEADY = 5  # runs of one batch size before it is recorded, which takes as long as some of them


class Recording:
    """Whether a session's lanes record, and in words what came of it: ``off``, ``not yet``, ``on``, or why not."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.state = "not yet" if wanted else "off"

    def refuse(self, why: str) -> None:
        """Give it up for good: what cannot be recorded once cannot be recorded later."""
        self.wanted = False
        self.state = why


class Launcher:
    """Runs a lane's context: by its own call, or by launching what that call did before. One thread at a time."""

    def __init__(self, device: Device, stream: int, recording: Recording) -> None:
        self._device = device
        self._stream = stream
        self._recording = recording
        self._graph: Optional[Graph] = None
        self._runs = 0

    def run(self, enqueue: Callable[[], None]) -> None:
        """Put the context's work on the stream, which ``enqueue`` does where there is no graph of it.

        Raises:
            BackendError: TensorRT or CUDA refuses.
        """
        if self._graph is not None and not self._recording.wanted:
            self.forget()
        if self._graph is None and self._recording.wanted and self._runs >= STEADY:
            self._record(enqueue)
        if self._graph is None or not self._launched(self._graph):
            enqueue()
            self._runs += 1

    def forget(self) -> None:
        """The context changes, or ends: what was recorded of it is worth nothing any more."""
        graph, self._graph, self._runs = self._graph, None, 0
        if graph is not None:
            graph.destroy()

    def _launched(self, graph: Graph) -> bool:
        """Whether a graph was launched; where CUDA refuses, as for want of memory, calls do without from then on."""
        try:
            graph.launch()
        except BackendError as problem:
            self._recording.refuse(str(problem))
            self.forget()
            return False
        return True

    def _record(self, enqueue: Callable[[], None]) -> None:
        try:
            self._graph = self._device.capture(self._stream, enqueue)
            self._recording.state = "on"
        except BackendError as problem:  # calls run as without, and fail by themselves where the GPU is lost
            self._recording.refuse(str(problem))
