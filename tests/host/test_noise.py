"""Noise tables against really quantizing the samples, and the range method that reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeres.affine import QMAX, QMIN, SHIFTED, SYMMETRIC, dequantize, quantize, shift_from_scale
from edgeres.calibrate import TensorStatistics
from edgeres.calibrate.auto import best_step
from edgeres.calibrate.noise import CLIPPING, expected_noise, noise_table
from edgeres.noise import OCTAVES, PER_OCTAVE, STEPS, NoiseTable

COUNT = 16_384
GRIDS = {"symmetric": SYMMETRIC, "shifted": SHIFTED}
SAMPLES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal(COUNT),
    "relu": lambda rng: np.maximum(rng.standard_normal(COUNT) - 0.5, 0),
    "uniform": lambda rng: rng.uniform(-2, 5, COUNT),
    "skewed": lambda rng: rng.exponential(20, COUNT),
    "small": lambda rng: 1e-6 * rng.standard_normal(COUNT),
    "negative": lambda rng: -rng.exponential(0.3, COUNT) - 0.01,
}


def counted(x: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.update(np.asarray(x, np.float32))
    return statistics


def table_of(x: np.ndarray, grid: tuple[int, int] = SYMMETRIC) -> NoiseTable:
    """Return the table of a tensor given as (channels, elements)."""
    return noise_table(counted(x[None]), grid)


def steps_of(table: NoiseTable) -> np.ndarray:
    """Return the steps of a table's columns, float64 (C, STEPS)."""
    return 2.0 ** (table.log_step[:, None] + OCTAVES[0] + np.arange(STEPS) / PER_OCTAVE)


def really(x: np.ndarray, step: float, grid: tuple[int, int]) -> float:
    """Return the mean squared error of really quantizing, what lies half a step beyond the grid counted more."""
    x = np.asarray(x, np.float32).astype(np.float64)
    integers = np.clip(np.rint(x / step), *grid)
    outside = (x / step > grid[1] + 0.5) | (x / step < grid[0] - 0.5)
    return float(np.mean((x - integers * step) ** 2 * np.where(outside, CLIPPING, 1.0)))


def evenly(low: float, high: float, number: int) -> np.ndarray:
    """Return samples spread evenly within each of a channel's bins from ``low`` to ``high``, both powers of two."""
    octaves = int(np.log2(high / low))
    edges = np.concatenate([low * 2.0**i * (1 + np.arange(8) / 8) for i in range(octaves)])
    widths = np.repeat(low * 2.0 ** np.arange(octaves) / 8, 8)
    return (edges[:, None] + widths[:, None] * (np.arange(number) + 0.5) / number).reshape(-1)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_error_is_that_of_quantizing_the_samples(grid: tuple[int, int]) -> None:
    x = np.stack([make(np.random.default_rng(i)) for i, make in enumerate(SAMPLES.values())])
    table = table_of(x, grid)
    assert table.error.shape == (len(x), STEPS)
    for channel, name in enumerate(SAMPLES):
        for column, step in enumerate(steps_of(table)[channel]):
            beyond = int(np.sum((x[channel] > (grid[1] + 0.5) * step) | (x[channel] < (grid[0] - 0.5) * step)))
            near = 0.5 if 0 < beyond < 200 else 0.05  # where few are clipped it matters where in its bin each one sits
            wanted = really(x[channel], step, grid)
            assert table.error[channel, column] == pytest.approx(wanted, rel=near), (name, column)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_it_is_exact_where_samples_are_spread_evenly_within_their_bins(grid: tuple[int, int], sign: int) -> None:
    x = sign * evenly(2.0**-8, 4.0, 500)
    table = table_of(x[None], grid)
    wanted = [really(x, step, grid) for step in steps_of(table)[0]]
    np.testing.assert_allclose(table.error[0], wanted, rtol=3e-3)
    assert table.power[0] == pytest.approx(np.mean(x**2), rel=1e-5)
    assert table.mean[0] == pytest.approx(np.mean(x), rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("value", [1.0, 1.9, -1.9, 127.0, 3e-7, -0.0131])
def test_a_channel_whose_elements_are_all_equal(value: float, grid: tuple[int, int]) -> None:
    value = float(np.float32(value))
    table = table_of(np.full((1, 100), value), grid)
    wanted = [really(np.array([value]), step, grid) for step in steps_of(table)[0]]
    np.testing.assert_allclose(table.error[0], wanted, rtol=1e-6, atol=1e-12 * value**2)
    assert (table.power[0], table.mean[0]) == (pytest.approx(value**2), pytest.approx(value))


def test_clipping_counts_more_than_rounding() -> None:
    table = table_of(np.array([[100.0, 100.0, 100.0]]))
    step = steps_of(table)[0, 0]  # 127 of these steps reach a 64th of the channel
    assert table.error[0, 0] == pytest.approx(CLIPPING * (100 - 127 * step) ** 2)
    assert table.error[0, -1] == pytest.approx(100.0**2)  # all is rounded to zero, nothing clipped


def test_a_channel_that_never_fired_costs_nothing() -> None:
    x = np.stack([np.zeros(64), np.linspace(-1, 1, 64)])
    table = table_of(x)
    assert table.alive.tolist() == [False, True]
    assert not table.error[0].any()
    assert (table.power[0], table.mean[0]) == (0, 0)
    assert np.isfinite(table.log_step).all()
    assert table.at(np.array([3.0, -5.0]))[0] < 1e-50


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_middle_step_just_reaches_the_largest_magnitude(grid: tuple[int, int]) -> None:
    x = np.array([[0.5, -0.25, 0.125], [-6.0, 1.0, 0.0]])
    np.testing.assert_allclose(2 ** table_of(x, grid).log_step * grid[1], [0.5, 6.0], rtol=1e-12)


def test_channels_keep_apart_and_samples_add_up() -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((6, 4, 5, 5)) * np.array([1, 10, 0.1, 3])[:, None, None]).astype(np.float32)
    whole = noise_table(counted(x))
    parts = counted(x[:2])
    parts.merge(counted(x[2:]))
    np.testing.assert_array_equal(noise_table(parts).error, whole.error)
    for channel in range(4):
        alone = table_of(x[:, channel].reshape(1, -1))
        np.testing.assert_allclose(whole.error[channel], alone.error[0], rtol=1e-9)
        assert whole.log_step[channel] == alone.log_step[0]


