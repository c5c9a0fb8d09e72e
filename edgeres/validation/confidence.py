"""How sure a network says it is, and how right that is: softmax confidence, calibration error, top-5.

INT8 may keep every answer and still change what a robot does with it, where a threshold on confidence decides.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Optional

import numpy as np

BINS = 15  # as in Guo et al. 2017
FEW = 5  # of "top-5"

# Logits widened to float64 at a time: 8 MiB per array, however many samples there are.
CHUNK_VALUES = 1 << 20


class Sureness(NamedTuple):
    """What a network's logits say of their own answers.

    ``confidence`` is float64 ``(N,)``: the softmax of each sample's answer, 0…1. With labels, ``error`` is the expected
    calibration error, 0…1, and ``top5`` the share of samples whose label is among the five largest logits; None without
    labels, ``top5`` also where there are no more than five classes.
    """

    confidence: np.ndarray
    error: Optional[float]
    top5: Optional[float]


def sureness(logits: np.ndarray, labels: Optional[np.ndarray]) -> Sureness:
    """Return how sure a network is, and how far it may be believed.

    Args:
        logits: float ``(N, K)``, finite.
        labels: integers ``(N,)``, 0…K-1, or None.
    """
    confidence = np.empty(len(logits))
    among, right = 0, np.empty(len(logits), bool)
    for rows in chunks(logits):
        wide = logits[rows].astype(np.float64)
        if labels is not None:
            ranks = _ranks(wide, labels[rows])
            among += int(np.sum(ranks < FEW))
            right[rows] = ranks == 0
        wide -= wide.max(axis=1, keepdims=True)
        confidence[rows] = 1.0 / np.exp(wide, out=wide).sum(axis=1)
    if labels is None:
        return Sureness(confidence, None, None)
    top5 = among / len(logits) if logits.shape[1] > FEW else None
    return Sureness(confidence, calibration_error(confidence, right), top5)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy, over bins of confidence.

    Args:
        confidence: float ``(N,)``, 0…1.
        right: bool ``(N,)``.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 2, equation 3; bins (0, 1/15], (1/15, 2/15], …
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, confidence, BINS) - np.bincount(bins, right, BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def chunks(logits: np.ndarray) -> Iterator[slice]:
    """Return slices of rows that are few enough to be widened to float64 at a time."""
    step = max(1, CHUNK_VALUES // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes stand before the label's, int64 ``(N,)``; of equal logits the first, as in argmax."""
    own = np.take_along_axis(logits, labels[:, np.newaxis], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, np.newaxis]
    ranks: np.ndarray = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return ranks
