"""What leaves this room: the ONNX file's content, and the facts that the noun ExportedModel records."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from edgeres.artifacts import ExportedModel, FileRef, Imported


@dataclass(frozen=True)
class Exported:
    """A finished FP32 ONNX in memory; :meth:`record` makes it an ExportedModel once its file is written.

    ``notes`` are sentences that the user should read: what a file was before it became this.
    """

    content: bytes
    opset: int
    input_name: str
    output_name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    modules: dict[str, str]
    max_relative_error: float
    imported: Imported | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: onnx.ModelProto, modules: dict[str, str], error: float, shape: tuple[int, int, int], classes: int
    ) -> Exported:
        """Serialize a model. Fields that say when or where it was made are left out: equal models give equal bytes."""
        model.doc_string = ""
        return cls(
            content=model.SerializeToString(deterministic=True),
            opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
            input_name=model.graph.input[0].name,
            output_name=model.graph.output[0].name,
            input_shape=shape,
            num_classes=classes,
            modules=modules,
            max_relative_error=error,
        )

    def record(self, file: FileRef) -> ExportedModel:
        """Return the noun; ``file`` is where the content was written."""
        return ExportedModel(
            file=file,
            opset=self.opset,
            input_name=self.input_name,
            output_name=self.output_name,
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            modules=self.modules,
            max_relative_error=self.max_relative_error,
            imported=self.imported,
        )
