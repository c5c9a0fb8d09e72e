"""Statistics of paired right-or-wrong answers.

Both networks answer the same samples, so what the samples have in common cancels: only the discordant ones tell. ``b``
counts those that only the reference gets right, ``c`` those that only the engine gets right, ``n`` all samples; the
accuracy drop is (b - c) / n, a share.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Optional, Tuple

MOST_SAMPLES = 10**8


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact p-value of "both are right equally often"; 1.0 where nothing is discordant.

    Source: McNemar 1947, Psychometrika 12:153-157, in its exact conditional form: twice the smaller binomial tail, at
    most 1 (Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91).
    """
    return min(1.0, 2.0 * binomial_tail(max(b, c), b + c))


def binomial_tail(successes: int, total: int) -> float:
    """Return the chance of at least so many heads in ``total`` throws of a fair coin.

    One-sided, this is the exact McNemar test: ``successes`` of ``total`` discordant samples on one side.
    """
    if 2 * successes < total:
        return 1.0 - binomial_tail(total - successes + 1, total)
    # Integers are exact up to the one division; the tail's other terms follow from its largest, each below the last.
    term = math.comb(total, successes) / 2**total
    tail = 0.0
    for heads in range(successes, total + 1):
        tail += term
        term *= (total - heads) / (heads + 1)
        if term < tail * 1e-18:
            break
    return min(1.0, tail)


def paired_difference_interval(b: float, c: float, n: float, confidence: float = 0.95) -> Tuple[float, float]:
    """Return the score interval of the accuracy drop (b - c) / n, a share in -1…1.

    It holds its level with few discordant samples and with none, where simpler intervals collapse to a point. Counts
    need not be whole: expected counts give the interval to expect.

    Args:
        confidence: the share of experiments whose interval covers the truth, between 0 and 1.

    Source: Tango 1998, Statistics in Medicine 17:891-908, section 4.
    """
    z = _quantile(confidence)
    drop = (b - c) / n
    # The statistic falls as the hypothesis rises, so each limit is the one crossing on its side of the estimate.
    lower = _crossing(b, c, n, -1.0, drop, z)
    upper = _crossing(b, c, n, drop, 1.0, -z)
    return lower, upper


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Tuple[float, float]:
    """Return the score interval of a share, of which ``successes`` of ``n`` were observed, both limits in 0…1.

    Source: Wilson 1927, Journal of the American Statistical Association 22:209-212.
    """
    z = _quantile(confidence)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the limit is the end itself, which rounding would miss.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def samples_to_decide(b: float, c: float, n: float, budget: float, confidence: float = 0.95) -> Optional[int]:
    """Return the smallest number of samples whose interval would lie wholly on one side of ``budget``.

    It supposes that the discordant rates stay as observed. None where no number would, because the observed drop is
    the budget itself, or only one beyond any validation set (10**8).

    Args:
        budget: the allowed accuracy drop, a share.
    """
    # At fixed rates the statistic grows with the square root of n, so that the answer has a closed form.
    score = score_statistic(b / n, c / n, 1.0, budget)
    if score == 0.0:
        return None
    z = _quantile(confidence)
    needed = (z / score) ** 2
    if needed >= MOST_SAMPLES:
        return None
    return math.floor(needed) + 1


def score_statistic(b: float, c: float, n: float, difference: float) -> float:
    """Return Tango's score statistic of the hypothesis that the accuracy drop is ``difference``.

    It is standard normal where the hypothesis holds, and falls as ``difference`` rises.

    Source: Tango 1998, Statistics in Medicine 17:891-908, equations for the restricted maximum likelihood estimate of
    the smaller cell (the larger root of a quadratic) and for the statistic.
    """
    excess = (b - c) - n * difference
    linear = (2.0 * n - b + c) * difference - b - c
    constant = -c * difference * (1.0 - difference)
    # Rounding may push what is a square, or a probability, a hair below 0.
    root = math.sqrt(max(0.0, linear * linear - 8.0 * n * constant))
    only_engine = _larger_root(2.0 * n, linear, constant, root)
    variance = n * (2.0 * only_engine + difference * (1.0 - difference))
    if variance > 0.0:
        return excess / math.sqrt(variance)
    # Without variance the hypothesis allows one outcome only: it is met, or contradicted outright.
    return 0.0 if excess == 0.0 else math.copysign(math.inf, excess)


def _larger_root(square: float, linear: float, constant: float, root: float) -> float:
    """Return the larger root of a quadratic, at least 0, in the form that does not cancel."""
    if linear <= 0.0:
        return (root - linear) / (2.0 * square)
    return max(0.0, -2.0 * constant / (root + linear))


def _crossing(b: float, c: float, n: float, low: float, high: float, level: float) -> float:
    """Return where the falling statistic passes ``level`` in [low, high], to the last bit that floats can tell."""
    for _ in range(200):
        middle = low + (high - low) / 2.0
        if not low < middle < high:
            break
        if score_statistic(b, c, n, middle) > level:
            low = middle
        else:
            high = middle
    return low if level > 0.0 else high


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)
