"""Which classes lost accuracy: one test per class, and a correction because there are many."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from edgeres.artifacts import ClassChange
from edgeres.validation.statistics import binomial_tail

SIGNIFICANT = 0.05


def class_changes(
    labels: np.ndarray, reference: np.ndarray, engine: np.ndarray, names: Sequence[str] = ()
) -> Tuple[ClassChange, ...]:
    """Return every class in which the two are right on different samples, the surest loss first.

    A class ``fell`` where its loss is beyond chance although so many classes were looked at: one exact test for each
    class of the samples, corrected so that the chance of one false alarm among them all is at most 5 %.

    Args:
        labels: integers ``(N,)``, 0…K-1.
        reference: bool ``(N,)``, where the reference is right; ``engine`` likewise.
        names: of the classes, K of them; empty where there are none.

    Source: exact McNemar test, one-sided (Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91);
    Holm 1979, Scandinavian Journal of Statistics 6:65-70, for the correction.
    """
    count = int(labels.max()) + 1
    samples = np.bincount(labels, minlength=count)
    b = np.bincount(labels[reference & ~engine], minlength=count)
    c = np.bincount(labels[engine & ~reference], minlength=count)
    present = np.flatnonzero(samples)
    chances = [binomial_tail(int(b[label]), int(b[label] + c[label])) for label in present]
    found: List[ClassChange] = []
    for label, chance in zip(present.tolist(), holm(chances)):
        if b[label] + c[label]:
            found.append(
                ClassChange(
                    label=label,
                    name=names[label] if label < len(names) else "",
                    samples=int(samples[label]),
                    only_reference_correct=int(b[label]),
                    only_engine_correct=int(c[label]),
                    drop_pp=100 * int(b[label] - c[label]) / int(samples[label]),
                    p_adjusted=chance,
                    fell=chance < SIGNIFICANT,
                )
            )
    return tuple(sorted(found, key=lambda change: (change.p_adjusted, -change.drop_pp, change.label)))


def holm(chances: Sequence[float]) -> List[float]:
    """Return p-values corrected for their number, in their own order.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    order = sorted(range(len(chances)), key=chances.__getitem__)
    corrected, least = [0.0] * len(chances), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(chances) - place) * chances[index]))
        corrected[index] = least
    return corrected
