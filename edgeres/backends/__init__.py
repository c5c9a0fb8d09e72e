"""One room per engine; each has ``compile_engine`` (a model becomes an Engine) and ``open_engine`` (then a Runner)."""

from __future__ import annotations

from typing import Callable

import numpy as np

Runner = Callable[[np.ndarray], np.ndarray]
"""A callable engine: float32 ``(N, 3, h, w)``, normalized → float32 logits ``(N, K)``, from any number of threads."""
