"""A report in plain words, for terminals, logs and pages."""

from __future__ import annotations

import shlex
from typing import List, Optional, Sequence, Union

from edgeres.artifacts import BaselineChange, Report
from edgeres.progress import counted, points
from edgeres.validation.latency import faster

# Right on fewer than this, the reference is hardly the model that its user means.
DOUBTFUL_TOP1 = 0.1
# Logits whose noise is this near to their size answer by chance.
DOUBTFUL_SQNR_DB = 5.0


def headline(report: Report) -> str:
    """Return the verdict in one sentence, with the numbers that it rests on."""
    precision = report.precision.upper()
    if report.drop_pp is None or report.drop_ci95_pp is None:
        return (
            f"{precision} gives the answer of FP32 on {100 * report.agreement:.2f} % of "
            f"{counted(report.samples, 'sample')}; without labels its accuracy cannot be judged."
        )
    lower, upper = report.drop_ci95_pp
    change = f"{precision} {_change(report.drop_pp)} (95 % interval of the loss {lower:.2f} to {upper:.2f})"
    return f"{change} against a budget of {points(report.max_drop_pp)}: {_verdict(report, report)}."


def baseline_headline(report: Report) -> str:
    """Return the verdict against the baseline in one sentence; empty where there is no baseline."""
    change = report.baseline
    if change is None:
        return ""
    lower, upper = change.drop_ci95_pp
    return (
        f"against the baseline it {_change(change.drop_pp)} (95 % interval of the loss {lower:.2f} to {upper:.2f}): "
        f"{_verdict(report, change)}."
    )


def decibels(value: Optional[float]) -> str:
    """Return an SQNR with its unit; where there is no noise there is none."""
    return "no noise" if value is None else f"{value:.1f} dB"


def advice(report: Report, worst: Sequence[str] = (), untried: str = "") -> List[str]:
    """Return what to do next, one sentence each; an empty list where there is nothing to be done.

    Args:
        worst: layers to keep in float, where it is known which.
        untried: the flag for which the build did not look for such layers itself.
    """
    steps = []
    if report.verdict == "unlabelled":
        steps.append(
            "Give validation samples with labels, one subfolder per class, to judge accuracy by: --validation FOLDER."
        )
    if report.verdict == "inconclusive" and not report.below_chance:
        steps.append(_more_samples(report, report))
    if report.samples_source == "calibration" and report.verdict != "unlabelled":
        steps.append(
            "The engine was judged on the samples that it was calibrated with, which flatters it: name others with "
            "--validation FOLDER."
        )
    steps += doubts(report)
    if report.below_chance:
        steps.append(
            f"FP32 itself is right on {100 * (report.top1_reference or 0):.2f} % of the samples, which is less than by "
            "guessing: the labels (sorted folder names) are not in the model's order. Give them in that order."
        )
    elif report.chance is None and report.top1_reference is not None and report.top1_reference < DOUBTFUL_TOP1:
        steps.append(
            f"FP32 itself is right on only {100 * report.top1_reference:.2f} % of the samples: check that the labels "
            "(sorted folder names) are in the model's order, and mean, std and size."
        )
    if report.verdict == "fail":
        steps.extend(_repairs(report, worst, untried))
    if report.baseline is not None and report.baseline.verdict == "fail":
        steps.append(
            "It is worse than the last accepted engine: `edgeres diff ACCEPTED BUNDLE` shows what changed between the "
            "two bundles, and on which samples. If the loss is meant, accept it by hand: --update-baseline."
        )
    elif report.baseline is not None and report.baseline.verdict == "inconclusive" != report.verdict:
        steps.append(_more_samples(report, report.baseline))
    steps += faster(report)
    if report.activation_range == "shifted" and report.backend == "tensorrt":
        steps.append(
            "What the border maps of the full int8 range cost in time on TensorRT is not measured yet: compare with a "
            "model that has none inside, --activation-range symmetric."
        )
    return steps


