"""Write a plan into the graph: QuantizeLinear and DequantizeLinear pairs, in the form every TensorRT from 8.5 reads.

Weights stay float initializers behind Q and DQ, zero points are written out, scales are float32 and biases are left
alone: TensorRT 8.5 wants three inputs on Q and DQ, and no version before 10 is known to read int8 initializers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.artifacts import TensorRange
from edgeres.errors import QuantizationError
from edgeres.quantize.graph import Graph
from edgeres.quantize.lint import check
from edgeres.quantize.placement import Placement, Weight
from edgeres.quantize.saturation import weight_scale
from edgeres.quantize.shift import write_shifted


def write_int8(
    model: onnx.ModelProto,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    weight_scales: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> onnx.ModelProto:
    """Return a copy of ``model`` with the plan's Q/DQ pairs, linted.

    Args:
        model: the FP32 graph that the plan was made for.
        ranges: by tensor name; every tensor of ``placement.tensors`` must be there. Those that have a shift are
            shifted: see :mod:`edgeres.quantize.shift`.
        weight_scales: by the name of a weight whose values lie on a grid of their own, its steps, float32 ``(K,)``;
            other weights get the grid that just reaches their largest magnitude per channel.

    Raises:
        QuantizationError: a range is missing, or a weight's scales do not fit it.
        LintError: the result breaks a rule or is not valid ONNX (a bug in a plan, never the user's fault).
    """
    missing = [name for name in placement.tensors if name not in ranges]
    if missing:
        raise QuantizationError(f"the calibration table has no range for {', '.join(missing)}. Calibrate again.")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(result)
    nodes = {node.name: node for node in graph.nodes}
    names = _Names(result)
    behind: dict[str, list[onnx.NodeProto]] = {}
    front: list[onnx.NodeProto] = []
    scales = [_weight_scale(graph, weight, weight_scales) for weight in placement.weights]
    _round_biases(graph, placement, ranges, scales)
    meant = onnx.ModelProto()
    meant.CopyFrom(result)
    for weight, scale in zip(placement.weights, scales, strict=True):
        pair, output = _pair(result, names, weight.tensor, scale, weight.axis)
        front.extend(pair)
        for name, index in weight.readers:
            nodes[name].input[index] = output
    for point in placement.points:
        pair, output = _pair(result, names, point.tensor, np.float32(ranges[point.range_of].scale), None)
        behind.setdefault(point.tensor, []).extend(pair)
        for name, index in point.readers:
            nodes[name].input[index] = output
    _rewrite(result, graph, front, behind)
    shifts = {point.tensor: shift_of(ranges[point.range_of]) for point in placement.points}
    if any(shift.any() for shift in shifts.values()):
        result = write_shifted(result, {tensor: shift for tensor, shift in shifts.items() if shift.any()})
    check(result, "model.int8.onnx", placement.kept, meant)
    return result


def _round_biases(
    graph: Graph, placement: Placement, ranges: Mapping[str, TensorRange], steps: Sequence[np.ndarray]
) -> None:
    """Round the biases beside paired weights to whole steps of the layer's sums, as integer kernels add them.

    Args:
        steps: of each of the plan's weights, its scales.
    """
    nodes = {node.name: node for node in graph.nodes}
    scales = {reader: ranges[point.range_of].scale for point in placement.points for reader in point.readers}
    for weight, scale in zip(placement.weights, steps, strict=True):
        for name, _ in weight.readers if weight.paired else ():
            node = nodes[name]
            bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            unit = scale.astype(np.float64) * scales.get((name, 0), 0.0)
            if bias is not None and bias.shape == unit.shape and unit.all() and len(graph.uses(node.input[2])) == 1:
                # Where all weights are zero their step means nothing, and the bias is all that is left of the channel.
                used = _channels_used(graph.values(weight.tensor), weight.axis)
                graph.set_values(node.input[2], np.where(used, np.rint(bias / unit) * unit, bias))


def _channels_used(weights: np.ndarray, axis: int) -> np.ndarray:
    """Return which output channels have any weight that is not zero, bool ``(K,)``."""
    return np.asarray(np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).any(axis=1))


def shift_of(chosen: TensorRange) -> np.ndarray:
    """Return what is subtracted from a tensor before it is quantized, float64 ``()``, or ``(1, C, 1, 1)``."""
    return np.array(chosen.shifts).reshape(1, -1, 1, 1) if chosen.shifts else np.asarray(chosen.shift, np.float64)


def _weight_scale(graph: Graph, weight: Weight, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a weight's steps, float32 ``(K,)``: those that were given, or those that just reach what it holds."""
    values = numpy_helper.to_array(graph.initializers[weight.tensor]).astype(np.float32)
    if weight.tensor not in given:
        return weight_scale(values, weight.axis, weight.paired)
    scale = np.asarray(given[weight.tensor], np.float32)
    if scale.shape != (values.shape[weight.axis],) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise QuantizationError(
            f"{weight.tensor} has {values.shape[weight.axis]} channels along axis {weight.axis}; its scales, of shape "
            f"{scale.shape}, are not as many positive numbers. Give one for each channel, or none."
        )
    return scale


class _Names:
    """Names that nothing else in a model has, the same ones each time."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        self.taken.update(name for node in graph.node for name in (node.name, *node.input, *node.output))

    def pair(self, tensor: str) -> dict[str, str]:
        """Return a name for each part of a Q/DQ pair: the tensor's and the part's, with a number if one is taken."""
        parts = ("scale", "zero_point", "quantized", "dequantized", "QuantizeLinear", "DequantizeLinear")
        for number in itertools.count(1):
            stem = tensor if number == 1 else f"{tensor}_{number}"
            names = {part: f"{stem}_{part}" for part in parts}
            if self.taken.isdisjoint(names.values()):
                break
        self.taken.update(names.values())
        return names


def _pair(
    model: onnx.ModelProto, taken: _Names, tensor: str, scale: np.ndarray, axis: int | None
) -> tuple[list[onnx.NodeProto], str]:
    """Add scale and zero point of one Q/DQ pair to the initializers; return its nodes and its output's name."""
    names = taken.pair(tensor)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.asarray(scale, np.float32), names["scale"]),
            numpy_helper.from_array(np.zeros_like(scale, dtype=np.int8), names["zero_point"]),
        ]
    )
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node(
            op_type, [source, names["scale"], names["zero_point"]], [names[to]], name=names[op_type], **attributes
        )
        for op_type, source, to in (
            ("QuantizeLinear", tensor, "quantized"),
            ("DequantizeLinear", names["quantized"], "dequantized"),
        )
    ]
    return nodes, names["dequantized"]


def _rewrite(
    model: onnx.ModelProto, graph: Graph, front: list[onnx.NodeProto], behind: dict[str, list[onnx.NodeProto]]
) -> None:
    """Put the new nodes where the graph stays in topological order: each pair right behind what it reads."""
    ordered = [*front, *(node for name in graph.inputs for node in behind.get(name, []))]
    for node in graph.nodes:
        ordered.append(node)
        ordered.extend(new for output in node.output for new in behind.get(output, []))
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    del model.graph.value_info[:]
