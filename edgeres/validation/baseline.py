"""This engine against the last one that was accepted, sample by sample.

FP32 is where accuracy should be; the baseline is where it was. A build that keeps within its budget of FP32 may still
be worse than the one before, and only the same samples, paired, can tell so little.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Optional, Sequence

import msgspec
import numpy as np

from edgeres.artifacts import BaselineChange, Report
from edgeres.errors import SampleError, numbered
from edgeres.progress import counted
from edgeres.validation.paired import firsts, paired_change

LARGEST = 1 << 30  # bytes of answers: 268 million samples
ROUNDING = 1e-9  # of a share; less than one of so many samples


def packed(answers: np.ndarray) -> str:
    """Return answers, integers ``(N,)``, as text: base64 of zlib of little-endian int32."""
    return base64.b64encode(zlib.compress(answers.astype("<i4").tobytes(), 9)).decode("ascii")


def unpacked(text: str, count: int) -> np.ndarray:
    """Return what :func:`packed` was given, int32 ``(count,)``.

    Raises:
        SampleError: the text is something else.
    """
    size = 4 * count
    try:
        if size > LARGEST:
            raise ValueError
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
        if len(content) != size:
            raise ValueError
    except (ValueError, binascii.Error, zlib.error):
        raise SampleError(
            f"the report does not hold the answers to its {count} samples. Make it again: a baseline with "
            "--update-baseline, a bundle with edgeres build"
        ) from None
    return np.frombuffer(content, "<i4")


def against_baseline(
    report: Report, baseline: Report, labels: Optional[np.ndarray], classes: int, sha256: Sequence[str] = ()
) -> Report:
    """Return the report with its comparison with an earlier one, which has the same samples and the same budget.

    Args:
        labels: integers ``(N,)``, of the samples that both answered.
        classes: how many the network knows.
        sha256: their hashes, as of :func:`edgeres.validation.compare.compare`.

    Raises:
        SampleError: the earlier report is on other samples, fails, tells none of its answers or others than its own
            numbers do, or there are no labels.
    """
    if labels is None or report.top1_engine is None:
        raise SampleError("a baseline is compared by what is right and wrong: give validation samples with labels")
    if not baseline.answers or not baseline.samples_sha256:
        raise SampleError("the baseline does not tell its answers, sample by sample. Write it again: --update-baseline")
    if baseline.samples != report.samples or baseline.samples_sha256 != report.samples_sha256:
        raise SampleError(
            f"the baseline was judged on {baseline.samples} other samples than these {report.samples}, or by other "
            "labels: only the same ones, in the same order, can be paired. Validate on those, or write it again: "
            "--update-baseline"
        )
    before, after = unpacked(baseline.answers, report.samples), unpacked(report.answers, report.samples)
    _refuse_lies(baseline, before, labels, classes)
    first = firsts(sha256, labels) if len(sha256) else None
    change = paired_change(before == labels, after == labels, report.max_drop_pp, report.policy, first)
    return msgspec.structs.replace(
        report,
        baseline=BaselineChange(
            top1=int(np.sum(before == labels)) / report.samples,
            drop_pp=change.drop_pp,
            drop_ci95_pp=change.interval_pp,
            discordant=change.discordant,
            agreement=float(np.mean(before == after)),
            mcnemar_p=change.mcnemar_p,
            verdict=change.verdict,
            samples_to_decide=change.samples_to_decide,
        ),
    )


def _refuse_lies(baseline: Report, answers: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Refuse a baseline that was never accepted, or was changed since: whatever is worse than it would pass.

    Raises:
        SampleError: with all that is wrong.
    """
    problems = []
    if baseline.accuracy() == "fail":
        problems.append("its verdict is fail, and only an engine that passes is a baseline")
    strange = np.flatnonzero((answers < 0) | (answers >= classes))
    if len(strange):
        verb = "is" if len(strange) == 1 else "are"
        problems.append(
            f"{counted(len(strange), 'answer')} {verb} none of the network's {classes} classes (0 to {classes - 1}), "
            f"the first of them that to sample {strange[0]}: {answers[strange[0]]}"
        )
    right = int(np.sum(answers == labels))
    told = baseline.top1_engine
    if told is None or abs(told - right / len(answers)) > ROUNDING:
        said = "tells no top1_engine" if told is None else f"says top1_engine {told:.10g}"
        problems.append(f"it {said}, and of its answers {right:,} of {len(answers):,} are right")
    if problems:
        raise SampleError(
            numbered("the baseline is no report that was accepted", problems) + "\nWrite it again: --update-baseline"
        )
