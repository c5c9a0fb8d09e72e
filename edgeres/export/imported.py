"""A quantized file's own ranges and weights, told of the float network that edgeres made of it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from edgeres.artifacts import FileGrid, Imported
from edgeres.errors import few
from edgeres.export.unquantize import KEEPERS, Taken, data_of, weights_axis


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return each weighted node's largest magnitude per output channel, float64 ``(K,)``, by the node's name."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in constants:
            values = np.abs(numpy_helper.to_array(constants[node.input[1]]).astype(np.float64))
            axis = weights_axis(node)
            if values.ndim > axis:
                found[node.name] = values.max(tuple(i for i in range(values.ndim) if i != axis), initial=0.0)
    return found


def imported(taken: Taken, before: dict[str, np.ndarray], model: onnx.ModelProto, tool: str) -> Imported:
    """Return what a file said, by the names of the finished float network.

    A batch norm that was folded since has scaled the weights of each channel, and their steps go with them.

    Args:
        before: :func:`weights_of` the network right after its Q/DQ went.
        model: the float network as it is written.
    """
    tensors = {name for node in model.graph.node for name in node.output} | {v.name for v in model.graph.input}
    after, steps, several = weights_of(model), dict[str, tuple[float, ...]](), []
    for node in model.graph.node:
        scale, old, new = (each.get(node.name) for each in (taken.weights, before, after))
        if scale is not None and old is not None and new is not None and old.shape == new.shape:
            factor = np.divide(new, old, out=np.ones_like(new), where=(old > 0) & (new > 0))
            found = tuple(float(np.float32(step)) for step in scale.astype(np.float64) * factor)
            known = steps.setdefault(node.input[1], found)
            if known != found:  # two layers share the weights; the steps that reach furthest hold for both
                steps[node.input[1]] = max(known, found, key=max)
                several.append(f"{node.input[1]} (steps up to {max(known):.3g} and {max(found):.3g})")
    return Imported(
        tool=tool,
        activations=_carried({name: grid for name, grid in taken.activations.items() if name in tensors}, model),
        weights=steps,
        float_layers=tuple(name for name in taken.float_layers if name in after),
        changes=_changes(taken, [*taken.several, *several]),
    )


def _carried(grids: dict[str, FileGrid], model: onnx.ModelProto) -> dict[str, FileGrid]:
    """Return the grids, with those of tensors that hold nothing but values of a tensor that has one."""
    found = dict(grids)
    for node in model.graph.node:
        known = [found[name] for name in data_of(node) if name in found]
        if node.op_type in KEEPERS and len(known) == len(data_of(node)):
            found.setdefault(node.output[0], max(known, key=lambda grid: max(grid.high, -grid.low) * grid.scale))
    return found


def _changes(taken: Taken, several: list[str]) -> tuple[str, ...]:
    """Return in words what no TensorRT reads of the file, and what becomes of it."""
    said = []
    if taken.foreign:
        said.append("Q/DQ of the domain com.microsoft are written in standard ONNX")
    for names, words in (
        (taken.biases, "the quantized bias of {} is float again"),
        (taken.relus, "the ReLU that a Q stood for by its cut at zero is written again behind {}"),
        (taken.clips, "a Q does more than round there: its cut is written as a Clip behind {}"),
        (taken.unlike_weights, "weights are not symmetric int8 per output channel, and are rounded anew, in {}"),
        (several, "quantized more than once, and kept as what reaches furthest: {}"),
        (taken.unusable, "no range of int8 per tensor fits {}"),
    ):
        if names:
            said.append(words.format(few(names)))
    return tuple(said)
