"""The windows of a convolution side by side, so that a product of matrices is what is left of it."""

from __future__ import annotations

import numpy as np

from edgeres.quantize.accumulate import Layer
from edgeres.quantize.offset import integers
from edgeres.quantize.sheet import Sheet


def gathered(sheet: Sheet, layer: Layer, size: tuple[int, int]) -> str:
    """Write what gathers a convolution's bytes, and return the result's name: ``(N, H', W', kh · kw · C)``.

    Columns are put side by side first, so that rows then move whole.

    Args:
        size: of the output, ``(H', W')``.
    """
    kernel, pads = layer.weights.shape[2:], integers(layer.node, "pads", (0, 0, 0, 0))
    strides, dilations = integers(layer.node, "strides", (1, 1)), integers(layer.node, "dilations", (1, 1))
    name = layer.codes.name
    if any(pads):
        around = np.array([0, *pads[:2], 0, 0, *pads[2:], 0], np.int64)
        inputs = [sheet.constant("pads", around), sheet.constant("padding", np.uint8(layer.zero))]
        name = sheet.emit("Pad", [name, *inputs], f"{name}_padded")
    for axis in (1, 0):
        if kernel[axis] == 1 and strides[axis] == 1:
            continue
        parts = []
        for tap in range(kernel[axis]):
            start = tap * dilations[axis]
            bounds = start, start + (size[axis] - 1) * strides[axis] + 1, axis + 1, strides[axis]
            inputs = [sheet.constant("bound", np.array([value], np.int64)) for value in bounds]
            parts.append(sheet.emit("Slice", [name, *inputs], f"{name}_{tap}"))
        name = parts[0] if len(parts) == 1 else sheet.emit("Concat", parts, f"{name}_taps", axis=3)
    return name
