"""The whole gate: a bundle's accuracy, and its latency on this machine where a limit is asked for."""

from __future__ import annotations

import os
from typing import Any, Optional, Union

import msgspec
import numpy as np

from edgeres import judge
from edgeres.artifacts import Report
from edgeres.benchmark import Pace
from edgeres.validation import Limits, against_limits
from edgeres.validation.latency import BATCH

PACE = Pace(seconds=5.0)


def gate(
    bundle: Union[str, os.PathLike[str]],
    images: Union[np.ndarray, str, os.PathLike[str], None] = None,
    labels: Optional[np.ndarray] = None,
    *,
    limits: Optional[Limits] = None,
    **options: Any,
) -> Report:
    """Return the comparison of a bundle's engine with FP32, with its latency where there are limits.

    Args:
        limits: on the latency; it takes some six seconds to measure, after the accuracy, on whatever runs this.
        options: as all others, those of :func:`edgeres.judge.validate_bundle`.

    Raises:
        BackendError: an engine does not run here, or has no twin to compare with where ``min_speedup`` is asked for.
        EdgeresError: nothing could be judged.
    """
    report = judge.validate_bundle(bundle, images, labels, **options)
    if limits is None or not limits.asked:
        return report
    from edgeres.twins import Settings, bench_bundle

    backend, keys = options.get("backend", "auto"), options.get("trusted_keys")
    settings = Settings(backend, (BATCH,), PACE, alone=limits.min_speedup is None, trusted_keys=keys)
    measured = bench_bundle(bundle, settings, options.get("watch", lambda done, total: None))
    return msgspec.structs.replace(report, latency=against_limits(measured, limits))
