"""A file of a newer or older opset, brought to one that TensorRT 8.5 reads."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from edgeres.errors import ExportError, first_line
from edgeres.export.constants import fold_constants
from edgeres.export.fold import drop_identities, fresh_name
from edgeres.export.shapes import shapes_of

OPSET, LOWEST = 17, 13  # TensorRT 8.5 (JetPack 5) reads no later one
AGAIN = f"Export it again: torch.onnx.export(..., opset_version={OPSET}, dynamo=False)"
REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
)
# onnx's converter gives up on these or leaves them half converted. Once they are lowered here, what is left of them
# means the same before and after, so they pass it in a domain of their own, which it does not look into.
OURS = ("Pad", "Split", "ConstantOfShape", *REDUCTIONS)
ASIDE = "edgeres.aside"


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of standard ONNX that a model is written in; 0 where it does not say."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def to_opset(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Return a model of opset 13 to 17 and an IR version to match; one that is so already comes back as it is.

    Raises:
        ExportError: an operator has no form in opset 17, or ours is not valid; ``where`` names the model.
    """
    version = opset_of(model)
    if not LOWEST <= version <= OPSET:
        try:
            model = _converted(model, version)
            onnx.checker.check_model(model, full_check=True)
        except Exception as problem:  # the converter raises bare RuntimeErrors from C++
            raise ExportError(
                f"{where} is opset {version} and cannot be converted to {OPSET}, the last that TensorRT 8.5 reads, "
                f"by edgeres ({first_line(problem).rstrip('.')}). {AGAIN}"
            ) from None
    model.ir_version = min(model.ir_version, 8)  # what onnx 1.12 wrote, the release of opset 17
    return model


def _converted(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    if version < LOWEST:
        return version_converter.convert_version(model, OPSET)
    drop_identities(model)
    fold_constants(model)  # axes and pads, above all, where they are Constant nodes
    _lower(model, version)
    for node in model.graph.node:
        if node.op_type in OURS and node.domain in ("", "ai.onnx"):
            node.domain = ASIDE
    model.opset_import.append(helper.make_opsetid(ASIDE, 1))
    model = version_converter.convert_version(model, OPSET)
    for node in model.graph.node:
        if node.domain == ASIDE:
            node.domain = ""
    kept = [opset for opset in model.opset_import if opset.domain != ASIDE]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _lower(model: onnx.ModelProto, version: int) -> None:
    """Write what came after opset 17 as opset 17 has it, where it can say so; in place.

    Raises:
        ValueError: it cannot.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in REDUCTIONS:
            _lower_reduction(node, constants)
        elif node.op_type == "Pad":
            _lower_pad(model, node, constants)
        elif node.op_type == "Split":
            _drop(node, "num_outputs")  # without sizes, opset 13 divides evenly by the number of outputs
        _drop_defaults(node, version)


def _lower_reduction(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> None:
    """Axes were an attribute until 17; without any, all are reduced."""
    axes: list[int] = []
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in constants:
            raise ValueError(f"the axes of {node.op_type} {node.name} are computed")
        axes = [int(axis) for axis in constants[node.input[1]]]
    if not axes and any(found.name == "noop_with_empty_axes" and found.i for found in node.attribute):
        raise ValueError(f"{node.op_type} {node.name} reduces nothing")
    _drop(node, "noop_with_empty_axes")
    del node.input[1:]
    if axes:
        node.attribute.append(helper.make_attribute("axes", axes))


def _lower_pad(model: onnx.ModelProto, node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> None:
    """Pads were given for all axes until 17, and there was no mode that wraps around."""
    mode = next((found.s for found in node.attribute if found.name == "mode"), b"constant")
    if mode not in (b"constant", b"reflect", b"edge"):
        raise ValueError(f"Pad {node.name} has mode {mode.decode()}")
    if len(node.input) < 4 or not node.input[3]:
        del node.input[3:]
        return
    shape = shapes_of(model).get(node.input[0])
    if shape is None or not constants.keys() >= {node.input[1], node.input[3]}:
        raise ValueError(f"the pads of {node.name} are for axes that are computed")
    pads, axes = constants[node.input[1]], constants[node.input[3]]
    full = np.zeros((2, len(shape)), np.int64)
    full[:, axes] = pads.reshape(2, -1)
    name = fresh_name(model, f"{node.output[0]}_pads")
    model.graph.initializer.append(numpy_helper.from_array(full.ravel(), name))
    node.input[1] = name
    del node.input[3:]
    if not node.input[-1]:
        del node.input[-1]


def _drop_defaults(node: onnx.NodeProto, version: int) -> None:
    """Drop attributes that opset 17 does not know, where their value is what opset 17 always does."""
    try:
        now, then = (onnx.defs.get_schema(node.op_type, at, "") for at in (version, OPSET))
    except onnx.defs.SchemaError:
        return  # the operator is new, or not one at all: the converter says so
    for found in [found for found in node.attribute if found.name not in then.attributes]:
        value = helper.get_attribute_value(found)
        known = now.attributes.get(found.name)
        default = known.default_value if known is not None and known.default_value.name else None
        ones = found.name == "dilations" and set(value) == {1}
        if ones or (default is not None and helper.get_attribute_value(default) == value):
            _drop(node, found.name)


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [found for found in node.attribute if found.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
