"""The rungs of accuracy recovery in their order, on files and arrays: the room's door for the pipeline.

Before ranges are chosen: the sensitivities of the answer, and equalization by them (``find_scalings``). After: the
exact input, the fit of weights and biases to their quantized inputs, and the Q/DQ pairs (``recovered_content``). Each
rung is a file of its own; every one leaves a graph that the next can read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgeres.affine import SHIFTED, SYMMETRIC
from edgeres.artifacts import LayerPlan, Preprocessing, TensorRange
from edgeres.noise import NoiseTable, Scaling
from edgeres.quantize.channels import apply_factors, channel_groups
from edgeres.quantize.compensate import compensate
from edgeres.quantize.equalize import equalize
from edgeres.quantize.follow import Follower
from edgeres.quantize.graph import WEIGHTED, Graph, free_name
from edgeres.quantize.insert import write_int8
from edgeres.quantize.offset import shapes_of
from edgeres.quantize.pixels import exact_pixels, pixel_range
from edgeres.quantize.placement import Placement, plan
from edgeres.quantize.reconstruct import reconstruct
from edgeres.quantize.sensitivity import sensitivities
from edgeres.quantize.shift import explained
from edgeres.quantize.simulate import Twin, quantizer_of

LEAST_IMAGES, MOST_ELEMENTS = 32, 3e8
"""At least so many images, and no more than have so many activations in all: time and memory of the rungs' passes."""
HELD = 6e7  # activations that a backward pass may hold at once

Watch = Callable[[int, int], None]


def grid_of(shifted: bool) -> tuple[int, int]:
    """Return the first and the last step of a tensor's grid."""
    return SHIFTED if shifted else SYMMETRIC


def images_for(fp32: Path) -> tuple[int, int]:
    """Return how many calibration images the rungs need for a model, and how many of them to take at a time."""
    shapes = shapes_of(onnx.load(fp32))
    elements = sum(float(np.prod([size or 1 for size in shape])) for shape in shapes.values() if len(shape) > 1)
    return max(LEAST_IMAGES, int(MOST_ELEMENTS / max(elements, 1))), max(1, int(HELD / max(elements, 1)))


def find_scalings(
    fp32: Path,
    placement: Placement,
    tables: Mapping[str, NoiseTable],
    counted: int,
    images: np.ndarray,
    batch: int,
    watch: Watch = lambda done, total: None,
    before: Mapping[str, NoiseTable] | None = None,
) -> dict[str, Scaling]:
    """Return every tensor's factors, and the sensitivities of those that are quantized.

    Args:
        placement: the plan for the FP32 model.
        tables: of every quantized tensor that equalization is to consider (not of an input that will be exact).
        counted: how many images they were counted on.
        images: some of these, float32 ``(N, 3, H, W)``, normalized.
        batch: images per step.
        before: see :func:`edgeres.quantize.equalize.equalize`.

    Raises:
        QuantizationError: the graph has an operator that recovery cannot follow.
    """
    model = onnx.load(fp32)
    follower = follower_of(model, placement)
    channels = follower.channels((images.shape[2], images.shape[3]))
    groups = channel_groups(model, channels)
    outputs = [node.output[0] for node in follower.nodes if node.op_type in WEIGHTED]
    wanted = [name for name in (*placement.tensors, *outputs) if name in channels]
    sensitivity = sensitivities(follower, images, wanted, batch, watch)
    factors = groups.factors(equalize(model, placement, groups, tables, sensitivity, counted, before))
    return {name: Scaling(values, sensitivity.get(name, np.empty(0))) for name, values in factors.items()}


