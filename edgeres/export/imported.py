"""A quantized file's own ranges and weights, told of the float network that edgeres made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from edgeres.artifacts import FileGrid, Imported
from edgeres.export.unquantize import MOVERS, Taken, weights_axis

SHOWN = 3


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
    after, steps = weights_of(model), dict[str, tuple[float, ...]]()
    for node in model.graph.node:
        scale, old, new = (known.get(node.name) for known in (taken.weights, before, after))
        if scale is not None and old is not None and new is not None and old.shape == new.shape:
            factor = np.divide(new, old, out=np.ones_like(new), where=(old > 0) & (new > 0))
            steps[node.input[1]] = tuple(float(np.float32(step)) for step in scale.astype(np.float64) * factor)
    return Imported(
        tool=tool,
        activations=_carried({name: grid for name, grid in taken.activations.items() if name in tensors}, model),
        weights=steps,
        float_layers=tuple(name for name in taken.float_layers if name in after),
        changes=_changes(taken),
    )


def _carried(grids: dict[str, FileGrid], model: onnx.ModelProto) -> dict[str, FileGrid]:
    """Return the grids, with those of tensors that hold nothing but values of a tensor that has one."""
    found = dict(grids)
    for node in model.graph.node:
        if node.op_type in (*MOVERS, "Relu") and node.input[0] in found:
            found.setdefault(node.output[0], found[node.input[0]])
    return found


def _changes(taken: Taken) -> tuple[str, ...]:
    """Return in words what no TensorRT reads of the file, and what becomes of it."""
    said = []
    if taken.foreign:
        said.append("Q/DQ of the domain com.microsoft are written in standard ONNX")
    for names, words in (
        (taken.biases, "the quantized bias of {} is float again"),
        (taken.relus, "the ReLU that a Q stood for by its cut at zero is written again behind {}"),
        (taken.clips, "a Q does more than round there: its cut is written as a Clip behind {}"),
        (taken.unlike_weights, "weights are not symmetric int8 per output channel, and are rounded anew, in {}"),
        (taken.unusable, "no range of int8 per tensor fits {}"),
    ):
        if names:
            said.append(words.format(few(names)))
    return tuple(said)


def few(names: Sequence[str]) -> str:
    """Return names as words: the first few, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
