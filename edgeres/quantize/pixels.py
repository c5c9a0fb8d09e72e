"""An input that int8 holds exactly: pixels are whole numbers from 0 to 255, and int8 has 256.

Normalization turns a pixel p into (p/255 − mean)/std. Quantizing that with one scale rounds all pixels again, for no
gain. Here the graph undoes the normalization in front of Q, per channel, so that Q reads p − 128 and rounds nothing
away; the first convolution takes 1/(255·std) into its weights, and gets the constant back as it does from a shifted
activation (a bias, or near padding a map). What costs a rounding of the input elsewhere is exact here.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeres.artifacts import Preprocessing, TensorRange
from edgeres.quantize.graph import Graph, attribute, free_name
from edgeres.quantize.offset import carried, shapes_of

SUFFIX = "_pixels"
METHOD = "exact"


def exact_pixels(model: onnx.ModelProto, preprocessing: Preprocessing) -> tuple[onnx.ModelProto, str]:
    """Return a copy of ``model`` whose first layer reads pixel steps, and the name of the tensor that holds them.

    The name is empty, and the model the same, where that is not possible: the input is read by something else than one
    convolution with weights of its own, or the convolution pads an input whose size is open.

    Args:
        model: the float graph, input float32 ``(N, 3, H, W)``, normalized as ``preprocessing`` says.
    """
    graph = Graph(model)
    source = graph.inputs[0]
    readers = graph.readers(source)
    if len(readers) != 1 or readers[0].op_type != "Conv" or attribute(readers[0], "group", 1) != 1:
        return model, ""
    weights = readers[0].input[1]
    if weights not in graph.initializers or len(graph.consumers[weights]) > 1:
        return model, ""
    if graph.initializers[weights].dims[1] != 3:
        return model, ""
    if carried(graph, readers[0], np.ones(3), shapes_of(model)) is None:
        return model, ""
    steps = 255.0 * np.asarray(preprocessing.std, np.float64)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    changed = Graph(result)
    changed.set_values(weights, changed.values(weights).astype(np.float64) / steps[None, :, None, None])
    name = free_name(result, f"{source}{SUFFIX}")
    node = next(node for node in result.graph.node if source in node.input)
    node.input[0] = name
    unit = free_name(result, f"{name}_per_unit")
    scale = numpy_helper.from_array(steps.astype(np.float32).reshape(1, 3, 1, 1), unit)
    result.graph.initializer.append(scale)
    mul = helper.make_node("Mul", [source, scale.name], [name], name=free_name(result, f"{name}_Mul"))
    result.graph.node.insert(0, mul)
    del result.graph.value_info[:]
    return result, name


def pixel_range(preprocessing: Preprocessing, elements: int) -> TensorRange:
    """Return the range of the tensor of pixel steps: a step of 1, shifted per channel so that Q reads p − 128."""
    mean = np.asarray(preprocessing.mean, np.float64)
    shifts = 128.0 - 255.0 * mean
    return TensorRange(
        amax=127.0,
        scale=1.0,
        method=METHOD,
        minimum=float((-255.0 * mean).min()),
        maximum=float((255.0 * (1.0 - mean)).max()),
        elements=elements,
        zeros=0.0,
        clipped=0.0,
        sqnr_db=None,
        shifts=tuple(shifts.tolist()),
    )
