"""A user's own classification ONNX, brought into the form that the rest of edgeres works on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, version_converter

from edgeres.errors import ExportError
from edgeres.export.exported import Exported
from edgeres.export.fold import RANDOM, check_model, simplify
from edgeres.export.words import first_line

OPSET, LOWEST = 17, 13
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


def adopt_onnx(source: Path, size: tuple[int, int] | None, seed: int = 0) -> Exported:
    """Return a user's FP32 ONNX as the other rooms want it, compared with the original.

    Afterwards: opset 13 to 17, a dynamic batch, constants and batch norms folded, every node named.

    Args:
        source: a file with one float32 image input ``(N, 3, h, w)`` and one output ``(N, classes)``.
        size: (height, width) in pixels, for a file that leaves them open.
        seed: of the random batch on which the file and the result are compared.

    Raises:
        ExportError: the file is not such a model; the message says in what.
    """
    model = _load(source)
    original = model.SerializeToString()
    height, width = _image_size(model, source, size)
    model = _to_opset(model, source)
    _free_batch(model)
    simplify(model)
    check_model(model, source.name)
    probe = np.random.default_rng(seed).standard_normal((2, 3, height, width)).astype(np.float32)
    error, classes = _compare(original, model.SerializeToString(), probe, source)
    modules = {node.name: node.name for node in model.graph.node}
    return Exported.of(model, modules, error, (3, height, width), classes)


def _load(source: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(source)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as problem:
        raise ExportError(f"{source} cannot be read as ONNX: {first_line(problem)}") from None
    check_model(model, source.name)
    if not model.graph.node:
        raise ExportError(f"{source} holds no operators: it is empty or not an ONNX model")
    found = sorted({node.op_type for node in model.graph.node if node.op_type in QUANTIZED})
    if found:
        raise ExportError(f"{source} is quantized already ({', '.join(found)}): start from the FP32 model")
    control = sorted({node.op_type for node in model.graph.node if node.op_type in ("If", "Loop", "Scan")})
    if control:
        raise ExportError(
            f"{source} has control flow ({', '.join(control)}), which is not quantized: export it without"
        )
    random = sorted({node.op_type for node in model.graph.node if node.op_type in RANDOM})
    if random:
        raise ExportError(f"{source} is random ({', '.join(random)}): export it in inference mode")
    return model


def _image_size(model: onnx.ModelProto, source: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width), from the file where it fixes them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ExportError(
            f"{source} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one of each is needed"
        )
    tensor = inputs[0].type.tensor_type
    dims = [d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim]  # 0 and −1 are old ways to say "open"
    if tensor.elem_type != TensorProto.FLOAT or len(dims) != 4 or dims[1] not in (3, None):
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(f"{source}: input {inputs[0].name} is {kind} {dims}; float32 (N, 3, height, width) is needed")
    fixed = (dims[2], dims[3])
    if size is None and not all(fixed):
        raise ExportError(f"{source} leaves height and width open. Say them: --input-size HEIGHTxWIDTH")
    if size is not None and any(f not in (None, s) for f, s in zip(fixed, size, strict=True)):
        raise ExportError(f"{source} is made for {fixed[0]}×{fixed[1]} pixels, not for {size[0]}×{size[1]}")
    return size if size is not None else (int(fixed[0] or 0), int(fixed[1] or 0))


def _to_opset(model: onnx.ModelProto, source: Path) -> onnx.ModelProto:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if LOWEST <= version <= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as problem:  # the converter raises bare RuntimeErrors from C++
        reason = first_line(problem)
        raise ExportError(
            f"{source} is opset {version} and cannot be converted to {OPSET}, the last that TensorRT 8.5 reads "
            f"({reason}). Export it again with opset {OPSET}."
        ) from None


def _free_batch(model: onnx.ModelProto) -> None:
    """Give input and output a batch of any size; nodes that fix it are found by the comparison that follows."""
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        if shape.dim and value.name not in {tensor.name for tensor in model.graph.initializer}:
            shape.dim[0].Clear()
            shape.dim[0].dim_param = "batch"


def _compare(before: bytes, after: bytes, probe: np.ndarray, source: Path) -> tuple[float, int]:
    """Return the largest relative difference of ours from the user's file, one sample at a time; and the classes."""
    try:
        old, new = (_session(content) for content in (before, after))
        name, batch = old.get_inputs()[0].name, old.get_inputs()[0].shape[0]
        copies = batch if isinstance(batch, int) else 1  # a file that fixes its batch gets the same sample so often
        wanted = np.concatenate([old.run(None, {name: np.repeat(x[None], copies, 0)})[0][:1] for x in probe])
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        raise ExportError(f"{source} does not run in onnxruntime: {first_line(problem)}") from None
    try:
        got = new.run(None, {name: probe})[0]
    except Exception as problem:
        raise ExportError(
            f"{source} runs for one image only ({first_line(problem)}). Export a dynamic batch."
        ) from None
    if wanted.ndim != 2 or got.shape != wanted.shape:
        raise ExportError(f"{source} must answer (N, classes) for any batch; for two images it answers {got.shape}")
    error = float(np.abs(got - wanted).max()) / max(float(np.abs(wanted).max()), np.finfo(np.float32).tiny)
    if not error <= 1e-4:
        raise ExportError(
            f"{source} answers differently alone and in a batch (by {error:.1e}): it is not a plain classifier"
        )
    return error, wanted.shape[1]


def _session(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails here is told by the exception
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
