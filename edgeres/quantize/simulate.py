"""A quantized network without a file: its float twin, with grids under its tensors and other values in its weights.

What the Q/DQ graph computes, but every tensor keeps its name and its true value, also where the graph has it shifted,
so that each can be compared with the twin's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from edgeres.affine import QMAX, QMIN, dequantize, quantize
from edgeres.artifacts import TensorRange
from edgeres.quantize.follow import Follower, Quantizer
from edgeres.quantize.graph import Graph
from edgeres.quantize.insert import shift_of
from edgeres.quantize.placement import Placement
from edgeres.quantize.saturation import weight_scale


@dataclass(frozen=True)
class Twin:
    """A float network and all that quantization changes in it.

    ``model`` is the float graph that ``placement`` was made for, after whatever leaves its answers alone (equalization,
    exact input). ``constants`` are the final values, float32, of weights and biases that are not the float network's,
    by initializer; quantized weights that are not among them are rounded to the grid that reaches their largest
    magnitudes, as :func:`edgeres.quantize.insert.write_int8` does.
    """

    model: onnx.ModelProto
    placement: Placement
    ranges: Mapping[str, TensorRange]
    constants: Mapping[str, np.ndarray]

    def follower(self) -> Follower:
        """Return the float network, for torch.

        Raises:
            QuantizationError: it has an operator that cannot be followed.
        """
        points = self.placement.points
        return Follower(self.model, {reader: point.tensor for point in points for reader in point.readers})

    def final(self) -> dict[str, dict[str, Tensor]]:
        """Return what each node reads in the place of the float network's constants: by node, then by initializer."""
        graph = Graph(self.model)
        given = {name: torch.from_numpy(np.array(values, np.float32)) for name, values in self.constants.items()}
        found = {node.name: {name: given[name] for name in node.input if name in given} for node in graph.nodes}
        for weight in self.placement.weights:
            if weight.tensor in given:
                continue
            values = graph.values(weight.tensor).astype(np.float32)
            scale = weight_scale(values, weight.axis, weight.paired)
            rounded = dequantize(quantize(values, scale, weight.axis), scale, weight.axis)
            for node, _ in weight.readers:
                found[node][weight.tensor] = torch.from_numpy(rounded)
        return found


@dataclass(frozen=True)
class Grid:
    """Where one tensor's Q/DQ pair puts its values: at ``scale`` × an int8 number + ``shift``.

    ``shift`` is float32 ``()``, or ``(1, C, 1, 1)``.
    """

    scale: float
    shift: Tensor

    @classmethod
    def of(cls, chosen: TensorRange) -> Grid:
        return cls(float(np.float32(chosen.scale)), torch.from_numpy(np.asarray(shift_of(chosen), np.float32)))

    def steps(self, x: Tensor) -> Tensor:
        """Return the whole numbers, as floats, that ``x`` rounds to; some may be beyond the grid."""
        return torch.round((x - self.shift) / self.scale)

    def values(self, steps: Tensor) -> Tensor:
        """Return the real numbers that int8 holds for ``steps``."""
        return torch.clamp(steps, QMIN, QMAX) * self.scale + self.shift


def grids_of(placement: Placement, ranges: Mapping[str, TensorRange]) -> dict[str, Grid]:
    """Return the grid of every tensor that the plan quantizes."""
    return {point.tensor: Grid.of(ranges[point.range_of]) for point in placement.points}


def quantizer_of(placement: Placement, ranges: Mapping[str, TensorRange]) -> Quantizer:
    """Return what the plan's Q/DQ pairs make of a tensor's values, in torch; a shift is taken off and given back."""
    grids = grids_of(placement, ranges)
    return lambda name, x: grids[name].values(grids[name].steps(x))
