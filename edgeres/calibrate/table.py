"""From statistics to the calibration table."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from edgeres.affine import SHIFTED, SYMMETRIC, scale_from_amax, shift_from_scale
from edgeres.artifacts import TensorRange
from edgeres.calibrate.ranges import METHODS, Histogram, squared_error
from edgeres.calibrate.statistics import Statistics, TensorStatistics
from edgeres.errors import CalibrationError


def choose(
    statistics: Statistics, method: str, percentile: float, shifted: Collection[str] = ()
) -> dict[str, TensorRange]:
    """Return the range of every tensor by ``method`` (a key of ``METHODS``), in order of name.

    Args:
        percentile: the share in percent that the ``percentile`` method keeps; the others ignore it.
        shifted: tensors that may be shifted to the full int8 range; those that were seen negative are not.

    Raises:
        CalibrationError: the method is unknown, or a tensor was never seen.
    """
    if method not in METHODS:
        raise CalibrationError(f"there is no range method {method!r}. Choose one of: {', '.join(METHODS)}")
    empty = [name for name in sorted(statistics.tensors) if not statistics.tensors[name].elements]
    if empty:
        raise CalibrationError(f"the statistics hold no element of tensor {empty[0]!r}. Calibrate again.")
    return {
        name: _range(found, method, percentile, SHIFTED if name in shifted and found.minimum >= 0 else SYMMETRIC)
        for name, found in sorted(statistics.tensors.items())
    }


def _range(statistics: TensorStatistics, method: str, percentile: float, grid: tuple[int, int]) -> TensorRange:
    histogram = Histogram.of(statistics, grid)
    amax = METHODS[method](histogram, percentile)
    if amax <= 0.0:  # a percentile may fall into the zeros of a sparse tensor: a range of zero would erase the rest
        amax = histogram.amax
    scale = scale_from_amax(np.float64(amax), grid)
    return TensorRange(
        amax=amax,
        scale=float(scale),
        method=method,
        minimum=statistics.minimum,
        maximum=statistics.maximum,
        elements=statistics.elements,
        zeros=statistics.zeros / statistics.elements,
        clipped=histogram.beyond(amax) / statistics.elements,
        sqnr_db=_sqnr_db(histogram, amax),
        # what is always zero has a step of 1.0 and stays where it is: a shift would be larger than all it holds
        shift=float(shift_from_scale(scale)) if grid == SHIFTED and amax > scale else 0.0,
    )


def _sqnr_db(histogram: Histogram, amax: float) -> float | None:
    """Return the expected signal-to-noise ratio of the tensor alone, dB; None where it is always zero."""
    power = histogram.power()
    if power == 0.0 or amax == 0.0:
        return None
    noise = float(squared_error(histogram, np.array([amax]))[0])
    return 10 * math.log10(power / noise) if noise > 0 else None
