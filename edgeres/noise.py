"""What quantizing costs, as numbers: a tensor's noise at every step size.

A channel is scaled by a factor before it is quantized (equalization folds the factor into the weights around it), so
what counts is its step in its own units: the tensor's step over the factor.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Dict, Mapping, Tuple

import numpy as np

from edgeres.archive import read_npz
from edgeres.errors import CalibrationError

PER_OCTAVE = 4
OCTAVES = (-6, 10)  # of the step, around the one whose grid just reaches the channel's largest magnitude
STEPS = (OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE + 1
LARGEST = 1 << 30  # bytes of a file of scalings, unpacked: some tens of thousands of channels are a megabyte
SMALLEST = 1e-30  # a channel that never fired has no magnitude to measure by


@dataclass(frozen=True)
class NoiseTable:
    """Mean squared quantization error of each of a tensor's channels at log-spaced steps.

    ``log_step`` is float64 ``(C,)``: log2 of the step, in the channel's own units, whose grid just reaches its largest
    magnitude. ``error`` is float64 ``(C, STEPS)``, squared units: at step 2^(``log_step`` + ``OCTAVES[0]`` +
    s / ``PER_OCTAVE``). ``power`` is the mean of x², ``mean`` that of x, both float64 ``(C,)``. ``alive`` is bool
    ``(C,)``: channels that were ever other than zero. ``grid`` is the first and the last step.
    """

    log_step: np.ndarray
    error: np.ndarray
    power: np.ndarray
    mean: np.ndarray
    alive: np.ndarray
    grid: Tuple[int, int]

    def at(self, log_step: np.ndarray) -> np.ndarray:
        """Return the mean squared error of each channel at step 2^``log_step``, both float64 ``(…, C)``."""
        place = np.clip((log_step - self.log_step - OCTAVES[0]) * PER_OCTAVE, 0, STEPS - 1 - 1e-9)
        left = place.astype(np.int64)
        rows, share = np.arange(len(self.error)), place - left
        logs = self.log_error
        return np.asarray(np.exp(logs[rows, left] * (1 - share) + logs[rows, left + 1] * share))

    @cached_property
    def log_error(self) -> np.ndarray:
        """The natural logarithm of ``error``, which is interpolated between steps: float64 ``(C, STEPS)``."""
        return np.asarray(np.log(np.maximum(self.error, SMALLEST**2)))


@dataclass(frozen=True)
class Scaling:
    """How a tensor's channels are scaled before they are quantized, and how much noise on each of them matters.

    ``factors`` is float64 ``(C,)``, all > 0. ``weights`` is float64 ``(C,)``: what one unit of noise power on each
    element of a channel adds to the power of the logits' noise; empty where nobody asked.
    """

    factors: np.ndarray
    weights: np.ndarray

    @property
    def is_plain(self) -> bool:
        """Whether nothing is scaled."""
        return bool((self.factors == 1).all())


def scalings_to_bytes(scalings: Mapping[str, Scaling]) -> bytes:
    """Return scalings as an npz file; equal ones give equal bytes."""
    names = sorted(scalings)
    parts = [scalings[name] for name in names]
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        names=np.array(names, dtype=np.str_),
        channels=np.array([(len(part.factors), len(part.weights)) for part in parts], np.int64).reshape(-1, 2),
        factors=np.concatenate([np.empty(0), *(part.factors for part in parts)]),
        weights=np.concatenate([np.empty(0), *(part.weights for part in parts)]),
    )
    return stream.getvalue()


def scalings_from_bytes(content: bytes, where: str) -> Dict[str, Scaling]:
    """Return the scalings that :func:`scalings_to_bytes` wrote.

    Raises:
        CalibrationError: it is not such a file; ``where`` names it in the message.
    """
    try:
        entries = ("names", "channels", "factors", "weights")
        data = read_npz(content, entries, LARGEST)
        names, channels, factors, weights = (data[name] for name in entries)
        ends = np.cumsum(channels, axis=0)
        if channels.shape != (len(names), 2) or (channels < 0).any() or len(set(names.tolist())) != len(names):
            raise ValueError("its names and channels do not belong together")
        if len(names) and (factors.shape, weights.shape) != ((ends[-1, 0],), (ends[-1, 1],)):
            raise ValueError("it is not complete")
        if not (np.isfinite(factors).all() and (factors > 0).all() and (weights >= 0).all()):
            raise ValueError("a factor or a weight is not a positive number")
        return {
            str(name): Scaling(factors[end[0] - size[0] : end[0]], weights[end[1] - size[1] : end[1]])
            for name, size, end in zip(names, channels, ends)
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError, MemoryError) as problem:
        raise CalibrationError(f"{where}: not a file of scalings ({problem}). Calibrate again.") from None
