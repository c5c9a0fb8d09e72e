"""What is wrong with a set of calibration samples, known before any time is spent on it.

Of each side at most 512 samples are looked at, spread evenly, each decoded once; only hashes of files are compared of
all. The result depends on nothing but the samples and the size of the network's input.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from edgeres.artifacts import Comparison, Finding, Hygiene
from edgeres.samples.appearance import STATISTICS, STEP, Appearance, Watch, look
from edgeres.samples.balance import class_findings
from edgeres.samples.collection import Samples
from edgeres.samples.distance import compare, differences, twisted
from edgeres.samples.likeness import SMALLEST_SIDE, Pair, alike, equal, perceptual_hash, spare

LOOKED_AT = 512  # samples of either side
CONFIDENCE = 0.95
COVERED = 0.95  # the least share of images whose extremes the samples should have shown
WORTH_SAYING = 0.01  # of the samples: fewer copies or flat images than this cannot move a range, and are only noted
CONSTANT = 2 * STEP  # standard deviation up to which an image is one colour and noise
FLAT = 0.02
"""Contrast under which an image shows nothing, of full scale: five of 255 steps. Of 4,447 images of CIFAR-10 and 250
photographs of ImageNet none has less than 0.03; half have less than 0.2."""
SHOWN = 3  # names in a message
NAMED = 20  # names in a finding
COPIES = ("duplicates", "near duplicates")


def examine(
    calibration: Samples,
    validation: Optional[Samples] = None,
    *,
    size: Optional[Tuple[int, int]] = None,
    resize: Optional[int] = None,
    watch: Watch = lambda done, total: None,
) -> Hygiene:
    """Return what is wrong with calibration samples, by themselves and against the validation samples.

    Args:
        size, resize: of the network's input, as in :class:`edgeres.artifacts.Preprocessing`; None where not yet known.
        watch: is told how many samples have been looked at, of how many.

    Raises:
        SampleError: a sample cannot be read.
    """
    own = calibration.subset(LOOKED_AT)
    other = validation.subset(LOOKED_AT) if validation is not None else None
    total = len(own) + (len(other) if other is not None else 0)
    seen = look(own, size, resize, lambda done, _: watch(done, total))
    findings = [*_flat(seen), *_copies(calibration, seen)]
    findings = [*_too_few(len(calibration) - sum(one.count for one in findings if one.kind in COPIES)), *findings]
    findings += class_findings(calibration, validation)
    if validation is None or other is None:
        return Hygiene(len(own), 0, tuple(findings))
    there = look(other, size, resize, lambda done, _: watch(len(own) + done, total))
    findings += _overlap(calibration, validation, seen, there)
    comparisons = compare(seen.statistics, there.statistics)
    findings += _unlike(seen, there, comparisons)
    return Hygiene(len(own), len(other), tuple(findings), comparisons)


def promised(count: int) -> float:
    """Return the share of all images that, with 95 % confidence, do not reach beyond the most extreme of ``count``.

    Source: Wilks, "Determination of Sample Sizes for Setting Tolerance Limits", Ann. Math. Statist. 12 (1), 1941: the
        largest of n independent values has a share p of the distribution below it with confidence 1 − pⁿ.
    """
    return float((1 - CONFIDENCE) ** (1 / count)) if count > 0 else 0.0


def needed(share: float) -> int:
    """Return how many images it takes to promise a share, by the same argument."""
    return int(np.ceil(np.log(1 - CONFIDENCE) / np.log(share)))


def _too_few(distinct: int) -> List[Finding]:
    if promised(distinct) >= COVERED:
        return []
    text = (
        f"{distinct} different calibration samples are too few: ranges are taken from the most extreme values in them, "
        f"and so many images promise, with 95 % confidence, only that {100 * promised(distinct):.0f} % of all images "
        f"stay within (Wilks 1941). {needed(COVERED)} promise {100 * COVERED:.0f} %, {needed(0.99)} promise 99 %. Add "
        "images, of many scenes rather than of one"
    )
    return [Finding("too few", "warning", text, distinct, ())]


def _flat(seen: Appearance) -> List[Finding]:
    """Return findings on images that are constant, but for noise, and on those of hardly any contrast."""
    contrast = seen.statistics[:, STATISTICS.index("contrast")]
    # The thumbnail of pure noise is flat, but its pixels are not; and two colours may be equally bright.
    flat = (contrast < FLAT) & (seen.spread < 2 * FLAT) & (seen.grain < 2 * FLAT)
    constant = np.flatnonzero(flat & (seen.spread < CONSTANT))
    pale = np.flatnonzero(flat & (seen.spread >= CONSTANT))
    findings: List[Finding] = []
    if len(constant):
        names = [seen.names[index] for index in constant]
        every = len(constant) == len(seen.names)
        what = f"all {len(constant)}" if every else f"{len(constant)} of {len(seen.names)}"
        so = "so the ranges will be of no use" if every else "and show the network nothing"
        text = (
            f"{what} calibration samples are constant, or nearly ({_some(names)}): each is one colour all over, {so}. "
            "Look for a covered lens, failed captures or an empty buffer, and take real images"
        )
        findings.append(_finding("constant", "warning", text, names))
    if len(pale):
        names = [seen.names[index] for index in pale]
        text = (
            f"{len(pale)} of {len(seen.names)} calibration samples have hardly any contrast ({_some(names)}): under "
            f"{100 * FLAT:.0f} % of full scale, which no ordinary photograph has. Look for fog, exposure or a wrong "
            "conversion to 8 bits"
        )
        findings.append(_finding("contrast", _severity(len(pale), len(seen.names)), text, names))
    return findings


def _copies(calibration: Samples, seen: Appearance) -> List[Finding]:
    """Return findings on samples that are exact or near copies of others in the set."""
    hashes = calibration.sha256()
    place = {name: index for index, name in enumerate(calibration.names)}
    looked = [place[name] for name in seen.names]
    exact = [(i, j) for j, i in equal(hashes, hashes) if i != j]
    exact += [(looked[i], looked[j]) for j, i in equal(seen.pixels, seen.pixels) if i != j]
    spares = spare(len(hashes), exact)
    near = [(looked[i], looked[j]) for i, j in _near(seen, seen) if i < j]
    copied = {item for _, item in spares}
    others = [pair for pair in spare(len(hashes), [*exact, *near]) if pair[1] not in copied]
    findings: List[Finding] = []
    if spares:
        text = (
            f"{len(spares)} of {len(hashes)} calibration samples are copies of others, pixel for pixel "
            f"({_pairs(spares, calibration.names)}): a copy shows nothing new. Remove the copies"
        )
        findings.append(_finding("duplicates", "warning", text, [calibration.names[j] for _, j in spares]))
    if others:
        text = (
            f"{len(others)} of {len(seen.names)} calibration samples look the same as others "
            f"({_pairs(others, calibration.names)}): re-encoded or resized copies, or neighbouring "
            "frames of a video. Keep one of each, and fill up with other scenes"
        )
        severity = _severity(len(others), len(seen.names))
        findings.append(_finding("near duplicates", severity, text, [calibration.names[j] for _, j in others]))
    return findings


def _near(left: Appearance, right: Appearance) -> List[Pair]:
    """Return the pairs of places whose images look the same; those that show too little for a hash are left out."""
    told = [np.flatnonzero((one.sides >= SMALLEST_SIDE) & (one.spread >= CONSTANT)) for one in (left, right)]
    pairs = alike(*(perceptual_hash(one.luma[places]) for one, places in zip((left, right), told)))
    return [(int(told[0][i]), int(told[1][j])) for i, j in pairs]


def _overlap(calibration: Samples, validation: Samples, seen: Appearance, there: Appearance) -> List[Finding]:
    """Return findings on calibration samples that are in the validation set too.

    A near copy is looked for among the samples that were looked at; an exact one among all.
    """
    exact: Dict[str, str] = {seen.names[i]: there.names[j] for i, j in equal(seen.pixels, there.pixels)}
    exact.update(
        (calibration.names[i], validation.names[j]) for i, j in equal(calibration.sha256(), validation.sha256())
    )
    near: Dict[str, str] = {}
    for i, j in _near(seen, there):
        if seen.names[i] not in exact:
            near.setdefault(seen.names[i], there.names[j])
    todo = "Take them out of one of the two sets"
    findings: List[Finding] = []
    if exact:
        text = (
            f"{len(exact)} of {len(calibration)} calibration samples are validation samples too ({_equations(exact)}): "
            f"the verdict is then partly on images that the ranges were fitted to, and looks better than it is. {todo}"
        )
        findings.append(_finding("overlap", "warning", text, list(exact)))
    if near:
        text = (
            f"{len(near)} of {len(seen.names)} calibration samples look the same as validation samples "
            f"({_equations(near)}; {len(there.names)} were looked at): the verdict is partly on images that the ranges "
            f"were fitted to. {todo}"
        )
        findings.append(_finding("near overlap", _severity(len(near), len(seen.names)), text, list(near)))
    return findings


def _unlike(seen: Appearance, there: Appearance, comparisons: Sequence[Comparison]) -> List[Finding]:
    """Return a finding where validation images look different from calibration images."""
    far = {one.statistic: one for one in comparisons if one.far}
    if not far:
        return []
    words = differences(seen.statistics, there.statistics, far)
    mistake = twisted(seen.statistics, there.statistics, far)
    one = max(far.values(), key=lambda one: one.distance)
    order = np.argsort(there.statistics[:, STATISTICS.index(one.statistic)], kind="stable")
    names = [there.names[index] for index in (order if one.validation < one.calibration else order[::-1])]
    todo = "Ranges found on the one need not fit the other: calibrate on images as the network will get them"
    text = (
        f"validation images ({len(names)} looked at, such as {', '.join(names[:SHOWN])}) do not look like the "
        f"{len(seen.names)} calibration images: they are {'; '.join(words) or 'of other colours'}. "
        f"{mistake + '. ' if mistake else ''}{todo}"
    )
    return [_finding("distribution", "warning", text, names)]


def _severity(count: int, total: int) -> str:
    return "warning" if count >= WORTH_SAYING * total else "note"


def _finding(kind: str, severity: str, text: str, names: Sequence[str]) -> Finding:
    return Finding(kind, severity, text, len(names), tuple(names[:NAMED]))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _pairs(pairs: Sequence[Pair], names: Sequence[str]) -> str:
    return _some([f"{names[copy]} = {names[first]}" for first, copy in pairs])


def _equations(same: Dict[str, str]) -> str:
    return _some([f"{name} = {other}" for name, other in same.items()])