@given(arrays.arrays(np.float32, (2, 30), elements=st.floats(-1000, 1000, width=32)), st.integers(-30, 30))
def test_doubling_the_samples_quadruples_the_error(x: np.ndarray, octaves: int) -> None:
    x = np.where(np.abs(x) < 1e-3, np.float32(0), x)
    one, other = table_of(x), table_of(x * np.float32(2.0**octaves))
    alive = one.alive
    assert (other.alive == alive).all()
    np.testing.assert_allclose(other.error, one.error * 4.0**octaves, rtol=1e-9, atol=0)
    np.testing.assert_allclose(other.log_step[alive], one.log_step[alive] + octaves, rtol=0, atol=1e-9)


@given(st.floats(0.01, 100))
def test_scaling_the_samples_scales_the_error_by_its_square(factor: float) -> None:
    x = evenly(2.0**-8, 4.0, 50)[None]
    one, other = table_of(x), table_of(factor * x)  # other bins, so equal but for what bins are too coarse to see
    np.testing.assert_allclose(other.error, one.error * factor**2, rtol=0.06)


@given(
    arrays.arrays(np.float32, (1, 12), elements=st.floats(-8, 8, width=32)).filter(lambda x: np.abs(x).max() > 1e-20),
    st.integers(0, STEPS - 1),
)
def test_the_error_of_few_samples_lies_between_the_ends_of_their_bins(x: np.ndarray, column: int) -> None:
    # Within a bin every value may sit anywhere, so only bounds are sure: the least and the most error in each bin.
    table = table_of(x)
    step = steps_of(table)[0, column]
    values = x[0].astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-126)))
    width = 2.0 ** (exponent - 3)
    low = np.floor(np.abs(values) / width) * width
    points = np.sign(values) * np.minimum(low + width * np.linspace(0, 1, 2001)[:, None], np.abs(x).max())
    integers = np.clip(np.rint(points / step), *SYMMETRIC)
    outside = (points / step > 127.5) | (points / step < -128.5)
    error = (points - integers * step) ** 2 * np.where(outside, CLIPPING, 1.0)
    slack = 1e-6 * step**2
    assert error.min(0).mean() * 0.99 - slack <= table.error[0, column] <= error.max(0).mean() * 1.01 + slack


SMOOTH = np.random.default_rng(5).standard_normal(COUNT)
SMOOTH_TABLE = table_of(SMOOTH[None])


def test_between_steps_the_error_is_interpolated() -> None:
    table = table_of(np.random.default_rng(1).standard_normal((3, 5000)) * np.array([[1], [7], [0.2]]))
    columns = OCTAVES[0] + np.arange(STEPS) / PER_OCTAVE
    for column in (0, 7, 24, 40, STEPS - 1):
        np.testing.assert_allclose(table.at(table.log_step + columns[column]), table.error[:, column], rtol=1e-6)
    between = table.at(table.log_step + columns[30] + 0.1)
    share = 0.1 * PER_OCTAVE
    np.testing.assert_allclose(
        between, table.error[:, 30] ** (1 - share) * table.error[:, 31] ** share, rtol=1e-9
    )  # a power of the step, as rounding errors are
    for beyond, column in ((-100.0, 0), (100.0, -1)):
        np.testing.assert_allclose(table.at(table.log_step + beyond), table.error[:, column], rtol=1e-6)


def test_many_steps_at_once_are_as_one_at_a_time() -> None:
    table = table_of(np.random.default_rng(2).standard_normal((4, 500)) * np.array([[1], [7], [0.2], [0]]))
    steps = np.random.default_rng(3).uniform(-12, 8, (9, 4))
    np.testing.assert_array_equal(table.at(steps), [table.at(step) for step in steps])


