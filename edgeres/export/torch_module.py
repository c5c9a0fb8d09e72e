"""An ``nn.Module`` becomes ONNX, is checked against torch, and every node says which module it came from."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from edgeres.errors import ExportError, first_line
from edgeres.export.exported import Exported
from edgeres.export.fold import check_domains, check_model, simplify
from edgeres.export.opset import OPSET
from edgeres.export.unread import check_operators

TOLERANCE = 1e-4
INPUT, OUTPUT = "input", "logits"
PROBES = 2


def export_module(model: nn.Module, size: tuple[int, int], seed: int = 0) -> Exported:
    """Return a torch model as FP32 ONNX (opset 17, dynamic batch) that was compared with torch.

    Args:
        model: takes float32 ``(N, 3, h, w)``, returns logits float32 ``(N, K)``; it is put into eval mode.
        size: (height, width) in pixels.
        seed: of the random batch that torch and ONNX are compared on.

    Raises:
        ExportError: the model fails on such an input, returns something else, cannot be exported, or ONNX and torch
            differ by more than 1e-4.
    """
    model = model.eval()
    probe = torch.from_numpy(np.random.default_rng(seed).standard_normal((PROBES, 3, *size)).astype(np.float32))
    wanted = _forward(model, probe)
    exported = _export(model, probe)
    simplify(exported)
    modules = node_modules(exported, {name for name, _ in model.named_modules()})
    _name_weights(exported, modules)
    check_model(exported, "the exported model")
    check_domains(exported, "the exported model")
    check_operators(exported, "the exported model")
    error = _relative_error(exported, probe.numpy(), wanted)
    if not error <= TOLERANCE:
        raise ExportError(
            f"ONNX and torch differ by {error:.1e} of the largest logit (at most {TOLERANCE:.0e} is accepted). "
            "The model computes something that ONNX export does not carry over, such as randomness or training mode."
        )
    return Exported.of(exported, modules, error, (3, *size), wanted.shape[1])


def _forward(model: nn.Module, probe: torch.Tensor) -> np.ndarray:
    """Return torch's own logits, float32 ``(N, K)``, after checking that they are logits at all."""
    try:
        with torch.inference_mode():
            logits = model(probe)
    except Exception as problem:  # whatever a user's own forward raises
        shape = tuple(probe.shape)
        reason = first_line(problem)
        raise ExportError(f"the model fails on an input of shape {shape}: {reason}. Check --input-size.") from problem
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(probe):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ExportError(f"the model must return logits of shape (N, classes), not {found}")
    values = logits.float().numpy()
    if not np.isfinite(values).all():
        raise ExportError("the model's logits are NaN or infinite on a standard normal input: check its weights")
    return values


def _export(model: nn.Module, probe: torch.Tensor) -> onnx.ModelProto:
    """Run torch's TorchScript exporter: the one that writes opset 17 itself and puts module paths into node names."""
    stream: Any = io.BytesIO()  # the exporter writes to streams too; its annotation knows paths only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation and tracing notes, which the comparison below settles
            torch.onnx.export(
                model,
                (probe,),
                stream,
                opset_version=OPSET,
                dynamo=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
            )
    except Exception as problem:  # the exporter raises many kinds, from C++ too
        raise ExportError(f"torch cannot export this model to ONNX opset {OPSET}: {first_line(problem)}") from problem
    return onnx.load_model_from_string(stream.getvalue())


def node_modules(model: onnx.ModelProto, known: Collection[str]) -> dict[str, str]:
    """Return node name → torch module path, from names such as ``/layer1/layer1.0/conv1/Conv``.

    The exporter writes the scopes that a call passed through; a Sequential's child repeats its parent's name
    (``layer1/layer1.0``), so a part that extends the one before it replaces it. ``known`` are the model's module paths.
    """
    return {node.name: _module_path(node.name, known) for node in model.graph.node}


def _module_path(node_name: str, known: Collection[str]) -> str:
    parts: list[str] = []
    for scope in node_name.strip("/").split("/")[:-1]:
        if parts and scope.startswith(parts[-1] + "."):
            parts[-1] = scope
        else:
            parts.append(scope)
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)


def _name_weights(model: onnx.ModelProto, modules: dict[str, str]) -> None:
    """Name each weight after its module: folding leaves numbered names, which change from one export to the next."""
    graph = model.graph
    names = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "ConvTranspose") or not modules[node.name]:
            continue
        for old, part in zip(node.input[1:], ("weight", "bias"), strict=False):
            new = f"{modules[node.name]}.{part}"
            if old in names and old not in renamed and new not in names:
                renamed[old] = new
                names.add(new)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _relative_error(model: onnx.ModelProto, probe: np.ndarray, wanted: np.ndarray) -> float:
    """Return max |onnx − torch| / max |torch|, also for single samples, so that a fixed batch cannot hide."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails here is told by the exception
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        got = session.run(None, {INPUT: probe})[0]
        single = np.concatenate([session.run(None, {INPUT: probe[i : i + 1]})[0] for i in range(len(probe))])
    except Exception as problem:  # onnxruntime's exceptions share no base but Exception
        raise ExportError(
            f"the exported model does not run in onnxruntime: {first_line(problem)}. "
            "Its forward may hold on to the batch size or to an operator that onnxruntime lacks."
        ) from problem
    if not got.shape == single.shape == wanted.shape:
        raise ExportError(f"ONNX returns logits of shape {got.shape} where torch returns {wanted.shape}")
    largest = max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
    return max(float(np.abs(got - wanted).max()), float(np.abs(single - wanted).max())) / largest
