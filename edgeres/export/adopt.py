"""A user's own classification ONNX, brought into the form that the rest of edgeres works on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, inliner

from edgeres.errors import ExportError, first_line
from edgeres.export.answers import batch_of, one_by_one, open_session
from edgeres.export.constants import fold_constants
from edgeres.export.exported import Exported
from edgeres.export.external import read_model
from edgeres.export.fold import (
    check_domains,
    check_model,
    choose_branches,
    drop_identities,
    free_reshapes,
    name_nodes,
    simplify,
)
from edgeres.export.imported import imported, weights_of
from edgeres.export.layout import channels_first
from edgeres.export.opset import AGAIN, to_opset
from edgeres.export.probe import Probed, judged, probe
from edgeres.export.sizes import check_sizes
from edgeres.export.unquantize import Taken, is_pair_part, unquantize
from edgeres.export.unread import check_integers, check_operators, named
from edgeres.export.widen import is_bfloat, widen
from edgeres.preprocess import LARGEST_SIDE
from edgeres.toolmarks import tool_of

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2  # of a file that computes in float16, whose last bits are not ours
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")


def adopt_onnx(source: Path, size: tuple[int, int] | None, seed: int = 0) -> Exported:
    """Return a user's ONNX as the other rooms want it, compared with the original.

    Afterwards: FP32, opset 13 to 17, images as (N, 3, h, w), a dynamic batch, constants and batch norms folded, every
    node named. Of a file that is quantized already, the float network within it, and beside that its own ranges.

    Args:
        source: a file with one float image input ``(N, 3, h, w)`` (or ``(N, h, w, 3)``, where it turns that itself) and
            one output ``(N, classes)``.
        size: (height, width) in pixels, for a file that leaves them open.
        seed: of the random batch on which the file and the result are compared.

    Raises:
        ExportError: the file is not such a model; the message says in what.
    """
    model = _load(source)
    theirs, notes = model.SerializeToString(), []
    if halved := widen(model):
        notes.append("it computes in half precision, and is written in float32: its numbers, with more digits")
    turned = channels_first(model)
    apart = _taken_apart(model, source, size, seed) if any(map(is_pair_part, model.graph.node)) else None
    original = theirs if apart is None else model.SerializeToString()
    before = weights_of(model)
    if channels_first(model) or turned:
        notes.append("its images are (N, h, w, 3); edgeres feeds (N, 3, h, w), and its Transpose is gone")
    height, width = _image_size(model, source, size)
    check_sizes(model, (height, width), str(source))
    model = to_opset(model, str(source))
    fold_constants(model)
    free_reshapes(model)
    _free_batch(model)
    simplify(model)
    _forget_origin(model)
    check_model(model, source.name)
    check_sizes(model, (height, width), str(source))  # again: what a shape was computed from may be folded by now
    check_operators(model, str(source))
    random = np.random.default_rng(seed)  # one after the other: float64 numbers take twice the memory
    images = np.stack([random.standard_normal((3, height, width)).astype(np.float32) for _ in range(2)])
    tolerance = HALF_TOLERANCE if halved and apart is None else TOLERANCE
    error, classes = _compare(original, model.SerializeToString(), images, source, tolerance)
    known = None
    if apart is not None:
        taken, probed = apart
        notes.append(judged(probed, model.SerializeToString(), source.name))
        known = imported(taken, before, model, _tool(onnx.load_model_from_string(theirs)))
        notes.extend(known.changes)
    modules = {node.name: node.name for node in model.graph.node}
    exported = Exported.of(model, modules, error, (3, height, width), classes)
    return dataclasses.replace(exported, imported=known, notes=tuple(f"{source.name}: {note}" for note in notes))


def _taken_apart(model: onnx.ModelProto, source: Path, size: tuple[int, int] | None, seed: int) -> tuple[Taken, Probed]:
    """Take the Q/DQ out of a model, in place, and what a run with them found before."""
    name_nodes(model)
    drop_identities(model)
    fold_constants(model)  # scales and zero points, where they are Constant nodes
    check_sizes(model, size, str(source))
    found = probe(model, size, seed)
    taken = unquantize(model, str(source), found.saturated)
    drop_identities(model)
    fold_constants(model)  # what turned or reshaped dequantized weights
    check_model(model, f"{source.name} without its Q/DQ")
    return taken, found


def _tool(model: onnx.ModelProto) -> str:
    dequantized = [node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return tool_of(model.producer_name, [entry.key for entry in model.metadata_props], dequantized)


def _load(source: Path) -> onnx.ModelProto:
    model = read_model(source)
    if is_bfloat(model):
        raise ExportError(
            f"{source} is in bfloat16, which onnxruntime does not compute on a CPU, so nothing made of it could be "
            "compared with it. Export it in float32: model.float()."
        )
    check_model(model, source.name)
    if not model.graph.node:
        raise ExportError(f"{source} holds no operators: it is empty or not an ONNX model. Export it again.")
    if model.functions:
        model = inliner.inline_local_functions(model)
    check_integers(model, str(source))
    choose_branches(model)
    control = [node for node in model.graph.node if node.op_type in ("If", "Loop", "Scan")]
    if control:
        raise ExportError(
            f"{source} has control flow, which is not quantized: {named(control)}. Export it without: fix what it "
            "depends on, such as shapes, before it is traced."
        )
    random = [node for node in model.graph.node if node.op_type in RANDOM]
    if random:
        raise ExportError(f"{source} is random: {named(random)}. Export it in inference mode, after model.eval()")
    _check_domains(model, str(source))
    check_operators(model, str(source))
    return model


def _check_domains(model: onnx.ModelProto, where: str) -> None:
    """Refuse foreign operators; ONNX Runtime's own QuantizeLinear and DequantizeLinear are understood."""
    bare = onnx.ModelProto()
    bare.graph.node.extend(node for node in model.graph.node if not is_pair_part(node))
    check_domains(bare, where)