@given(st.floats(-5.9, -1) | st.floats(0, 9.9))  # between, a few elements decide how much is clipped
def test_interpolation_stays_near_the_truth(octave: float) -> None:
    log_step = float(SMOOTH_TABLE.log_step[0] + octave)
    assert SMOOTH_TABLE.at(np.array([log_step]))[0] == pytest.approx(really(SMOOTH, 2.0**log_step, SYMMETRIC), rel=0.1)


def weighted(x: np.ndarray, factors: np.ndarray, weights: np.ndarray, step: float, grid: tuple[int, int]) -> float:
    """Return the weighted error of scaling channels, quantizing them with one step, and scaling them back."""
    scaled = x * factors[:, None]
    return sum(w * really(c, step, grid) / f**2 for c, w, f in zip(scaled, weights, factors, strict=True))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_best_step_is_that_of_brute_force(seed: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.standard_normal((5, 6000)), 0) * 10 ** rng.uniform(-1, 1, (5, 1))
    factors, weights = 2 ** rng.uniform(-2, 2, 5), 10 ** rng.uniform(-2, 2, 5)
    weights[seed] = 0
    step = best_step(table_of(x, grid), factors, weights)
    largest = np.abs(x * factors[:, None]).max() / grid[1]
    brute = min(weighted(x, factors, weights, s, grid) for s in largest * 2.0 ** np.linspace(-8, 1, 300))
    assert weighted(x, factors, weights, step, grid) <= 1.1 * brute  # a channel's bins are an eighth of an octave wide


def test_a_heavy_channel_gets_the_finer_step() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4000)) * np.array([[1.0], [50.0]])
    table, ones = table_of(x), np.ones(2)
    even = best_step(table, ones, ones)
    assert best_step(table, ones, np.array([1e6, 1.0])) < even / 4
    assert best_step(table, ones, np.array([1.0, 0.0])) == pytest.approx(
        best_step(table_of(x[:1]), np.ones(1), np.ones(1)), rel=1e-9
    )


def test_factors_are_those_of_scaled_samples() -> None:
    x = np.random.default_rng(2).standard_normal((3, 4000))
    factors, weights = np.array([4.0, 0.5, 32.0]), np.array([1.0, 3.0, 0.2])
    scaled = best_step(table_of(x * factors[:, None]), np.ones(3), weights / factors**2)
    assert best_step(table_of(x), factors, weights) == pytest.approx(scaled, rel=1e-9)


def test_weights_of_zero_count_as_none() -> None:
    table = table_of(np.random.default_rng(4).standard_normal((3, 500)))
    assert best_step(table, np.ones(3), np.zeros(3)) == best_step(table, np.ones(3), np.ones(3))


def test_a_tensor_of_zeros_gets_a_step_that_keeps_it() -> None:
    assert best_step(table_of(np.zeros((4, 9))), np.ones(4), np.ones(4)) == 1.0


def test_the_shifted_grid_is_int8_of_the_shifted_tensor() -> None:
    """The table's grid 0…255 is what quantizing x − 128·scale to int8 gives, with the core's own functions."""
    x = np.random.default_rng(6).exponential(1, COUNT).astype(np.float32)
    table = table_of(x[None], SHIFTED)
    scale = np.float32(2.0 ** (table.log_step[0] - 1))
    shift = shift_from_scale(scale)
    back = dequantize(quantize((x - shift).astype(np.float32), scale), scale).astype(np.float64) + shift
    steps = x / np.float64(scale)
    outside = (steps > QMAX - QMIN + 0.5) | (steps < -0.5)
    wanted = np.mean((x - back) ** 2 * np.where(outside, CLIPPING, 1.0))
    assert table.at(table.log_step - 1)[0] == pytest.approx(wanted, rel=0.05)


def test_other_images_are_expected_to_reach_further() -> None:
    """The more values lie near the largest, the surer it is; a larger channel is no surer than a small one."""
    rng = np.random.default_rng(3)
    many, few = counted(rng.uniform(0, 1, (1, 2, 4096))), counted(rng.uniform(0, 1, (1, 2, 8)))
    for statistics, share in ((many, 2048), (few, 4)):
        table, exact = expected_noise(statistics), noise_table(statistics)
        reach = 2.0 ** (table.log_step - exact.log_step)
        np.testing.assert_allclose(reach, 1 + 1 / np.sqrt(share), rtol=0.2)
        at = exact.log_step + 1.0  # a step that clips nothing: the noise of rounding does not grow with the values
        np.testing.assert_allclose(table.at(at), exact.at(at), rtol=0.3)
    x = rng.uniform(0, 1, (1, 3, 64))
    alone, scaled = expected_noise(counted(x)), expected_noise(counted(x * 2.0**7))
    np.testing.assert_allclose(scaled.log_step, alone.log_step + 7, rtol=1e-12)
