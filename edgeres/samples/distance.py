"""How far two sets of images are from looking alike, by how much of each, and in words."""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np

from edgeres.artifacts import Comparison
from edgeres.samples.appearance import STATISTICS, STEP, coloured

FAR = 0.25
"""From this distance on, sets of images are said to differ: at least a quarter of either would have to be exchanged.

For a statistic that is normal in both it is a shift by 0.64 standard deviations, more than what Cohen calls medium
(0.5; Statistical Power Analysis, 1988, section 2.2). Measured, the largest of all statistics: CIFAR-10's calibration
images against its validation images 0.07, lossless or JPEG; against ImageNet's photographs 0.12. Against validation
images that were inverted, or had red and blue exchanged, 0.40; darkened to 0.7 of their brightness 0.52; blurred by one
pixel 0.80.
"""
LEAST = {"sharpness": 0.05, "red-blue": 0.01, "green-magenta": 0.01}
LEAST_LEVEL = 0.02
"""What a quartile has to differ by: five of 255 steps. Under a fixed camera and lamp images are so alike that the least
drift is a large distance, and means nothing to a network."""
CHANCE = 1e-3  # that one statistic at all of two like sets lies beyond what is called chance
QUARTERS = (0.25, 0.5, 0.75)
SHIFT = 0.35  # of the middle halves' width: a smaller shift of the median is none, and it is the spread that differs
HIGHER = {
    "brightness": ("brighter", "darker", "mean"),
    "contrast": ("of more contrast", "of less contrast", "standard deviation"),
    "sharpness": ("sharper", "softer, as if blurred or enlarged", "detail"),
    "colour": ("more colourful", "less colourful", "colour"),
    "red-blue": ("redder", "bluer", "red minus blue"),
    "green-magenta": ("greener", "more magenta", "green minus magenta"),
}
"""What is said where the validation images have more of a statistic, or less, and what its values are called."""


RELATIVE = ("red-blue", "green-magenta", "colour")  # what exposure does not change


class Twist(NamedTuple):
    """One mistake that may have been made with all the images of a set.

    ``undone`` is what undoing it does to the channels' means (N, 3); ``judged`` are the statistics that it explains.
    """

    text: str
    undone: Callable[[np.ndarray], np.ndarray]
    judged: Tuple[str, ...]


TWISTS = (
    Twist(
        "Red and blue seem to be swapped in one of the two sets: exchanged in the calibration images, the colours "
        "agree (distance {after:.2f} instead of {before:.2f}). OpenCV's frames are BGR, and edgeres takes RGB",
        lambda levels: levels[:, ::-1],
        RELATIVE,
    ),
    Twist(
        "One of the two sets seems to be inverted, as negatives are: with the calibration images inverted, the colours "
        "agree (distance {after:.2f} instead of {before:.2f})",
        lambda levels: 1 - levels,
        (*RELATIVE, "brightness", "red", "green", "blue"),
    ),
)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """Return the largest difference of two samples' distribution functions, 0 to 1: the statistic of Kolmogorov and
    Smirnov. At least so large a share of either sample lies where the other has nothing to match it.

    Args:
        left, right: float64 (N,) and (M,).

    Source: Smirnov, "Table for Estimating the Goodness of Fit of Empirical Distributions", Annals of Mathematical
        Statistics 19 (2), 1948.
    """
    values = np.concatenate([left, right])
    shares = [np.searchsorted(np.sort(side), values, "right") / len(side) for side in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())


def chance_distance(left: int, right: int, tests: int = len(STATISTICS)) -> float:
    """Return the distance that so many samples of one distribution exceed in any of so many tests, once in 1,000 times.

    Source: Smirnov 1948, the first term of the limiting distribution, P(D > d) = 2 exp(−2 d² nm / (n + m)); with
        Bonferroni's correction for several tests.
    """
    return min(1.0, math.sqrt(-math.log(CHANCE / tests / 2) / 2 * (1 / left + 1 / right)))


