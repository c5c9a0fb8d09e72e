"""The ``auto`` range method: the step whose noise harms the answer least.

A per-tensor range is a compromise between channels, and channels do not matter alike. Each channel's expected error is
weighted with what it will cause: the sensitivity of the logits to noise there, where it is known, else 1.
"""

from __future__ import annotations

import numpy as np

from edgeres.noise import NoiseTable

COARSE = np.arange(-8.0, 1.001, 0.125)  # octaves around the step that reaches the largest channel
FINE = np.linspace(-0.125, 0.125, 33)


def best_step(table: NoiseTable, factors: np.ndarray, weights: np.ndarray) -> float:
    """Return the step with the least weighted noise, in the units of the scaled tensor; 1.0 for one that is all zeros.

    Args:
        factors: float64 ``(C,)``, what each channel is multiplied with before it is quantized.
        weights: float64 ``(C,)``, how much a channel's squared error counts.
    """
    if not table.alive.any():
        return 1.0
    shift = np.log2(factors)
    heavy = table.alive & (weights > 0)
    counted = np.where(heavy, weights, 0.0) if heavy.any() else table.alive.astype(np.float64)
    top = float((table.log_step + shift)[counted > 0].max())

    def quietest(log_steps: np.ndarray) -> float:
        noise = (counted * table.at(log_steps[:, None] - shift)).sum(axis=1)
        return float(log_steps[int(np.argmin(noise))])

    return float(2.0 ** quietest(quietest(top + COARSE) + FINE))
