"""Weights with which no processor's 8-bit multiply–add can saturate.

x86 without VNNI multiplies unsigned with signed bytes by vpmaddubsw, which adds the products of two neighbours in 16
bits. That is exact where both weights of a pair together are no more than 128 to either side, for 255 · 128 < 2¹⁵. The
neighbours are the first and second, third and fourth, … of what one output reads, channels innermost: (kh, kw, C).

Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, PMADDUBSW. Which
weights meet is measured on ONNX Runtime's kernels, product by product (tests/host/test_saturation.py).
"""

from __future__ import annotations

import numpy as np

from edgeres.affine import channel_amax, scale_from_amax

LARGEST = 2**15 - 1
REACH = 128
"""How far a pair may reach to either side, in steps."""


def pair_reach(rows: np.ndarray) -> np.ndarray:
    """Return how far the pairs of each row reach to one side, ``(K,)``: the largest |a + b| of weights of one sign.

    A weight without a neighbour of its own sign counts alone.

    Args:
        rows: ``(K, D)``, each output's weights in the order in which they are read.
    """
    even = np.pad(np.asarray(rows, np.float64), ((0, 0), (0, rows.shape[1] % 2)))
    first, second = even[:, 0::2], even[:, 1::2]
    up = np.maximum(first, 0) + np.maximum(second, 0)
    down = np.maximum(-first, 0) + np.maximum(-second, 0)
    reach: np.ndarray = np.maximum(up, down).max(axis=1, initial=0.0)
    return reach


def in_reading_order(weights: np.ndarray) -> np.ndarray:
    """Return a convolution's weights ``(K, C, kh, kw)`` as ``(K, kh · kw · C)``; ``(K, D)`` stays as it is."""
    return weights if weights.ndim == 2 else weights.transpose(0, 2, 3, 1).reshape(len(weights), -1)


def cannot_saturate(weights: np.ndarray, top: int = 255) -> bool:
    """Whether integers ``(K, C, kh, kw)`` or ``(K, D)`` are safe with unsigned inputs of at most ``top``."""
    return bool((pair_reach(in_reading_order(weights)) * top <= LARGEST).all())


def partners(shape: tuple[int, ...]) -> np.ndarray:
    """Return for each weight of an output, in the order of ``(C, kh, kw)`` or ``(D,)``, the place of its neighbour in
    what is read: int64 ``(D,)``, its own where it has none.

    Args:
        shape: of the weights, ``(K, C, kh, kw)`` or ``(K, D)``.
    """
    size = int(np.prod(shape[1:]))
    reading = in_reading_order(np.arange(size).reshape(1, *shape[1:]))[0]
    neighbour = np.arange(size) ^ 1
    neighbour[neighbour >= size] = size - 1
    found = np.empty(size, np.int64)
    found[reading] = reading[neighbour]
    return found


def weight_scale(weights: np.ndarray, axis: int, paired: bool) -> np.ndarray:
    """Return the step per output channel, float32 ``(K,)``, with which no weight leaves int8, and if ``paired`` no pair
    its reach: that of two which are rounded may be REACH, and never more.

    Args:
        weights: float32, of a layer's shape; output channels lie along ``axis``.
    """
    alone = scale_from_amax(channel_amax(weights, axis))
    if not paired:
        return alone
    reach = pair_reach(in_reading_order(np.moveaxis(weights, axis, 0))) / REACH
    pairs = np.nextafter(reach.astype(np.float32), np.float32(np.inf))
    return np.asarray(np.where(pairs < np.finfo(np.float32).tiny, alone, np.maximum(alone, pairs)))
