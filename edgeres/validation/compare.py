"""Compare an engine's logits with the FP32 reference's."""

from __future__ import annotations

import math
from typing import Optional, Sequence, Tuple

import msgspec
import numpy as np

from edgeres.artifacts import Attribution, Change, Confidence, Report
from edgeres.errors import BackendError, ModelError, RecipeError, SampleError
from edgeres.validation.baseline import packed
from edgeres.validation.classes import class_changes
from edgeres.validation.confidence import Sureness, chunks, sureness
from edgeres.validation.paired import firsts, paired_change
from edgeres.validation.statistics import wilson_interval

POLICIES = ("ci", "point")


def compare(
    reference: np.ndarray,
    engine: np.ndarray,
    labels: Optional[np.ndarray],
    *,
    max_drop_pp: float,
    policy: str = "ci",
    backend: str,
    precision: str,
    samples_source: str = "validation",
    classes: Sequence[str] = (),
    sha256: Sequence[str] = (),
) -> Report:
    """Return the comparison of two networks' answers to the same samples, and its verdict.

    The verdict is that of :func:`edgeres.validation.paired.paired_change`; without labels it is ``unlabelled``, and
    where the reference is right on fewer samples than by guessing it is ``inconclusive`` under every policy: the labels
    are not in the model's order, and nothing can be lost of next to nothing. Where it is right no more often than by
    guessing the verdict stays, and ``chance`` says so: it is one on a network that was not trained.

    Args:
        reference: float (N, K), the FP32 model's logits.
        engine: float (N, K), the engine's.
        labels: integers (N,), 0…K-1, or None.
        max_drop_pp: the budget, percentage points of top-1.
        classes: their K names, where they have any.
        sha256: the samples' N hashes, by which exact repeats are found; none where they are not known.

    Raises:
        RecipeError: the budget or the policy is none.
        ModelError: the reference is not (N, K) finite numbers.
        BackendError: the engine's logits are not finite, or of another shape than the reference's.
        SampleError: there are no samples, or labels do not fit them.
    """
    check_rules(max_drop_pp, policy)
    reference, engine = np.asarray(reference), np.asarray(engine)
    labels = None if labels is None else np.asarray(labels)
    _check_logits(reference, engine)
    if labels is not None:
        _check_labels(labels, *reference.shape)
    # argmax takes the first of equal logits, in both alike.
    top_reference, top_engine = reference.argmax(axis=1), engine.argmax(axis=1)
    sure_reference, sure_engine = sureness(reference, labels), sureness(engine, labels)
    report = Report(
        samples=len(reference),
        agreement=float(np.mean(top_reference == top_engine)),
        sqnr_db=_sqnr_db(reference, engine),
        max_drop_pp=float(max_drop_pp),
        verdict="unlabelled",
        backend=backend,
        precision=precision,
        policy=policy,
        samples_source=samples_source,
        top5_reference=sure_reference.top5,
        top5_engine=sure_engine.top5,
        confidence=_confidence(sure_reference, sure_engine),
        answers=packed(top_engine),
    )
    if labels is None:
        return report
    right_reference, right_engine = top_reference == labels, top_engine == labels
    changes = class_changes(labels, right_reference, right_engine, classes)
    first = firsts(sha256, labels) if len(sha256) else None
    report = _judged(report, right_reference, right_engine, first)
    if first is not None:
        right_reference = right_reference[first]
    # Beyond chance: the whole 95 % interval after Wilson 1927 lies below one of K, or above it.
    chance = 1 / reference.shape[1]
    lower, upper = wilson_interval(int(np.sum(right_reference)), len(right_reference))
    if upper < chance:
        report = msgspec.structs.replace(report, verdict="inconclusive", samples_to_decide=None, below_chance=True)
    elif lower <= chance < 1:
        report = msgspec.structs.replace(report, chance=chance)
    return msgspec.structs.replace(report, classes=changes)


def attribute_drop(
    reference: np.ndarray, meaning: np.ndarray, engine: np.ndarray, labels: Optional[np.ndarray]
) -> Attribution:
    """Return the two steps from the FP32 model's answers to an engine's, which :func:`compare` has accepted.

    Args:
        reference: float (N, K), the FP32 model's logits.
        meaning: float (N, K), those of the quantized model, computed exactly as its file says.
        engine: float (N, K), the engine's.
        labels: integers (N,), 0…K-1, or None.

    Raises:
        BackendError: ``meaning`` is not finite, or of another shape than the others.
    """
    reference, meaning, engine = np.asarray(reference), np.asarray(meaning), np.asarray(engine)
    _check_logits(reference, meaning)
    return Attribution(_change(reference, meaning, labels), _change(meaning, engine, labels))


