"""The numerical core: the one place where a scale is computed, and what int8 means.

Symmetric int8 as ONNX and TensorRT have it: real = scale × integer, zero point 0, integers −128…127, rounding half to
even, saturating. What is never negative may be shifted: x − 128·scale is quantized in the place of x, so that the same
integers stand for the 256 steps from 0 to 255·scale.

Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 13; Nagel et al., "A White Paper on Neural Network
Quantization", 2021 (arXiv:2106.08295), section 2.2.
"""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from edgeres.errors import CalibrationError

QMIN, QMAX = -128, 127
SYMMETRIC, SHIFTED = (QMIN, QMAX), (0, QMAX - QMIN)
"""The first and the last step of a grid, in multiples of the scale."""


def scale_from_amax(amax: np.ndarray, grid: Tuple[int, int] = SYMMETRIC) -> np.ndarray:
    """Return the step size whose INT8 grid just reaches ``amax``.

    A channel that never fired (``amax`` so small that a float32 step would vanish) gets a step of 1.0: it quantizes to
    exact zeros.

    Args:
        amax: float, ``()`` for one range per tensor or ``(C,)`` per channel; largest |x|, in the tensor's own units.
        grid: ``SYMMETRIC``, or ``SHIFTED`` for a tensor that is never negative.

    Returns:
        float32 of the same shape, real units per integer step, always > 0.

    Raises:
        CalibrationError: an entry is negative, NaN, infinite, or beyond float32.
    """
    amax = np.asarray(amax, np.float64)
    bad = amax[~((amax >= 0) & (amax <= np.finfo(np.float32).max))]  # NaN compares false
    if bad.size:
        raise CalibrationError(
            f"a range must be a finite float32 and not negative, not {bad.flat[0]}. "
            "Check the model's weights, and calibrate again."
        )
    scale = (amax / grid[1]).astype(np.float32)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def shift_from_scale(scale: np.ndarray) -> np.ndarray:
    """Return what is subtracted from a shifted tensor, 128 steps: exact, and a float32 number.

    Args:
        scale: float32, any shape, real units per integer step.

    Returns:
        float64 of the same shape, real units.
    """
    return -QMIN * np.asarray(scale, np.float64)


def quantize(x: np.ndarray, scale: np.ndarray, axis: Optional[int] = None) -> np.ndarray:
    """Return the int8 integers of real numbers.

    Args:
        x: float32, any shape, real units.
        scale: float32, ``()`` or, with ``axis``, ``(x.shape[axis],)``; real units per step.
        axis: the channel axis of a per-channel scale.

    Returns:
        int8 of ``x``'s shape.
    """
    with np.errstate(over="ignore"):  # what overflows to infinity saturates below like everything off the grid
        steps = np.rint(x / _spread(scale, x.ndim, axis))
    return np.asarray(np.clip(steps, QMIN, QMAX).astype(np.int8))


def dequantize(q: np.ndarray, scale: np.ndarray, axis: Optional[int] = None) -> np.ndarray:
    """Return the float32 real numbers that int8 integers stand for; arguments as in :func:`quantize`."""
    return np.asarray(q.astype(np.float32) * _spread(scale, q.ndim, axis))


def channel_amax(weights: np.ndarray, axis: int) -> np.ndarray:
    """Return the largest |w| of each output channel.

    Args:
        weights: float32, any shape.
        axis: the output channels' axis.

    Returns:
        float32 ``(weights.shape[axis],)``.
    """
    others = tuple(i for i in range(weights.ndim) if i != axis)
    return np.asarray(np.abs(weights).max(axis=others, initial=0.0))


def _spread(scale: np.ndarray, ndim: int, axis: Optional[int]) -> np.ndarray:
    """Reshape a per-channel scale so that it broadcasts along ``axis``."""
    scale = np.asarray(scale, np.float32)
    if axis is None:
        return scale
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])
