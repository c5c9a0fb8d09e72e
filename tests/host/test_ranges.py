"""Range methods against what they approximate: raw samples, brute force, and optima integrated from densities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import integrate, optimize, stats  # type: ignore[import-untyped]

from edgeres.affine import SHIFTED, dequantize, quantize, scale_from_amax, shift_from_scale
from edgeres.calibrate import METHODS, Statistics, TensorStatistics, choose
from edgeres.calibrate.ranges import Histogram, entropy, minmax, mse, percentile, squared_error
from edgeres.errors import CalibrationError

COUNT = 200_000
BIN = 1 / 128  # the widest bin, relative to its value
SAMPLES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal(COUNT),
    "uniform": lambda rng: rng.uniform(-3, 3, COUNT),
    "laplace": lambda rng: rng.laplace(0, 0.1, COUNT),
    "relu": lambda rng: np.maximum(rng.standard_normal(COUNT), 0),
    "skewed": lambda rng: rng.exponential(20, COUNT) - 3,
}


def samples(name: str) -> np.ndarray:
    return SAMPLES[name](np.random.default_rng(7)).astype(np.float32)


def counted(x: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.update(np.asarray(x, np.float32))
    return statistics


def histogram(x: np.ndarray) -> Histogram:
    return Histogram.of(counted(x))


def raw_error(x: np.ndarray, amax: float) -> float:
    """Return the summed squared error of really quantizing ``x``."""
    scale = scale_from_amax(np.float64(amax))
    return float(((dequantize(quantize(x, scale), scale).astype(np.float64) - x) ** 2).sum())


@pytest.mark.parametrize("name", SAMPLES)
def test_minmax_is_the_exact_maximum(name: str) -> None:
    x = samples(name)
    assert minmax(histogram(x), 99.99) == float(np.abs(x).max())
    assert minmax(histogram(-x), 99.99) == float(np.abs(x).max())


@pytest.mark.parametrize("share", [60.0, 90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_percentile_is_numpys_within_one_bin(name: str, share: float) -> None:
    x = samples(name)
    wanted = float(np.quantile(np.abs(x), share / 100, method="inverted_cdf"))
    assert percentile(histogram(x), share) == pytest.approx(wanted, rel=BIN)


def test_the_hundredth_percentile_is_the_maximum() -> None:
    for name in SAMPLES:
        x = samples(name)
        assert percentile(histogram(x), 100.0) == pytest.approx(float(np.abs(x).max()), rel=1e-12)


def test_a_percentile_among_the_zeros_does_not_erase_the_rest() -> None:
    x = np.zeros(100_000, np.float32)
    x[:5] = [1e-6, 1.0, 2.0, 3.0, 4.0]
    assert percentile(histogram(x), 99.9) == 0.0  # as numpy.quantile has it
    statistics = Statistics({"sparse": counted(x)}, samples=1)
    assert choose(statistics, "percentile", 99.9)["sparse"].amax == 4.0


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.1, 0.02])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_error_is_that_of_quantizing_the_samples(name: str, share: float) -> None:
    x = samples(name)
    amax = share * float(np.abs(x).max())
    found = float(squared_error(histogram(x), np.array([amax]))[0])
    assert found == pytest.approx(raw_error(x, amax), rel=0.03)


@pytest.mark.parametrize("value", [1.0, -1.0, 1.7, -6.0, 127.5])
def test_the_error_of_a_constant_is_small_at_its_own_range(value: float) -> None:
    x = np.full(100, value, np.float32)
    at_own_range = float(squared_error(histogram(x), np.array([abs(value)]))[0])
    assert at_own_range <= 100 * (abs(value) / 127 / 2) ** 2


@given(
    arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1000, 1000, width=32)).filter(np.any),
    st.floats(0.01, 1),
)
def test_the_error_of_few_samples_lies_between_the_ends_of_their_bins(x: np.ndarray, share: float) -> None:
    # Within a bin every value may sit anywhere, so only bounds are sure: the least and the most error in each bin.
    h = histogram(x)
    amax = share * h.amax
    found = float(squared_error(h, np.array([amax]))[0])
    scale = amax / 127
    low = high = 0.0
    for counts, last in ((h.positive, 127), (h.negative, 128)):
        points = np.linspace(h.low / scale, h.high / scale, 400)
        error = (points - np.clip(np.rint(points), 0, last)) ** 2 * scale**2
        low += float((counts * error.min(0)).sum())
        high += float((counts * error.max(0)).sum())
    assert low * 0.999 - 1e-12 * amax**2 <= found <= high * 1.02 + 1e-12 * amax**2


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_as_good_as_brute_force_on_the_samples(name: str) -> None:
    x = samples(name)[:50_000]
    candidates = np.abs(x).max() * np.linspace(0.05, 1.0, 200)
    best = min(raw_error(x, amax) for amax in candidates)
    assert raw_error(x, mse(histogram(x), 99.99)) <= 1.02 * best


@pytest.mark.parametrize("density", [stats.norm(), stats.laplace()], ids=["gauss", "laplace"])
def test_mse_finds_the_published_clipping_optimum(density: stats.rv_continuous) -> None:
    # Banner et al. 2019 (arXiv:1810.05723), section 2: clipping noise plus Δ²/12 of rounding, integrated numerically.
    def noise(amax: float) -> float:
        clipped = integrate.quad(lambda x: (x - amax) ** 2 * density.pdf(x), amax, amax + 60)[0]
        return 2.0 * float(clipped) + (amax / 127) ** 2 / 12

    optimum = float(optimize.minimize_scalar(noise, bounds=(1, 30), method="bounded").x)
    x = density.rvs(size=1_000_000, random_state=np.random.default_rng(11)).astype(np.float32)
    amax = mse(histogram(x), 99.99)
    assert amax == pytest.approx(optimum, rel=0.05)
    assert noise(amax) <= 1.01 * noise(optimum)


def test_entropy_clips_a_heavy_tail_and_not_a_uniform() -> None:
    heavy = np.random.default_rng(3).standard_t(3, COUNT).astype(np.float32)
    flat = samples("uniform")
    assert entropy(histogram(heavy), 0) < 0.5 * np.abs(heavy).max()
    assert entropy(histogram(flat), 0) > 0.97 * np.abs(flat).max()


def slow_entropy(x: np.ndarray, levels: int = 128) -> float:
    """Return Migacz's threshold, bin by bin in plain Python, on the histogram that the statistics allow."""
    magnitudes = np.abs(x[x != 0])
    amax = float(magnitudes.max())
    bits = magnitudes.view(np.uint32) & 0xFFFF0000
    reached = np.linspace(0, amax, 2049)
    linear = np.zeros(2048)
    for low_bits, count in zip(*np.unique(bits, return_counts=True), strict=True):
        low = float(low_bits.view(np.float32))
        high = min(float((low_bits + np.uint32(0x10000)).view(np.float32)), amax)
        if low == high:
            linear[-1] += count
        else:
            linear += count * np.diff(np.clip((reached - low) / (high - low), 0, 1))
    best, best_bins = np.inf, 2048
    for bins in range(levels, 2049, 4):
        inside = linear[:bins]
        p = inside.copy()
        p[-1] += linear[bins:].sum()
        q = np.zeros(bins)
        for level in range(levels):
            part = slice(level * bins // levels, (level + 1) * bins // levels)
            hit = inside[part] > 0
            if hit.any():
                q[part][hit] = inside[part].sum() / hit.sum()
        if not q.any() or ((p > 0) & (q == 0)).any():
            continue
        divergence = float(stats.entropy(p[p > 0] / p.sum(), q[p > 0] / q.sum()))
        if divergence < best * (1 - 1e-9):
            best, best_bins = divergence, bins
    return amax if best_bins == 2048 else (best_bins + 0.5) * amax / 2048


@pytest.mark.parametrize("name", ["normal", "laplace", "skewed"])
@pytest.mark.parametrize("count", [60, 20_000])
def test_entropy_is_the_published_search(name: str, count: int) -> None:
    x = samples(name)[:count]
    assert entropy(histogram(x), 0) == pytest.approx(slow_entropy(x), rel=1e-9)


@pytest.mark.parametrize("count", [60, 20_000])
def test_entropy_knows_the_levels_of_a_shifted_grid(count: int) -> None:
    x = np.abs(samples("laplace")[:count])
    assert entropy(Histogram.of(counted(x), SHIFTED), 0) == pytest.approx(slow_entropy(x, 256), rel=1e-9)


def test_entropy_ignores_exact_zeros() -> None:
    x = np.abs(samples("laplace"))
    padded = np.concatenate([x, np.zeros(10 * x.size, np.float32)])
    assert entropy(histogram(padded), 0) == entropy(histogram(x), 0)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("method", METHODS)
def test_ranges_scale_with_their_tensor(method: str, name: str) -> None:
    x = samples(name)[:20_000]
    amax = METHODS[method](histogram(x), 99.9)
    for factor in (2.0**-20, 0.5, 8.0, 2.0**30):
        assert METHODS[method](histogram(x * np.float32(factor)), 99.9) == amax * factor
    slack = 0.12 if method == "entropy" else 0.03  # its divergence is flat around the best, and bins fall elsewhere
    assert METHODS[method](histogram(x * np.float32(1.37)), 99.9) == pytest.approx(1.37 * amax, rel=slack)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_blind_to_the_sign(method: str, name: str) -> None:
    x = samples(name)[:20_000]
    one, other = (METHODS[method](histogram(values), 99.9) for values in (x, -x))
    # int8 has one step more on the negative side, which only mse looks at
    assert one == (pytest.approx(other, rel=0.03) if method == "mse" else other)


@pytest.mark.parametrize("method", METHODS)
@given(x=arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32)))
def test_no_method_reaches_beyond_the_maximum(method: str, x: np.ndarray) -> None:
    found = choose(Statistics({"x": counted(x)}, samples=1), method, 99.0)["x"]
    largest = float(np.abs(x).max())
    assert 0.0 <= found.amax <= largest
    assert (found.amax > 0) == (largest > 0)
    assert found.scale > 0
    assert 0 <= found.clipped <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [3.0, -3.0, 1.2345, -1e-30, 1e30, 3e38])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_constant_tensor_stays_representable(method: str, value: float, count: int) -> None:
    x = np.full(count, value, np.float32)
    found = choose(Statistics({"x": counted(x)}, samples=1), method, 99.99)["x"]
    scale = np.float32(found.scale)
    assert dequantize(quantize(x, scale), scale)[0] == pytest.approx(float(x[0]), rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x", [[0.0], [0.0, -0.0] * 50, [1e-45, -1e-42]], ids=["zero", "zeros", "denormals"])
def test_what_is_always_zero_gets_a_step_of_one(method: str, x: list[float]) -> None:
    found = choose(Statistics({"x": counted(np.array(x))}, samples=1), method, 99.99)["x"]
    assert found.scale == 1.0
    assert found.zeros == 1.0
    assert found.clipped == 0.0
    assert found.sqnr_db is None


def test_one_huge_outlier() -> None:
    x = samples("normal")
    x[123] = 1e6
    h = histogram(x)
    assert minmax(h, 0) == 1e6
    assert percentile(h, 99.99) == pytest.approx(float(np.quantile(np.abs(x), 0.9999)), rel=2 * BIN)
    candidates = np.abs(x).max() * np.linspace(0.05, 1.0, 200)
    assert raw_error(x, mse(h, 0)) <= 1.02 * min(raw_error(x, amax) for amax in candidates)
    assert entropy(h, 0) <= 1e6


def test_clipping_below_a_maximum_on_a_bin_edge_is_counted() -> None:
    # A ReLU6 ends exactly on an edge: its last bin has no width.
    x = np.concatenate([np.linspace(0.01, 5, 900), np.full(100, 6.0)]).astype(np.float32)
    h = histogram(x)
    assert h.beyond(6.0) == 0
    assert h.beyond(5.5) == 100
    assert h.beyond(0.001) == 1000
    assert histogram(x * np.float32(2.0**100)).beyond(2.0**100) == pytest.approx((x > 1).sum(), abs=8)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("method", METHODS)
def test_the_table_says_what_quantizing_the_samples_shows(method: str, name: str) -> None:
    x = samples(name)
    found = choose(Statistics({"x": counted(x)}, samples=1), method, 99.9)["x"]
    assert found.method == method
    assert found.minimum == x.min()
    assert found.maximum == x.max()
    assert found.elements == x.size
    assert found.zeros == (x == 0).mean()
    assert found.scale == float(scale_from_amax(np.float64(found.amax)))
    assert found.clipped == pytest.approx((np.abs(x) > found.amax).mean(), abs=1e-4)
    sqnr = 10 * np.log10(float((x.astype(np.float64) ** 2).sum()) / raw_error(x, found.amax))
    assert found.sqnr_db == pytest.approx(sqnr, abs=0.15)


# Shifted to the full int8 range: 255 steps from zero on


def raw_error_shifted(x: np.ndarray, amax: float) -> float:
    """Return the summed squared error of really shifting and quantizing ``x``."""
    scale = scale_from_amax(np.float64(amax), SHIFTED)
    shift = np.float32(shift_from_scale(scale))
    return float(((dequantize(quantize(x - shift, scale), scale).astype(np.float64) + shift - x) ** 2).sum())


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.1, 0.02])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_error_of_a_shifted_grid_is_that_of_quantizing_the_samples(name: str, share: float) -> None:
    x = np.abs(samples(name))
    amax = share * float(x.max())
    found = float(squared_error(Histogram.of(counted(x), SHIFTED), np.array([amax]))[0])
    assert found == pytest.approx(raw_error_shifted(x, amax), rel=0.03)


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_as_good_as_brute_force_on_a_shifted_grid(name: str) -> None:
    x = np.maximum(samples(name)[:50_000], 0)
    found = choose(Statistics({"x": counted(x)}, samples=1), "mse", 0, {"x"})["x"]
    candidates = x.max() * np.linspace(0.05, 1.0, 200)
    assert raw_error_shifted(x, found.amax) <= 1.02 * min(raw_error_shifted(x, amax) for amax in candidates)
    assert found.scale == float(np.float32(found.amax / 255))
    assert found.shift == 128 * found.scale == float(np.float32(found.shift))
    power = float((x.astype(np.float64) ** 2).sum())
    assert found.sqnr_db == pytest.approx(10 * np.log10(power / raw_error_shifted(x, found.amax)), abs=0.15)
    # half the step is a quarter of the noise; a wider range takes some of that back
    symmetric = choose(Statistics({"x": counted(x)}, samples=1), "mse", 0)["x"]
    assert symmetric.shift == 0.0
    assert 0.2 < raw_error_shifted(x, found.amax) / raw_error(x, symmetric.amax) < 0.4


