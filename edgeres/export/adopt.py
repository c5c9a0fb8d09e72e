"""A user's own classification ONNX, brought into the form that the rest of edgeres works on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, inliner

from edgeres.errors import ExportError, first_line
from edgeres.export.exported import Exported
from edgeres.export.fold import RANDOM, check_domains, check_model, fold_constants, free_reshapes, simplify
from edgeres.export.opset import AGAIN, to_opset

QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
TOLERANCE = 1e-4


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
    model = to_opset(model, str(source))
    fold_constants(model)
    free_reshapes(model)
    _free_batch(model)
    simplify(model)
    _forget_origin(model)
    check_model(model, source.name)
    probe = np.random.default_rng(seed).standard_normal((2, 3, height, width)).astype(np.float32)
    error, classes = _compare(original, model.SerializeToString(), probe, source)
    modules = {node.name: node.name for node in model.graph.node}
    return Exported.of(model, modules, error, (3, height, width), classes)


def _load(source: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(source)
    except OSError as problem:
        raise ExportError(
            f"{source} cannot be read as ONNX: {first_line(problem)}. Check the path; the file's external data, "
            "if it has any, belongs beside it."
        ) from None
    except (DecodeError, ValueError, onnx.checker.ValidationError) as problem:
        reason = first_line(problem).rstrip(".")
        raise ExportError(f"{source} cannot be read as ONNX: {reason}. Export or copy it again.") from None
    check_model(model, source.name)
    if not model.graph.node:
        raise ExportError(f"{source} holds no operators: it is empty or not an ONNX model. Export it again.")
    if model.functions:
        model = inliner.inline_local_functions(model)
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
        raise ExportError(f"{source} is random ({', '.join(random)}): export it in inference mode, after model.eval()")
    check_domains(model, str(source))
    return model


def _image_size(model: onnx.ModelProto, source: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width), from the file where it fixes them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ExportError(
            f"{source} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one of each is needed. "
            "Export a module that takes the images alone and returns the logits alone."
        )
    tensor = inputs[0].type.tensor_type
    dims = [d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim]  # 0 and −1 are old ways to say "open"
    if tensor.elem_type != TensorProto.FLOAT or len(dims) != 4 or dims[1] not in (3, None):
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(
            f"{source}: input {inputs[0].name} is {kind} {dims}; float32 (N, 3, height, width) is needed. "
            "Export a module that takes such images."
        )
    fixed = (dims[2], dims[3])
    if size is None and not all(fixed):
        raise ExportError(f"{source} leaves height and width open. Say them: --input-size HEIGHTxWIDTH")
    if size is not None and any(f not in (None, s) for f, s in zip(fixed, size, strict=True)):
        made_for = "×".join("any" if f is None else str(f) for f in fixed)
        raise ExportError(
            f"{source} is made for {made_for} pixels, not for {size[0]}×{size[1]}. "
            "Leave out --input-size, or export it for that size."
        )
    return size if size is not None else (int(fixed[0] or 0), int(fixed[1] or 0))


def _free_batch(model: onnx.ModelProto) -> None:
    """Give input and output a batch of any size; nodes that fix it are found by the comparison that follows."""
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        if shape.dim and value.name not in {tensor.name for tensor in model.graph.initializer}:
            shape.dim[0].Clear()
            shape.dim[0].dim_param = "batch"


def _forget_origin(model: onnx.ModelProto) -> None:
    """Drop what an exporter notes beside the graph: stack traces with paths, of a later IR version than ours."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.doc_string = ""


def _compare(before: bytes, after: bytes, probe: np.ndarray, source: Path) -> tuple[float, int]:
    """Return the largest relative difference of ours from the user's file, alone and in a batch; and the classes."""
    try:
        old = _session(before)
        name, batch = old.get_inputs()[0].name, old.get_inputs()[0].shape[0]
        copies = batch if isinstance(batch, int) else 1  # a file that fixes its batch gets the same sample so often
        wanted = np.concatenate([old.run(None, {name: np.repeat(x[None], copies, 0)})[0][:1] for x in probe])
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        reason = first_line(problem).rstrip(".")
        raise ExportError(f"{source} does not run in onnxruntime: {reason}. Export it again.") from None
    if wanted.ndim != 2:
        shape = ("N", *wanted.shape[1:])
        raise ExportError(
            f"{source} must answer (N, classes) for any batch; it answers {shape}. Export a module that returns logits."
        )
    if not np.isfinite(wanted).all():
        raise ExportError(f"{source} answers NaN or infinite on standard normal images: check its weights")
    ours = f"edgeres cannot bring {source} into its own form"
    try:
        new = _session(after)
        same = np.concatenate([new.run(None, {name: np.repeat(x[None], copies, 0)})[0][:1] for x in probe])
    except Exception as problem:
        raise ExportError(f"{ours} ({first_line(problem).rstrip('.')}). {AGAIN}") from None
    error = _difference(same, wanted)
    if not error <= TOLERANCE:
        raise ExportError(f"{ours}: its answers would change by {error:.1e}. {AGAIN}")
    dynamic = "Export a dynamic batch: dynamic_axes={'input': {0: 'batch'}, 'output': {0: 'batch'}}"
    try:
        got = new.run(None, {name: probe})[0]
        alone = new.run(None, {name: probe[:1]})[0]
    except Exception as problem:
        only = "one image" if copies == 1 else f"{copies} images"
        raise ExportError(f"{source} runs for {only} only ({first_line(problem).rstrip('.')}). {dynamic}") from None
    if got.shape != wanted.shape or alone.shape != wanted[:1].shape:
        raise ExportError(
            f"{source} must answer (N, classes) for any batch; for two images it answers {got.shape}. {dynamic}"
        )
    error = max(error, _difference(got, wanted), _difference(alone, wanted[:1]))
    if not error <= TOLERANCE:
        raise ExportError(
            f"{source} answers differently alone and in a batch (by {error:.1e}): it is not a plain classifier. "
            "Export it in inference mode, after model.eval()."
        )
    return error, wanted.shape[1]


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Return max |got − wanted| / max |wanted|; infinite where the shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float(np.abs(got - wanted).max()) / max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))


def _session(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails here is told by the exception
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
