"""Whether calibration samples show every class, and in the shares in which the validation samples have them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Dict, List, Optional, Sequence, Tuple

from edgeres.artifacts import Finding
from edgeres.samples.collection import Samples

OUT_OF_BALANCE = 0.25  # of the calibration samples that would have to be of another class, beyond what chance explains
SHOWN = 5  # names in a message
NAMED = 20  # names in a finding


def class_findings(calibration: Samples, validation: Optional[Samples]) -> List[Finding]:
    """Return findings on classes that calibration samples lack, or have far more or less of than validation samples.

    A sample's class is its label, or the name of the folder that it lies in where validation has classes of such names
    (without labelled validation samples: where all samples lie one folder deep). Where neither is known, nothing is.
    """
    wanted = _labels(validation) if validation is not None else None
    known = sorted(set(wanted)) if wanted is not None else None
    own, whole = (_classes(samples, validation, known) for samples in (calibration, calibration.whole()))
    if own is None or whole is None:
        return []
    if wanted is None:
        even = sorted(set(whole))
        return _balance(Counter(own), Counter(even), None) if len(even) > 1 else []
    absent = _absent(own, whole, wanted)
    shares = Counter(name for name in wanted if name not in absent)
    balance = _balance(Counter(own), shares, sum(shares.values())) if shares else []
    return [*_missing(absent, len(set(wanted))), *balance]


def _labels(samples: Samples) -> Optional[List[str]]:
    """Return each sample's class, by its folder's name if it has one and else by its number."""
    if samples.labels is None:
        return None
    if samples.classes is None:
        return [str(label) for label in samples.labels.tolist()]
    return [samples.classes[label] for label in samples.labels.tolist()]


def _classes(samples: Samples, validation: Optional[Samples], known: Optional[Sequence[str]]) -> Optional[List[str]]:
    """Return the class of each calibration sample in the words of the validation samples; None: they have none."""
    if samples.labels is not None:
        names = samples.classes or (validation.classes if validation is not None else None)
        labels: List[int] = samples.labels.tolist()
        return [names[label] if names is not None and label < len(names) else str(label) for label in labels]
    parts = [name.split("/") for name in samples.names]
    if known is None:
        return [part[0] for part in parts] if all(len(part) == 2 for part in parts) else None
    folders = [part[-2] if len(part) > 1 else "" for part in parts]
    found = set(folders)
    return folders if len(found & set(known)) * 2 > len(found) else None


def _absent(own: Sequence[str], whole: Sequence[str], wanted: Sequence[str]) -> List[str]:
    """Return the classes of which there is no sample at all, or none taken where five were to be expected."""
    there, taken = set(whole), set(own)
    expected = {name: count * len(own) / len(wanted) for name, count in Counter(wanted).items()}
    return [name for name in sorted(expected) if name not in (there if expected[name] < 5 else taken)]


def _missing(absent: Sequence[str], classes: int) -> List[Finding]:
    if not absent:
        return []
    more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
    text = (
        f"calibration has no sample of {len(absent)} of the {classes} classes that are validated "
        f"({', '.join(absent[:SHOWN])}{more}): what only they show is not in the ranges. Add images of them"
    )
    return [Finding("missing classes", "warning", text, len(absent), tuple(absent[:NAMED]))]


def _balance(own: Dict[str, int], wanted: Dict[str, int], validation: Optional[int]) -> List[Finding]:
    """Return a finding where the shares of the classes are far from those wanted."""
    distance, chance = imbalance(own, wanted, validation)
    limit = OUT_OF_BALANCE if validation is not None else 0.5 * (1 - 1 / len(wanted))
    if distance - chance < limit:
        return []
    count, total = sum(own.values()), sum(wanted.values())
    names = sorted({*own, *wanted}, key=lambda name: (wanted.get(name, 0) / total - own.get(name, 0) / count, name))
    examples = [
        f"{name} {100 * own.get(name, 0) / count:.0f} % instead of {100 * wanted.get(name, 0) / total:.0f} %"
        for name in (*names[:2], names[-1])
    ]
    whose = "validation's" if validation is not None else "even"
    text = (
        f"calibration's classes are out of balance ({', '.join(dict.fromkeys(examples))}): {100 * distance:.0f} % of "
        f"the {count} samples would have to be of another class to have {whose} shares. Take as many of each"
        f"{' as validation has' if validation is not None else ''}"
    )
    return [Finding("class shares", "warning", text, round(distance * count), tuple(names[:2]))]


def imbalance(own: Dict[str, int], wanted: Dict[str, int], validation: Optional[int]) -> Tuple[float, float]:
    """Return the total variation distance of two sets of class shares, and what chance alone gives to so few samples.

    Args:
        own, wanted: how many samples there are of each class.
        validation: how many samples the wanted shares were counted on; None where they are exact.

    Chance: the mean of |x| of a normal x is √(2/π) of its standard deviation, here that of the two shares' difference.
    """
    count, total = sum(own.values()), sum(wanted.values())
    names = {*own, *wanted}
    distance = sum(abs(own.get(name, 0) / count - wanted.get(name, 0) / total) for name in names) / 2
    both = 1 / count + (1 / validation if validation else 0)
    shares = [wanted.get(name, 0) / total for name in names]
    chance = sum(math.sqrt(2 / math.pi * share * (1 - share) * both) for share in shares) / 2
    return distance, min(1.0, chance)
