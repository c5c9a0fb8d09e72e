"""The room's door for the pipeline: ONNX files in, ONNX content and decisions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx

from edgeres.affine import dequantize, quantize
from edgeres.artifacts import LayerPlan, TensorRange
from edgeres.quantize.graph import Graph
from edgeres.quantize.grouped import grouped_nodes
from edgeres.quantize.half import write_fp16
from edgeres.quantize.insert import write_int8
from edgeres.quantize.integer import write_integer
from edgeres.quantize.lint import check
from edgeres.quantize.mixed import write_mixed
from edgeres.quantize.placement import Placement, plan
from edgeres.quantize.shift import activation_range, explained
from edgeres.quantize.shiftable import shiftable
from edgeres.quantize.simulate import Twin


def plan_file(
    fp32: Path,
    modules: Mapping[str, str],
    keep_float: Sequence[str],
    given_back: Mapping[str, str] = MappingProxyType({}),
    paired: bool = False,
) -> Placement:
    """Return the plan for an FP32 file; see :func:`edgeres.quantize.placement.plan`."""
    return plan(onnx.load(fp32), modules, keep_float, given_back, paired)


def grouped_in_file(fp32: Path) -> dict[str, str]:
    """Return the grouped convolutions of an FP32 file; see :func:`edgeres.quantize.grouped.grouped_nodes`."""
    return grouped_nodes(Graph(onnx.load(fp32, load_external_data=False)))


def activation_range_of(int8: Path) -> str:
    """Return ``shifted`` or ``symmetric`` for a Q/DQ file; see :func:`edgeres.quantize.shift.activation_range`."""
    return activation_range(onnx.load(int8))


def shiftable_file(fp32: Path, placement: Placement, free: bool) -> frozenset[str]:
    """Return which ranges of an FP32 file may be shifted; see :func:`edgeres.quantize.shiftable.shiftable`."""
    return shiftable(onnx.load(fp32), placement, free)


def int8_content(
    fp32: Path,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    steps: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> tuple[bytes, tuple[LayerPlan, ...]]:
    """Return the Q/DQ model of an FP32 file, and what was decided for each node.

    See :func:`edgeres.quantize.insert.write_int8`, whose scales ``steps`` are, by weight.
    """
    scales = {name: np.array(values, np.float32) for name, values in steps.items()}
    model = write_int8(onnx.load(fp32), placement, ranges, scales)
    return model.SerializeToString(deterministic=True), explained(placement.layers, model)


def twin_file(
    fp32: Path,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    steps: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Twin:
    """Return an FP32 file as the float twin of what :func:`int8_content` makes of it."""
    model = onnx.load(fp32)
    graph, rounded = Graph(model), {}
    for weight in placement.weights:
        if weight.tensor in steps:
            scale = np.array(steps[weight.tensor], np.float32)
            values = quantize(graph.values(weight.tensor).astype(np.float32), scale, weight.axis)
            rounded[weight.tensor] = dequantize(values, scale, weight.axis)
    return Twin(model, placement, ranges, rounded)


def fp16_content(fp32: Path, modules: Mapping[str, str]) -> tuple[bytes, tuple[LayerPlan, ...]]:
    """Return the float16 model of an FP32 file, linted; see :func:`edgeres.quantize.half.write_fp16`.

    Raises:
        LintError: the result is not standard ONNX of an opset that TensorRT 8.5 reads.
    """
    model, layers = write_fp16(onnx.load(fp32), dict(modules))
    check(model, "model.fp16.onnx")
    return model.SerializeToString(deterministic=True), layers


def integer_content(int8: Path) -> bytes:
    """Return the integer form of a Q/DQ file; see :func:`edgeres.quantize.integer.write_integer`."""
    content: bytes = write_integer(onnx.load(int8)).SerializeToString(deterministic=True)
    return content


def mixed_content(int8: Path) -> bytes:
    """Return the int8 and float16 model of a Q/DQ file; see :func:`edgeres.quantize.mixed.write_mixed`."""
    content: bytes = write_mixed(onnx.load(int8)).SerializeToString(deterministic=True)
    return content
