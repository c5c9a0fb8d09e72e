"""A file that another tool quantized: refused by the real builder as it is, and built from what edgeres makes of it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import edgeres
from edgeres.artifacts import ExportedModel, QuantizedModel, from_data
from edgeres.backends.tensorrt import BuildRequest, attribute
from edgeres.errors import BackendError
from edgeres.recipe import dossier


class Noise(CalibrationDataReader):  # type: ignore[misc]
    """Some images for ONNX Runtime's quantizer."""

    def __init__(self) -> None:
        images = np.random.default_rng(0).uniform(-1, 1, (8, 1, 3, 32, 32)).astype(np.float32)
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self.images, None)
        return None if found is None else {"input": found}


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_type": QuantType.QUInt8, "per_channel": True}, {"extra_options": {"UseQDQContribOps": True}}],
    ids=["default", "uint8", "com.microsoft"],
)
def test_what_the_builder_refuses_it_builds_once_repaired(
    options: dict[str, Any], rtx: Any, small: Any, tmp_path: Path
) -> None:
    source, theirs = tmp_path / "fp32.onnx", tmp_path / "theirs.onnx"
    source.write_bytes(small.exported.content)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the quantizer's own
            quantize_static(source, theirs, Noise(), **options)
    finally:
        logging.disable(logging.NOTSET)

    def build(onnx: Path) -> Any:
        request = BuildRequest(
            onnx=str(onnx),
            plan=str(tmp_path / f"{onnx.stem}.engine"),
            input_name="input",
            shape=(3, 32, 32),
            flavour="tensorrt-rtx",
        )
        return rtx.build(request)

    with pytest.raises(BackendError):
        build(theirs)
    made = edgeres.build(
        model=str(theirs),
        precision="int8",
        backend="cpu",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        calibration=str(dossier() / "digits" / "calibration"),
        calibration_count=16,
        out=tmp_path / "bundle",
    )
    assert from_data(made.manifest.stages["export"].facts, ExportedModel, "export").imported is not None
    quantized = from_data(made.manifest.stages["quantize"].facts, QuantizedModel, "quantize")
    layers, complaints = attribute(build(tmp_path / "bundle" / "model.int8.onnx").layers, quantized.layers)
    assert complaints == ()
    weighted = [layer for layer in layers if layer.type in ("correlation", "conv", "gemm")]
    assert len(weighted) == len(small.weighted)
    assert {(layer.precision, layer.inputs[0], layer.constants[0]) for layer in weighted} == {("int8",) * 3}