@dataclass(frozen=True)
class Recovery:
    """What the rungs after the choice of ranges work with.

    ``scalings`` are :func:`find_scalings`'s. ``exact_input`` is how frames become input, where the first layer is to
    read exact pixels; None leaves it as it is. ``images`` are batches, float32 ``(n, 3, H, W)``, normalized.
    ``rounding``: whether weights are rounded by the layer's output, or each to its nearest. ``rounds`` are
    reconstruction's, by gradient; 0 leaves it out. ``left_float``: nodes that stay in float besides those that
    the recipe names, and why. ``paired``: whether weights are to be such that no multiply–add saturates, or
    which tensors' are.
    """

    scalings: Mapping[str, Scaling]
    exact_input: Preprocessing | None
    images: Sequence[np.ndarray]
    rounding: bool = True
    rounds: int = 0
    left_float: Mapping[str, str] = field(default_factory=dict)
    paired: bool | Collection[str] = False


def recovered_content(
    fp32: Path,
    modules: Mapping[str, str],
    keep_float: Sequence[str],
    ranges: Mapping[str, TensorRange],
    recovery: Recovery,
    watch: Watch = lambda done, total: None,
) -> tuple[bytes, tuple[LayerPlan, ...], Twin]:
    """Return the Q/DQ model of an FP32 file with its accuracy recovered, what was decided for each node, and its twin.

    Args:
        ranges: of the scaled tensors.
    """
    model, placement, ranges = scaled(fp32, modules, keep_float, ranges, recovery)
    follower, quantizer = follower_of(model, placement), quantizer_of(placement, ranges)
    found = compensate(follower, placement, quantizer, recovery.images, recovery.rounding, watch)
    if recovery.rounds:
        images = np.concatenate(recovery.images)
        learned = reconstruct(follower, placement, ranges, found, images, recovery.rounds, watch)
        found, ranges = learned or (found, ranges)
    final = onnx.ModelProto()
    final.CopyFrom(model)
    graph = Graph(final)
    for name, values in found.constants.items():
        graph.set_values(name, values)
    int8 = write_int8(final, placement, ranges, found.scales)
    twin = Twin(model, placement, ranges, found.constants)
    return int8.SerializeToString(deterministic=True), explained(placement.layers, int8), twin


def scaled(
    fp32: Path,
    modules: Mapping[str, str],
    keep_float: Sequence[str],
    ranges: Mapping[str, TensorRange],
    recovery: Recovery,
) -> tuple[onnx.ModelProto, Placement, dict[str, TensorRange]]:
    """Return the float graph that Q/DQ goes into, scaled and with a bias in every layer, its plan, and its ranges."""
    factors = {name: part.factors for name, part in recovery.scalings.items()}
    model = with_biases(apply_factors(onnx.load(fp32), factors))
    placement, ranges = plan(model, modules, keep_float, recovery.left_float, recovery.paired), dict(ranges)
    source = Graph(model).inputs[0]
    if recovery.exact_input is not None and source in placement.tensors:
        model, pixels = exact_pixels(model, recovery.exact_input)
        if pixels:
            ranges[pixels] = pixel_range(recovery.exact_input, ranges[source].elements)
            placement = plan(model, modules, keep_float, recovery.left_float, recovery.paired)
    return model, placement, {name: ranges[name] for name in placement.tensors}


def follower_of(model: onnx.ModelProto, placement: Placement) -> Follower:
    """Return a float graph in torch, with a hook at every quantized input of the plan."""
    return Follower(model, {reader: point.tensor for point in placement.points for reader in point.readers})


def with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``model`` in which every convolution and Gemm with constant weights has a bias."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(result)
    for node in result.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in graph.initializers:
            continue
        if len(node.input) > 2 and node.input[2]:
            continue
        weights = graph.values(node.input[1])
        transposed = any(found.name == "transB" and found.i for found in node.attribute)
        outputs = weights.shape[0] if node.op_type == "Conv" or transposed else weights.shape[1]
        name = free_name(result, f"{node.name}_bias")
        result.graph.initializer.append(numpy_helper.from_array(np.zeros(outputs, np.float32), name))
        inputs = [*node.input[:2], name]
        del node.input[:]
        node.input.extend(inputs)
    return result