def compare(calibration: np.ndarray, validation: np.ndarray) -> Tuple[Comparison, ...]:
    """Return the comparison of each of ``STATISTICS``, float64 (N, S) and (M, S)."""
    chance = chance_distance(len(calibration), len(validation))
    found = []
    for column, name in enumerate(STATISTICS):
        own, other = calibration[:, column], validation[:, column]
        apart = distance(own, other)
        moved = np.abs(np.quantile(own, QUARTERS) - np.quantile(other, QUARTERS)).max()
        far = apart >= max(FAR, chance) and moved >= LEAST.get(name, LEAST_LEVEL)
        found.append(Comparison(name, float(np.median(own)), float(np.median(other)), apart, chance, bool(far)))
    return tuple(found)


def differences(calibration: np.ndarray, validation: np.ndarray, far: Dict[str, Comparison]) -> List[str]:
    """Return in words in which respects validation images differ, the plainest first.

    Args:
        calibration, validation: float64 (N, S) and (M, S), a column for each of ``STATISTICS``.
        far: the statistics that differ, by name; those that others explain are not spoken of.
    """
    spoken = [name for name in HIGHER if name in far]
    if not {"brightness", "red-blue", "green-magenta"} & far.keys():
        spoken += [name for name in ("red", "green", "blue") if name in far]
    if "contrast" not in far:
        spoken += [name for name in far if name.endswith(" contrast")]
    words = []
    for name in spoken:
        column = STATISTICS.index(name)
        text = _shift(far[name], calibration[:, column], validation[:, column])
        if text is None and not ("colour" in far and name in RELATIVE):  # greyer images vary less in each colour
            text = _spread(name, calibration[:, column], validation[:, column])
        words += [text] if text is not None else []
    return words


def _quarters(values: np.ndarray) -> Tuple[float, float]:
    low, _, high = np.quantile(values, QUARTERS)
    return float(low), float(high)


def _shift(one: Comparison, calibration: np.ndarray, validation: np.ndarray) -> Optional[str]:
    """Return in words by how much the median of a statistic (N,) is higher or lower; None: it is where it was."""
    width = max(high - low for low, high in map(_quarters, (calibration, validation)))
    if abs(one.validation - one.calibration) < SHIFT * width:
        return None
    name = one.statistic
    more, less, what = HIGHER.get(name, (f"of more {name}", f"of less {name}", name))
    change = more if one.validation > one.calibration else less
    return f"{change}: {what} {_number(one.validation)} against {_number(one.calibration)}"


def _spread(name: str, calibration: np.ndarray, validation: np.ndarray) -> str:
    """Return in words by how much a statistic (N,) is spread more or less."""
    (own_low, own_high), (low, high) = map(_quarters, (calibration, validation))
    change = "more" if high - low > own_high - own_low else "less"
    return (
        f"{change} varied in {name}: half of them from {_number(low)} to {_number(high)} against "
        f"{_number(own_low)} to {_number(own_high)}"
    )


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus in front of a zero


def twisted(calibration: np.ndarray, validation: np.ndarray, far: Iterable[str]) -> Optional[str]:
    """Return in a sentence which mistake explains that colours differ: swapped channels, or negatives; else None.

    A mistake explains it where undoing it takes the statistics that it concerns from far to near, to half the distance
    or less; of two, the one that leaves the smaller distance in all. ``far`` are
    the statistics that differ by enough to need an explanation.
    """
    column = {name: place for place, name in enumerate(STATISTICS)}
    levels = calibration[:, [column[name] for name in ("red", "green", "blue")]]
    chroma = calibration[:, column["colour"]] * (calibration[:, column["brightness"]] + STEP)
    limit = max(FAR, chance_distance(len(calibration), len(validation)))

    def distances(levels: np.ndarray) -> Dict[str, float]:
        made = coloured(levels, chroma)
        return {name: distance(values, validation[:, column[name]]) for name, values in made.items()}

    found: List[Tuple[float, str]] = []
    as_they_are = distances(levels)
    for twist in TWISTS:
        undone = distances(twist.undone(levels))
        before, after = (max(one[name] for name in twist.judged) for one in (as_they_are, undone))
        if {*far} & {*twist.judged} and before >= limit > after and after <= before / 2:
            found.append((max(undone.values()), twist.text.format(before=before, after=after)))
    return min(found)[1] if found else None
