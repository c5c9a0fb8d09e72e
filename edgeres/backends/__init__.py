"""One room per engine; each has ``compile_engine`` (a model becomes an Engine) and ``open_engine`` (then a Runner)."""

from __future__ import annotations

from typing import Callable

import numpy as np

Runner = Callable[[np.ndarray], np.ndarray]
"""A callable engine: float32 ``(N, 3, h, w)``, normalized, or uint8 pixels where the engine takes these
(``Engine.input``) → float32 logits ``(N, K)``, from any number of threads."""
