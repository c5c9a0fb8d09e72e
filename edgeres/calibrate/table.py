"""From statistics to the calibration table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np

from edgeres.affine import SHIFTED, SYMMETRIC, scale_from_amax, shift_from_scale
from edgeres.artifacts import TensorRange
from edgeres.calibrate.auto import best_step
from edgeres.calibrate.noise import expected_noise
from edgeres.calibrate.ranges import METHODS, Histogram, squared_error
from edgeres.calibrate.statistics import Statistics, TensorStatistics
from edgeres.errors import CalibrationError
from edgeres.noise import Scaling
from edgeres.provenance import cores

IMPORTED = "imported"  # the method of a range that a file came with
AUTO = "auto"  # by the noise that reaches the answer; reads the channels, not one histogram


def choose(
    statistics: Statistics,
    method: str,
    percentile: float,
    shifted: Collection[str] = (),
    scalings: Mapping[str, Scaling] = MappingProxyType({}),
    given: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, TensorRange]:
    """Return the range of every tensor by ``method`` (``auto``, or a key of ``METHODS``), in order of name.

    Args:
        percentile: the share in percent that the ``percentile`` method keeps; the others ignore it.
        shifted: tensors that may be shifted to the full int8 range; those that were seen negative are not.
        scalings: by tensor, what its channels are multiplied with before it is quantized (ranges are of the scaled
            tensor then), and how much noise on each matters, which ``auto`` weighs.
        given: the ``amax`` of tensors whose range is known beforehand, from a file that is quantized already.

    Raises:
        CalibrationError: the method is unknown, or a tensor was never seen.
    """
    if method not in (AUTO, *METHODS):
        raise CalibrationError(f"there is no range method {method!r}. Choose one of: {', '.join((AUTO, *METHODS))}")
    empty = [name for name in sorted(statistics.tensors) if not statistics.tensors[name].elements]
    if empty:
        raise CalibrationError(f"the statistics hold no element of tensor {empty[0]!r}. Calibrate again.")

    def choose_one(name: str) -> TensorRange:
        found = statistics.tensors[name]
        grid = SHIFTED if name in shifted and found.minimum >= 0 else SYMMETRIC
        if name in given:
            return _described(found, given[name], IMPORTED, grid, None)
        return _range(found, method, percentile, grid, scalings.get(name))

    names = sorted(statistics.tensors)
    with ThreadPoolExecutor(cores()) as pool:  # the compiled loops let other threads run
        return dict(zip(names, pool.map(choose_one, names), strict=True))


def described(
    statistics: Statistics, ranges: Mapping[str, TensorRange], scalings: Mapping[str, Scaling] = MappingProxyType({})
) -> dict[str, TensorRange]:
    """Return ranges, of whatever method, with what the statistics say of them; ``scalings`` as in :func:`choose`."""
    return {
        name: _described(
            statistics.tensors[name],
            found.amax,
            found.method,
            SHIFTED if found.shift else SYMMETRIC,
            scalings.get(name),
        )
        for name, found in ranges.items()
    }


def _range(
    statistics: TensorStatistics, method: str, percentile: float, grid: tuple[int, int], scaling: Scaling | None
) -> TensorRange:
    ones = np.ones(statistics.channels_seen)
    factors, histogram = _scaled(statistics, grid, scaling)
    if method == AUTO:
        weights = ones if scaling is None or not scaling.weights.size else scaling.weights
        amax = min(best_step(expected_noise(statistics, grid), factors, weights) * grid[1], histogram.amax)
    else:
        amax = METHODS[method](histogram, percentile)
    if amax <= 0.0:  # a percentile may fall into the zeros of a sparse tensor: a range of zero would erase the rest
        amax = histogram.amax
    return _described(statistics, amax, method, grid, scaling)


def _scaled(
    statistics: TensorStatistics, grid: tuple[int, int], scaling: Scaling | None
) -> tuple[np.ndarray, Histogram]:
    """Return what a tensor's channels are multiplied with, and its histogram then."""
    if scaling is None or scaling.is_plain:
        return np.ones(statistics.channels_seen), Histogram.of(statistics, grid)
    return scaling.factors, Histogram.scaled(statistics, scaling.factors, grid)


def _described(
    statistics: TensorStatistics, amax: float, method: str, grid: tuple[int, int], scaling: Scaling | None
) -> TensorRange:
    """Return a range with what the statistics say of it."""
    factors, histogram = _scaled(statistics, grid, scaling)
    plain = scaling is None or scaling.is_plain
    scale = scale_from_amax(np.float64(amax), grid)
    return TensorRange(
        amax=amax,
        scale=float(scale),
        method=method,
        minimum=statistics.minimum if plain else float((statistics.channel_minimum * factors).min()),
        maximum=statistics.maximum if plain else float((statistics.channel_maximum * factors).max()),
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
