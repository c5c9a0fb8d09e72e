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
from edgeres.errors import SampleError
from edgeres.validation.paired import firsts, paired_change

LARGEST = 1 << 30  # bytes of answers: 268 million samples


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
    report: Report, baseline: Report, labels: Optional[np.ndarray], sha256: Sequence[str] = ()
) -> Report:
    """Return the report with its comparison with an earlier one, which has the same samples and the same budget.

    Args:
        labels: integers ``(N,)``, of the samples that both answered.
        sha256: their hashes, as of :func:`edgeres.validation.compare.compare`.

    Raises:
        SampleError: the earlier report is on other samples or tells none of its answers, or there are no labels.
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
