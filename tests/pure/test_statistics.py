"""The statistics of paired answers, against scipy, a brute-force solution, a published value and a simulation."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Optional, Tuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeres.validation.statistics import (
    mcnemar_exact,
    paired_difference_interval,
    samples_to_decide,
    score_statistic,
    wilson_interval,
)

Z95 = 1.959963984540054


@st.composite
def tables(draw: st.DrawFn, largest: int = 400) -> Tuple[int, int, int]:
    """Return (b, c, n): any split of up to ``largest`` samples, the discordant ones often few or all."""
    n = draw(st.integers(1, largest))
    discordant = draw(st.one_of(st.integers(0, min(n, 12)), st.integers(0, n), st.just(n)))
    b = draw(st.integers(0, discordant))
    return b, discordant - b, n


@settings(max_examples=200)
@given(b=st.integers(0, 300), c=st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = 1.0 if b + c == 0 else stats.binomtest(b, b + c, 0.5).pvalue
    assert mcnemar_exact(b, c) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_with_many_discordant_samples() -> None:
    stats = pytest.importorskip("scipy.stats")
    for b, c in [(25_000, 24_600), (3_000, 0), (10_000, 10_000)]:
        assert mcnemar_exact(b, c) == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-9, abs=1e-300)


def test_mcnemar_by_hand() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 5) == mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(1, 7) == 2 * (1 + 8) / 256


@settings(max_examples=200)
@given(n=st.integers(1, 100_000), share=st.floats(0, 1), confidence=st.sampled_from([0.95, 0.5, 0.99]))
def test_the_interval_of_a_share_is_scipys(n: int, share: float, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    successes = round(n * share)
    wanted = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((wanted.low, wanted.high), rel=1e-9, abs=1e-12)


def brute_force_statistic(b: int, c: int, n: int, difference: float) -> float:
    """Return the score statistic with the likelihood maximised numerically, from its definition."""
    optimize = pytest.importorskip("scipy.optimize")
    special = pytest.importorskip("scipy.special")
    low, high = max(0.0, -difference), (1.0 - difference) / 2.0

    def loss(only_engine: float) -> float:
        only_reference = only_engine + difference
        same = max(0.0, 1.0 - only_engine - only_reference)
        terms = [(b, max(0.0, only_reference)), (c, only_engine), (n - b - c, same)]
        return -float(sum(special.xlogy(count, share) for count, share in terms))

    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13})
    only_engine = min([found.x, low, high], key=loss)
    variance = (2 * only_engine + difference - difference**2) / n
    # The likelihood of what the hypothesis rules out is 0, and so is the variance.
    return ((b - c) / n - difference) / math.sqrt(max(variance, 1e-300))


@settings(max_examples=150)
@given(table=tables(), difference=st.floats(-0.98, 0.98))
def test_the_statistic_is_that_of_a_numerically_maximised_likelihood(
    table: Tuple[int, int, int], difference: float
) -> None:
    b, c, n = table
    # Nearer to 0 than this, the brute force loses its digits, not the closed form.
    assume(abs(difference) > 1e-3)
    wanted = brute_force_statistic(b, c, n, difference)
    assert score_statistic(b, c, n, difference) == pytest.approx(wanted, rel=2e-4, abs=1e-4)


@settings(max_examples=60)
@given(table=tables(120))
def test_the_interval_is_the_set_of_differences_that_brute_force_does_not_reject(table: Tuple[int, int, int]) -> None:
    b, c, n = table
    lower, upper = paired_difference_interval(b, c, n)
    for difference in np.linspace(-0.99, 0.99, 23):
        if min(abs(difference - lower), abs(difference - upper)) > 1e-4:
            rejected = abs(brute_force_statistic(b, c, n, float(difference))) > Z95
            assert rejected == (not lower <= difference <= upper)


@settings(max_examples=200)
@given(table=tables(100_000))
def test_limits_enclose_the_estimate_and_stay_in_range(table: Tuple[int, int, int]) -> None:
    b, c, n = table
    lower, upper = paired_difference_interval(b, c, n)
    assert -1.0 <= lower <= (b - c) / n <= upper <= 1.0
    assert lower < upper
    for limit, level in ((lower, Z95), (upper, -Z95)):
        if abs(limit) < 1.0:
            # A step of a few units in the last place around the limit passes the level.
            step = 1e-12
            above, below = (score_statistic(b, c, n, limit + side) for side in (-step, step))
            assert below <= level + 1e-6
            assert above >= level - 1e-6


@settings(max_examples=100)
@given(table=tables(5_000))
def test_swapping_the_two_negates_and_swaps_the_limits(table: Tuple[int, int, int]) -> None:
    b, c, n = table
    lower, upper = paired_difference_interval(b, c, n)
    assert paired_difference_interval(c, b, n) == pytest.approx((-upper, -lower), abs=1e-12)


@settings(max_examples=100)
@given(table=tables(500), factor=st.integers(2, 50))
def test_more_samples_at_the_same_rates_narrow_the_interval(table: Tuple[int, int, int], factor: int) -> None:
    b, c, n = table
    lower, upper = paired_difference_interval(b, c, n)
    finer_lower, finer_upper = paired_difference_interval(factor * b, factor * c, factor * n)
    assert lower <= finer_lower <= finer_upper <= upper
    assert finer_upper - finer_lower < upper - lower


@settings(max_examples=100)
@given(table=tables(500))
def test_more_confidence_widens_the_interval(table: Tuple[int, int, int]) -> None:
    b, c, n = table
    narrow, wide = paired_difference_interval(b, c, n, 0.8), paired_difference_interval(b, c, n, 0.99)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


@pytest.mark.parametrize("n", [1, 10, 423, 50_000])
def test_nothing_discordant_has_a_closed_form(n: int) -> None:
    # With b = c = 0 the statistic is -sqrt(n d / (1 - d)), whence d = z^2 / (n + z^2).
    wanted = Z95**2 / (n + Z95**2)
    assert paired_difference_interval(0, 0, n) == pytest.approx((-wanted, wanted), rel=1e-9)


@pytest.mark.parametrize("n", [1, 10, 1_000])
def test_everything_discordant_one_way_reaches_the_end(n: int) -> None:
    lower, upper = paired_difference_interval(n, 0, n)
    assert upper == 1.0
    assert -1.0 < lower < 1.0
    assert paired_difference_interval(0, n, n)[0] == -1.0


def test_a_published_interval() -> None:
    # Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009), 1 and 7 discordant of 21, as
    # Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850-2875) report Tango's interval.
    lower, upper = paired_difference_interval(1, 7, 21)
    assert (round(lower, 3), round(upper, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize(
    ("n", "only_reference", "only_engine"), [(200, 0.06, 0.04), (300, 0.03, 0.02), (500, 0.02, 0.02), (423, 0.10, 0.02)]
)
def test_coverage_in_a_simulation(n: int, only_reference: float, only_engine: float) -> None:
    rates = [only_reference, only_engine, 1 - only_reference - only_engine]
    experiments = np.random.default_rng(20_24).multinomial(n, rates, 2_000)
    interval = lru_cache(maxsize=None)(paired_difference_interval)
    covered = 0
    for b, c, _ in experiments.tolist():
        lower, upper = interval(b, c, n)
        covered += lower <= only_reference - only_engine <= upper
    assert 0.93 <= covered / len(experiments) <= 0.98


def decided(b: float, c: float, n: float, budget: float) -> bool:
    lower, upper = paired_difference_interval(b, c, n)
    return upper < budget or lower > budget


@settings(max_examples=150)
@given(table=tables(2_000), budget_pp=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.5, 10.0]))
def test_samples_to_decide_is_the_smallest(table: Tuple[int, int, int], budget_pp: float) -> None:
    b, c, n = table
    budget = budget_pp / 100
    needed = samples_to_decide(b, c, n, budget)
    if needed is None:
        assert abs((b - c) / n - budget) < 1e-3
        return
    assume(needed < 10**7)
    assert decided(b / n * needed, c / n * needed, needed, budget)
    if needed > 1:
        assert not decided(b / n * (needed - 1), c / n * (needed - 1), needed - 1, budget)


@pytest.mark.parametrize(
    ("b", "c", "n", "budget", "wanted"),
    [
        (0, 0, 100, 0.0, None),
        (3, 2, 200, 0.005, None),
        (3, 0, 1000, 0.3 / 100, None),
        # n > z^2 (1 - d) / d = 3.8415 x 199 = 764.45…
        (0, 0, 100, 0.005, 765),
        # Further off than any validation set reaches.
        (5_000_001, 0, 1_000_000_000, 0.005, None),
    ],
)
def test_samples_to_decide_by_hand(b: int, c: int, n: int, budget: float, wanted: Optional[int]) -> None:
    assert samples_to_decide(b, c, n, budget) == wanted
