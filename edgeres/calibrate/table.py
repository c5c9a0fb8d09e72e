"""From statistics to the calibration table."""

from __future__ import annotations

import math

import numpy as np

from edgeres.affine import scale_from_amax
from edgeres.artifacts import TensorRange
from edgeres.calibrate.ranges import METHODS, Histogram, squared_error
from edgeres.calibrate.statistics import Statistics, TensorStatistics
from edgeres.errors import CalibrationError


def choose(statistics: Statistics, method: str, percentile: float) -> dict[str, TensorRange]:
    """Return the range of every tensor by ``method`` (a key of ``METHODS``), in order of name.

    Args:
        percentile: the share in percent that the ``percentile`` method keeps; the others ignore it.

    Raises:
        CalibrationError: the method is unknown, or a tensor was never seen.
    """
    if method not in METHODS:
        raise CalibrationError(f"there is no range method {method!r}. Choose one of: {', '.join(METHODS)}")
    return {name: _range(name, statistics.tensors[name], method, percentile) for name in sorted(statistics.tensors)}


def _range(name: str, statistics: TensorStatistics, method: str, percentile: float) -> TensorRange:
    if not statistics.elements:
        raise CalibrationError(f"the statistics hold no element of tensor {name!r}. Calibrate again.")
    histogram = Histogram.of(statistics)
    amax = METHODS[method](histogram, percentile)
    if amax <= 0.0:  # a percentile may fall into the zeros of a sparse tensor: a range of zero would erase the rest
        amax = histogram.amax
    return TensorRange(
        amax=amax,
        scale=float(scale_from_amax(np.float64(amax))),
        method=method,
        minimum=statistics.minimum,
        maximum=statistics.maximum,
        elements=statistics.elements,
        zeros=statistics.zeros / statistics.elements,
        clipped=histogram.beyond(amax) / statistics.elements,
        sqnr_db=_sqnr_db(histogram, amax),
    )


def _sqnr_db(histogram: Histogram, amax: float) -> float | None:
    """Return the expected signal-to-noise ratio of the tensor alone, dB; None where it is always zero."""
    power = histogram.power()
    if power == 0.0 or amax == 0.0:
        return None
    noise = float(squared_error(histogram, np.array([amax]))[0])
    return 10 * math.log10(power / noise) if noise > 0 else None