@pytest.mark.parametrize("method", METHODS)
def test_only_what_was_never_negative_is_shifted(method: str) -> None:
    positive, negative = np.abs(samples("normal")), samples("normal")
    barely = np.append(positive, np.float32(-1e-6))
    zero = np.zeros(9)
    given = {"a": positive, "b": negative, "c": barely, "d": zero, "e": positive}
    found = choose(Statistics({name: counted(x) for name, x in given.items()}, 1), method, 99.9, {"a", "b", "c", "d"})
    assert {name: value.shift > 0 for name, value in found.items()} == {
        "a": True, "b": False, "c": False, "d": False, "e": False,
    }  # fmt: skip
    assert found["b"].scale == float(np.float32(found["b"].amax / 127))
    assert found["d"].scale == 1.0
    assert found["e"] == choose(Statistics({"e": counted(positive)}, 1), method, 99.9)["e"]


def test_the_table_is_in_order_of_name_and_refuses_what_it_cannot_know() -> None:
    one = counted(np.ones(3))
    assert list(choose(Statistics({"b": one, "a": one}, samples=1), "mse", 99.9)) == ["a", "b"]
    with pytest.raises(CalibrationError, match="minmax, percentile, entropy, mse"):
        choose(Statistics({"a": one}, samples=1), "best", 99.9)
    with pytest.raises(CalibrationError, match="'b'"):
        choose(Statistics({"a": one, "b": TensorStatistics()}, samples=1), "mse", 99.9)