def _image_size(model: onnx.ModelProto, source: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width), from the file where it fixes them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        values = [*inputs, *model.graph.output]
        raise ExportError(
            f"{source} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one of each is needed, not "
            f"{', '.join(value.name for value in values)}. Export a module that takes the images alone and returns the "
            "logits alone, or cut them out: onnx.utils.extract_model(FILE, OUT, [IMAGES], [LOGITS])."
        )
    tensor = inputs[0].type.tensor_type
    dims = [d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim]  # 0 and −1 are old ways to say "open"
    if tensor.elem_type != TensorProto.FLOAT or len(dims) != 4 or dims[1] not in (3, None):
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(
            f"{source}: input {inputs[0].name} is {kind} {dims}; float32 (N, 3, height, width) is needed. "
            "Export a module that takes such images"
            + ("; whole pixels, 0 to 255, are then --mean 0 --std 0.00392157." if kind in ("UINT8", "INT8") else ".")
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
    height, width = size if size is not None else (int(fixed[0] or 0), int(fixed[1] or 0))
    if max(height, width) > LARGEST_SIDE:
        raise ExportError(
            f"{source} takes images of {height}×{width} pixels, and a side has {LARGEST_SIDE} at most here. "
            "Export it for a smaller size."
        )
    return height, width


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


def _compare(
    before: bytes, after: bytes, images: np.ndarray, source: Path, tolerance: float = TOLERANCE
) -> tuple[float, int]:
    """Return the largest relative difference of ours from the user's file, alone and in a batch; and the classes."""
    try:
        old = open_session(before)
        name, copies = old.get_inputs()[0].name, batch_of(old)  # a fixed batch gets the same sample so often
        wanted = one_by_one(old, images, copies)
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        reason = first_line(problem).rstrip(".")
        raise ExportError(f"{source} does not run in onnxruntime: {reason}. Export it again.") from None
    if wanted.ndim != 2 or wanted.dtype.kind != "f":
        shape = ("N", *wanted.shape[1:])
        raise ExportError(
            f"{source} must answer (N, classes) for any batch, in floating point; it answers {wanted.dtype} {shape}. "
            "Export a module that returns logits."
        )
    if not wanted.size:
        raise ExportError(f"{source} answers nothing: its output is of shape {wanted.shape}. Export it again.")
    if not np.isfinite(wanted).all():
        raise ExportError(f"{source} answers NaN or infinite on standard normal images: check its weights")
    ours = f"edgeres cannot bring {source} into its own form"
    try:
        new = open_session(after)
        same = one_by_one(new, images, copies)
    except Exception as problem:
        raise ExportError(f"{ours} ({first_line(problem).rstrip('.')}). {AGAIN}") from None
    error = _difference(same, wanted)
    if not error <= tolerance:
        raise ExportError(f"{ours}: its answers would change by {error:.1e}. {AGAIN}")
    dynamic = "Export a dynamic batch: dynamic_axes={'input': {0: 'batch'}, 'output': {0: 'batch'}}"
    try:
        got = new.run(None, {name: images})[0]
        alone = new.run(None, {name: images[:1]})[0]
    except Exception as problem:
        only = "one image" if copies == 1 else f"{copies} images"
        raise ExportError(f"{source} runs for {only} only ({first_line(problem).rstrip('.')}). {dynamic}") from None
    if got.shape != wanted.shape or alone.shape != wanted[:1].shape:
        raise ExportError(
            f"{source} must answer (N, classes) for any batch; for two images it answers {got.shape}. {dynamic}"
        )
    error = max(error, _difference(got, wanted), _difference(alone, wanted[:1]))
    if not error <= tolerance:
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
