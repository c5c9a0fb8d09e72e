"""Two networks, the same labelled samples, one budget: how much accuracy is lost, and whether that is too much."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from edgeres.artifacts import Discordant
from edgeres.validation.statistics import mcnemar_exact, paired_difference_interval, samples_to_decide


class PairedChange(NamedTuple):
    """From one network to another, in percentage points of top-1; a loss is positive.

    ``samples_to_decide`` is about how many would, where so few cannot; None elsewhere, and where none would.
    """

    drop_pp: float
    interval_pp: Tuple[float, float]
    discordant: Discordant
    mcnemar_p: float
    verdict: str
    samples_to_decide: Optional[int]


def firsts(sha256: Sequence[str], labels: np.ndarray) -> Optional[np.ndarray]:
    """Return which samples are no exact repeats of earlier ones with the same label, bool ``(N,)``; None where all are
    different, or no hashes are told."""
    known: Set[Tuple[str, int]] = set()
    new = np.ones(len(labels), bool)
    for place, sample in enumerate(zip(map(str, sha256), labels.tolist())):
        new[place] = sample not in known
        known.add(sample)
    return None if new.all() else new


def paired_change(
    before: np.ndarray, after: np.ndarray, max_drop_pp: float, policy: str, first: Optional[np.ndarray] = None
) -> PairedChange:
    """Return the change from which answers of two networks are right, bool ``(N,)`` each.

    With the policy ``ci`` the verdict is ``pass`` where the whole 95 % interval of the drop lies under the budget,
    ``fail`` where it lies above, else ``inconclusive``; with ``point`` the drop itself decides. The interval supposes
    that the samples are independent, which repeats are not: with ``first``, of :func:`firsts`, nothing passes that
    would not pass by these alone.
    """
    change = _counted(before, after, max_drop_pp, policy)
    if first is None or change.verdict == "fail":
        return change
    once = _counted(before[first], after[first], max_drop_pp, policy)
    if once.verdict == "pass":
        return change
    return change._replace(verdict="inconclusive", samples_to_decide=once.samples_to_decide)


def _counted(before: np.ndarray, after: np.ndarray, max_drop_pp: float, policy: str) -> PairedChange:
    n = len(before)
    b, c = int(np.sum(before & ~after)), int(np.sum(after & ~before))
    # One division of whole numbers, so that 3 of 1000 are the very float that a budget of 0.3 is.
    drop = 100 * (b - c) / n
    lower, upper = (100.0 * limit for limit in paired_difference_interval(b, c, n))
    if policy == "point":
        verdict = "pass" if drop <= max_drop_pp else "fail"
    elif upper < max_drop_pp:
        verdict = "pass"
    else:
        verdict = "fail" if lower > max_drop_pp else "inconclusive"
    needed = samples_to_decide(b, c, n, max_drop_pp / 100.0) if verdict == "inconclusive" else None
    return PairedChange(drop, (lower, upper), Discordant(b, c), mcnemar_exact(b, c), verdict, needed)
