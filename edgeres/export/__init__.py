"""Recipe → ExportedModel: FP32 ONNX, opset 17, dynamic batch, batch norms folded, each node traceable to its module."""

from __future__ import annotations

from edgeres.export.adopt import adopt_onnx
from edgeres.export.answers import answers_of
from edgeres.export.external import files_of
from edgeres.export.torch_module import export_module

__all__ = ["adopt_onnx", "answers_of", "export_module", "files_of"]