def _change(before: np.ndarray, after: np.ndarray, labels: Optional[np.ndarray]) -> Change:
    first, second = before.argmax(axis=1), after.argmax(axis=1)
    drop = None
    if labels is not None:
        drop = 100 * (int(np.sum(first == labels)) - int(np.sum(second == labels))) / len(labels)
    return Change(float(np.mean(first == second)), _sqnr_db(before, after), drop)


def _judged(report: Report, reference: np.ndarray, engine: np.ndarray, first: Optional[np.ndarray]) -> Report:
    """Return the report with accuracies and verdict, from which answers of the two are right, bool (N,)."""
    change = paired_change(reference, engine, report.max_drop_pp, report.policy, first)
    return msgspec.structs.replace(
        report,
        verdict=change.verdict,
        top1_reference=int(np.sum(reference)) / report.samples,
        top1_engine=int(np.sum(engine)) / report.samples,
        drop_pp=change.drop_pp,
        drop_ci95_pp=change.interval_pp,
        discordant=change.discordant,
        mcnemar_p=change.mcnemar_p,
        samples_to_decide=change.samples_to_decide,
        different=None if first is None else int(np.sum(first)),
    )


def _confidence(reference: Sureness, engine: Sureness) -> Confidence:
    shift = engine.confidence - reference.confidence
    return Confidence(
        100 * float(shift.mean()), 100 * float(shift[np.abs(shift).argmax()]), reference.error, engine.error
    )


def _sqnr_db(reference: np.ndarray, engine: np.ndarray) -> Optional[float]:
    """Return signal over noise of all logits, in decibels; None where the noise, or the signal, is nothing."""
    signal = noise = 0.0
    for rows in chunks(reference):
        wide = reference[rows].astype(np.float64)
        signal += float(np.vdot(wide, wide))
        wide -= engine[rows]
        noise += float(np.vdot(wide, wide))
    if signal == 0.0 or noise == 0.0:
        return None
    return 10.0 * math.log10(signal / noise)


def check_rules(max_drop: object, policy: object) -> None:
    """Refuse what is no budget, or no policy; None is what somebody else chooses.

    Raises:
        RecipeError: with both.
    """
    problems = []
    if max_drop is not None and not _is_points(max_drop):
        problems.append(f"max_drop: {max_drop!r} is not a number between 0 and 100 percentage points")
    if policy is not None and policy not in POLICIES:
        problems.append(f"policy: {policy!r} is not one of {', '.join(POLICIES)}")
    if problems:
        raise RecipeError("validation", problems)


def _is_points(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return bool(0 <= value <= 100)


def _check_logits(reference: np.ndarray, engine: np.ndarray) -> None:
    if reference.ndim != 2 or reference.shape[1] == 0 or not np.issubdtype(reference.dtype, np.floating):
        raise ModelError(
            f"the reference's logits are {reference.dtype} {reference.shape}: a classifier answers float (N, K)."
        )
    if len(reference) == 0:
        raise SampleError("there are no samples to compare on. Name some: --validation FOLDER")
    if engine.shape != reference.shape or not np.issubdtype(engine.dtype, np.floating):
        raise BackendError(
            f"the engine answered {engine.dtype} {engine.shape} where the reference answered {reference.dtype} "
            f"{reference.shape}. Run both on the same samples, and compile the engine from this model."
        )
    strange = _first_not_finite(reference)
    if strange is not None:
        raise ModelError(
            f"the reference's logits of {strange[0]} samples are not finite, the first of them sample {strange[1]}. "
            "The FP32 model itself is broken on it: check its weights and the preprocessing."
        )
    strange = _first_not_finite(engine)
    if strange is not None:
        raise BackendError(
            f"the engine's logits of {strange[0]} samples are not finite, the first of them sample {strange[1]}. "
            "Its precision overflows where FP32 does not: keep the layers with the largest activations in float."
        )


def _first_not_finite(logits: np.ndarray) -> Optional[Tuple[int, int]]:
    """Return how many rows hold NaN or infinity, and the first of them; None where all are finite."""
    good = np.concatenate([np.isfinite(logits[rows]).all(axis=1) for rows in chunks(logits)])
    return None if good.all() else (int(np.sum(~good)), int(np.argmin(good)))


def _check_labels(labels: np.ndarray, count: int, classes: int) -> None:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise SampleError(
            f"labels are {labels.dtype} {labels.shape} for {count} samples. Give one integer to each, shape ({count},)."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise SampleError(
            f"{len(wrong)} labels are none of the model's {classes} classes (0 to {classes - 1}), the first of them "
            f"labels[{wrong[0]}] = {labels[wrong[0]]}. Give labels of the same classes, in the model's order."
        )
