"""The compiled costs of a grid against NumPy: quantizing a great many values spread evenly within each bin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeres.calibrate import distortion
from edgeres.calibrate.distortion import channel_errors, squared_errors

POINTS = (np.arange(20_000) + 0.5) / 20_000
STEPS = 2.0 ** np.linspace(-6, 3, 37)


def spread(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return float64 (B, P): what each bin is taken to hold."""
    return low[:, None] + (high - low)[:, None] * POINTS


def quantized(x: np.ndarray, step: float, last: int, clipping: float) -> np.ndarray:
    """Return each bin's mean squared error."""
    error = (x - np.minimum(np.rint(x / step), last) * step) ** 2
    return np.asarray((error * np.where(x / step > last + 0.5, clipping, 1.0)).mean(axis=1))


@pytest.mark.parametrize("clipping", [1.0, 3.0])
@pytest.mark.parametrize("last", [127, 128, 255, 3])
def test_the_error_is_that_of_quantizing_what_the_bins_hold(last: int, clipping: float) -> None:
    rng = np.random.default_rng(last)
    edges = np.sort(rng.uniform(0, 9, 14)) ** 2
    low, high, counts = edges[:-1], edges[1:], rng.integers(0, 50, 13).astype(np.float64)
    low, high, counts = np.append(low, 81.5), np.append(high, 81.5), np.append(counts, 7.0)  # one bin has no width
    found = squared_errors(low, high, counts, STEPS, last, clipping)
    x = spread(low, high)
    np.testing.assert_allclose(found, [counts @ quantized(x, s, last, clipping) for s in STEPS], rtol=1e-4)


def test_bins_without_width_are_single_values() -> None:
    values = np.array([0.0, 0.3, 1.0, 126.6, 127.5, 128.0, 400.0])
    for scale in (1.0, 2.0**-90, 2.0**90):
        found = squared_errors(values * scale, values * scale, np.ones(7), np.array([scale]), 127, 1.0)
        assert found[0] / scale**2 == pytest.approx(float(((values - np.minimum(np.rint(values), 127)) ** 2).sum()))


@pytest.mark.parametrize("width", [1e-3, 1e-6, 1e-9, 1e-11, 1e-13, 0.0])
def test_narrow_bins_do_not_cancel_out(width: float) -> None:
    low = np.array([0.3, 77.3, 300.0])
    wanted = float(((low - np.minimum(np.rint(low), 127)) ** 2).sum())
    found = squared_errors(low, low * (1 + width), np.ones(3), np.array([1.0]), 127, 1.0)
    assert found[0] == pytest.approx(wanted, rel=max(3 * width, 1e-3))


def test_no_bins_cost_nothing() -> None:
    none = np.empty(0)
    assert squared_errors(none, none, none, STEPS, 127, 1.0).tolist() == [0.0] * len(STEPS)


@pytest.mark.parametrize("grid", [(-128, 127), (0, 255)], ids=["symmetric", "shifted"])
def test_channels_are_measured_by_their_own_bins(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    near = np.array([0.0, 0.5, 1.0, 2.0, -0.0, -0.25, -0.5, -1.0])
    far = np.array([0.0, 1.0, 2.0, 4.0, -0.0, -0.5, -1.0, -2.0])  # the fourth and the last are cut by the extremes
    counts = rng.integers(0, 30, (5, 8))
    counts[1, 4:], counts[2, :4], counts[3], counts[4, 1:] = 0, 0, 0, 0
    extremes = np.array([[-1.7, 3.0], [0.0, 2.5], [-1.01, 0.0], [np.inf, -np.inf], [0.0, 0.0]])
    counts[0, [3, 7]] = counts[1, 3] = counts[2, 7] = 1
    multiples = np.array([0.1, 0.7, 1.0, 1.9, 40.0])
    errors, moments = channel_errors(np.stack([near, far]), counts, extremes, multiples, grid, 2.0)
    assert errors.shape == (5, 5)
    assert moments.shape == (5, 3)
    assert not errors[3:].any()
    assert not moments[3:, :2].any()
    for channel in range(3):
        least, most = extremes[channel]
        x = spread(np.clip(near, least, most), np.clip(far, least, most))
        amax = max(-least, most)
        for step, error in zip(multiples * amax / grid[1], errors[channel], strict=True):
            sides = [quantized(sign * x, step, last, 2.0) for sign, last in ((1, grid[1]), (-1, -grid[0]))]
            wanted = counts[channel] @ np.where(far >= 0, *sides)
            assert error == pytest.approx(wanted, rel=1e-3)
        assert moments[channel, 0] == pytest.approx(counts[channel] @ x.mean(axis=1), rel=1e-6, abs=1e-9)
        assert moments[channel, 1] == pytest.approx(counts[channel] @ (x**2).mean(axis=1), rel=1e-6)
        assert moments[channel, 2] == counts[channel] @ (np.abs(x).max(axis=1) > amax / 2)


def test_it_is_compiled_also_where_nothing_can_be_kept() -> None:
    source = Path(distortion.__file__).read_text(encoding="utf-8")
    space: dict[str, Any] = {"__name__": "distortion"}
    exec(compile(source, "<no file>", "exec"), space)  # a source without a file has no place to keep compiled code
    low, high, counts = np.array([0.5, 1.0]), np.array([1.0, 2.0]), np.array([3.0, 4.0])
    for steps in (STEPS, STEPS[:1]):
        found = [f(low, high, counts, steps, 127, 1.0) for f in (squared_errors, space["squared_errors"])]
        np.testing.assert_array_equal(*found)
