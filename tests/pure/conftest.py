"""An engine without a library behind it, whose answers can be told by counting pixels."""

from __future__ import annotations

import threading
from typing import Any, Callable, List, Optional

import numpy as np
import pytest

from edgeres.artifacts import Engine, FileRef, Manifest, Preprocessing
from edgeres.errors import BackendError
from edgeres.runtime.engine import LoadedEngine


class Summing:
    """Answers each image with the sums of its three channels, float32 (N, 3); exact up to 16 million."""

    def __init__(self, contexts: int = 1, largest: Optional[int] = None) -> None:
        self.contexts = contexts
        self.largest = largest
        self.batches: List[np.ndarray] = []
        self.at_work = self.most_at_work = 0
        self.closed = False
        self.meanwhile: Callable[[np.ndarray], None] = lambda batch: None
        """Is called with each batch while it is being computed."""
        self._lock = threading.Lock()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        if self.closed:
            raise BackendError("this engine is closed. Load the bundle again.")
        with self._lock:
            self.batches.append(batch)
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            self.meanwhile(batch)
            logits: np.ndarray = np.rint(batch).sum((2, 3), dtype=np.float32)  # 255 steps of 1/255 may miss a pixel
            return logits
        finally:
            with self._lock:
                self.at_work -= 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def summing() -> Callable[..., Any]:
    """Return ``summing(**options)``: an engine, and the runner in it, for 4 × 4 pixels that stay as they are."""

    def make(resize: Optional[int] = None, **options: Any) -> Any:
        raw = Preprocessing((4, 4), resize, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
        manifest = Manifest("sums", "fp32", {}, raw, (), {}, {})
        runner = Summing(**options)
        return LoadedEngine(runner, manifest, Engine("cpu", "cpu", "fp32", FileRef("x", "0", 0), {}, {})), runner

    return make