def doubts(report: Report) -> List[str]:
    """Return why a verdict means less than it says, one sentence or two each, whichever it is: told before all else."""
    found = []
    if report.different is not None:
        found.append(
            f"REPEATED SAMPLES: only {report.different:,} of {report.samples:,} are different, the others are the same "
            "files with the same labels again. Repeats tell nothing new: nothing passes that would not pass with each "
            "counted once."
        )
    if report.chance is not None:
        right = 100 * (report.top1_reference or 0)
        found.append(
            f"FP32 answers no better than chance can ({right:.1f} % of {report.samples:,}, "
            f"{round(1 / report.chance):,} classes): this verdict says nothing about a trained network. Check the "
            "weights, the labels' order (sorted folder names), and mean, std and size."
        )
    return found


def _change(drop_pp: float) -> str:
    if f"{abs(drop_pp):.2f}" == "0.00":
        return "keeps top-1"
    return f"{'loses' if drop_pp > 0 else 'gains'} {abs(drop_pp):.2f} pp of top-1"


def _verdict(report: Report, change: Union[Report, BaselineChange]) -> str:
    """Return the verdict of a report's own change, or of that from the baseline, in words."""
    if change.verdict != "inconclusive":
        basis = " by the point estimate alone" if report.policy == "point" else ""
        return f"{'passes' if change.verdict == 'pass' else 'fails'} with {counted(report.samples, 'sample')}{basis}"
    undecided = f"cannot be decided with {counted(report.samples, 'sample')}"
    if report.different is not None:
        undecided += f", of which {report.different:,} are different"
    if change is report and report.below_chance:
        return f"{undecided}, on which FP32 itself is right less often than by guessing"
    if change.samples_to_decide is None:
        return f"{undecided}; at the observed rates no practical number would decide it"
    return f"{undecided}; about {_about(change.samples_to_decide):,} would"


def fallen_words(report: Report) -> List[str]:
    """Return one sentence for each class that lost accuracy beyond chance."""
    return [
        f"Class {' '.join(change.name.split()) or change.label} fell: FP32 alone is right on "
        f"{change.only_reference_correct} and {report.precision.upper()} alone on {change.only_engine_correct} of its "
        f"{counted(change.samples, 'sample')} (p = {change.p_adjusted:.2g}, corrected for the number of classes)."
        for change in report.classes
        if change.fell
    ]


def _more_samples(report: Report, change: Union[Report, BaselineChange]) -> str:
    if report.different is not None:
        needed = "more" if change.samples_to_decide is None else f"about {_about(change.samples_to_decide):,}"
        return f"Validate on {needed} different samples: repeats of the same ones decide nothing."
    if change.samples_to_decide is None:
        return (
            "The observed loss is the budget itself, so more samples alone will not decide: choose another budget with "
            "--max-drop, or let the point estimate decide with --policy point."
        )
    return (
        f"Validate on about {_about(change.samples_to_decide):,} samples, which would decide if the rates stay as "
        "observed; or raise --max-drop; or accept the point estimate with --policy point."
    )


def _repairs(report: Report, worst: Sequence[str], untried: str) -> List[str]:
    parts = report.attribution
    if parts is not None and (parts.engine.drop_pp or 0) > max(0, parts.quantization.drop_pp or 0):
        return [
            f"Most of the loss is the engine's: {parts.engine.drop_pp:.2f} pp, where the quantized model itself loses "
            f"{parts.quantization.drop_pp:.2f}. See in `edgeres inspect` which layers do not run as planned, and "
            "compile it again; calibrating again will not help."
        ]
    if report.precision != "int8":
        return [
            f"{report.precision.upper()} loses more than it should: check that the engine was compiled from this very "
            "model and is fed by the same preprocessing."
        ]
    steps = []
    if report.sqnr_db is not None and report.sqnr_db < DOUBTFUL_SQNR_DB:
        steps.append(
            f"The logits' signal stands only {report.sqnr_db:.1f} dB above the quantization noise: check that the "
            "calibration images look like the validation images and go through the same preprocessing."
        )
    if untried:
        steps.append(
            f"With {untried} nothing more was tried: without it the build recovers what it can, and gives the layers "
            "that hurt most back to float."
        )
    steps.append("Calibrate with more images, or choose ranges by another --method (entropy, mse, percentile).")
    flags = " ".join(f"--keep-float {shlex.quote(name)}" for name in worst)
    which = f"the layers in float that cause most of it: {flags}" if flags else "the most sensitive layers in float"
    steps.append(f"Keep {which}; or build with --precision fp16.")
    return steps


def _about(count: int) -> int:
    """Return a count rounded up to two digits."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // unit) * unit
