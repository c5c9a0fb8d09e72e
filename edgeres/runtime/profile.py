"""How long an engine takes: the first calls, and the percentiles of many, preprocessing and inference apart."""

from __future__ import annotations

from typing import NamedTuple, Sequence, Tuple

import msgspec
import numpy as np


class WarmUp(NamedTuple):
    """Seconds of the first and of the last of some calls: how slow a cold engine is, and how fast a warm one."""

    first: float
    last: float


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds that half, 90 % and 99 % of the calls stayed below (interpolated), and those of the slowest."""

    p50: float
    p90: float
    p99: float
    max: float


class Profile(msgspec.Struct, frozen=True):
    """The latency of ``runs`` calls with an input of ``shape``.

    ``preprocess`` is from what the caller gave to the network's input (for normalized input, a check), ``inference``
    from there to the logits, ``total`` both: its percentiles are not the sums of theirs. ``cuda_graphs`` is what the
    engine says of them at the end: ``on``, ``off``, or why not.
    """

    shape: Tuple[int, ...]
    runs: int
    preprocess: Latency
    inference: Latency
    total: Latency
    cuda_graphs: str = "off"


def latency(seconds: Sequence[float]) -> Latency:
    """Return the percentiles of some calls' seconds, as NumPy interpolates them."""
    milliseconds = 1000.0 * np.asarray(seconds)
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    return Latency(float(p50), float(p90), float(p99), float(milliseconds.max()))
