"""The Deep Learning Accelerators of Jetson modules: where there is one, and how it gets its ranges.

Up to TensorRT 10.7 a DLA knows implicit quantization only: it takes the FP32 graph without Q/DQ, and one scale per
tensor from a calibration cache. It quantizes the weights itself, by the largest magnitude per output channel, as
:mod:`edgeres.quantize.insert` does. From 11.4.1 on it reads the Q/DQ graph, and only :func:`refusal` is of use here.

Source: NVIDIA, Deep-Learning-Accelerator-SW, "QDQ Translator" and FAQ; TensorRT release notes up to 11.4.1.
"""

from __future__ import annotations

import re
import struct
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from edgeres.affine import scale_from_amax
from edgeres.artifacts import LayerPlan
from edgeres.backends.tensorrt.module import dotted, member
from edgeres.backends.tensorrt.versions import UNROUNDED_SINCE, dla_of
from edgeres.errors import BackendError

CORES: Tuple[Tuple[str, int], ...] = (
    ("orin nano", 0),
    ("thor", 0),
    ("agx orin", 2),
    ("orin nx", 2),  # one on the module with 8 GB, which goes by the same name
    ("agx xavier", 2),
    ("xavier nx", 2),
    ("jetson nano", 0),
    ("jetson tx", 0),
    ("orin", 2),  # CUDA calls every Orin this, also the Nano, which has none: the builder has the last word
    ("xavier", 2),
)
"""By a part of the device's name, in lower case, how many DLA cores it has at most; the first row that fits. Of names
that are not here, as boards of other makers have them, the builder decides."""

EXPLICIT_ON = ("agx orin", "orin")
"""Where the DLA of TensorRT 11.4.1 and newer is to be had, by the same names."""

INT8_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool", "ReduceMean")
"""What a DLA computes in int8; the rest of a plan's float nodes look at shapes, or run in float anyway."""

HEADER = re.compile(r"TRT-(\d+)-EntropyCalibration2")


def refusal(version: Tuple[int, ...], device_name: str, target: str) -> str:
    """Return why nothing can be built for a DLA here, and what to do; an empty string where it can.

    Args:
        version: TensorRT's, such as ``(10, 3, 0)``.
        device_name: of the module or of its GPU; an empty string where it is not known.
        target: ``gpu`` (never refused), ``dla0`` or ``dla1``.
    """
    if not target.startswith("dla"):
        return ""
    kind = dla_of(version)
    if kind is None:
        return (
            f"TensorRT {dotted(version)} has no DLA: 10.7 is the last 10.x with one, and 11.4.1 has it again, on AGX "
            "Orin under JetPack 7.2.2 and newer. Compile for the GPU: --target gpu"
        )
    if not device_name:
        return ""
    row = next((row for row in CORES if row[0] in device_name.lower()), None)
    if row is None:
        return ""
    if row[1] == 0:
        return f"{device_name} has no DLA. Compile for the GPU: --target gpu"
    if kind == "explicit" and row[0] not in EXPLICIT_ON:
        return (
            f"the DLA of TensorRT {dotted(version)} is for AGX Orin, this is {device_name}. Compile for the GPU: "
            "--target gpu"
        )
    if int(target[len("dla") :]) >= row[1]:
        return f"{device_name} has {row[1]} DLA cores, dla0 to dla{row[1] - 1}. Choose one of them, or --target gpu"
    return ""


def calibration_cache(version: Tuple[int, ...], ranges: Mapping[str, float]) -> str:
    """Return a calibration cache that gives each tensor of ``ranges`` its scale.

    Only what our own table holds is in it: the input and what the Q/DQ graph quantizes. :func:`completed` adds the
    tensors between those, once TensorRT has parsed the graph.

    Args:
        version: of the TensorRT that will read it; a cache with another version's header is not read at all.
        ranges: TensorRT's tensor name, which is the FP32 ONNX's → ``amax``, in the tensor's own units.

    Raises:
        CalibrationError: a range is negative or not finite.
    """
    major, minor, patch = (*version, 0, 0)[:3]
    number = f"{major}{minor}{patch:02}" if major < 10 else f"{major}{minor:02}{patch:02}"
    scales = {name: float(scale_from_amax(np.float64(amax))) for name, amax in ranges.items()}
    return _text(f"TRT-{number}-EntropyCalibration2", scales)


def _text(header: str, scales: Mapping[str, float]) -> str:
    return "\n".join([header, *(f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()), ""])


def read_cache(text: str) -> Dict[str, float]:
    """Return the scale of each tensor in a calibration cache, in real units per integer step.

    Raises:
        BackendError: it is not a calibration cache.
    """
    header, *rows = text.rstrip("\n").split("\n")
    scales: Dict[str, float] = {}
    if not HEADER.fullmatch(header):
        raise BackendError("not a calibration cache: its first line is not TRT-<version>-EntropyCalibration2")
    for number, row in enumerate(rows, start=2):
        name, separator, digits = row.rpartition(": ")
        try:
            if not (separator and len(digits) == 8):
                raise ValueError("eight hexadecimal digits are wanted behind the tensor's name")
            (scales[name],) = struct.unpack(">f", bytes.fromhex(digits))
        except ValueError as problem:
            raise BackendError(f"line {number} of the calibration cache: {problem}") from None
    return scales


def kept_in_half(plan: Sequence[LayerPlan]) -> Tuple[str, ...]:
    """Return the nodes that are planned in float and that a DLA could run in int8 all the same: their tensors may have
    scales for their neighbours' sake."""
    return tuple(layer.node for layer in plan if layer.precision == "float" and layer.op in INT8_OPS)


def completed(trt: Any, network: Any, cache: str) -> str:
    """Return a calibration cache with scales also for what lies between the tensors of ``cache``.

    A tensor without a scale would push its layers to FP16, or off the DLA. What a ReLU, a maximum pooling or a layer
    that only moves values reads and writes shares one scale (a ReLU drops what this clips: nothing changes). The
    convolution's side of a residual addition has no range, on purpose: the Q/DQ graph does not round there. JetPack 6
    and newer are told so by a scale of 1.0; older ones really use it, so there the sum's own scale stands in, which is
    an approximation: the branch is rounded once more, and clipped where it is beyond the sum's range.

    Args:
        network: the parsed FP32 network, complete.
        cache: from :func:`calibration_cache`.
    """
    scales, header = read_cache(cache), cache.split("\n")[0]
    branch = 1.0 if int(header.split("-")[1]) >= UNROUNDED_SINCE else None
    known = len(scales)
    layers = [_Layer.of(trt, network.get_layer(index)) for index in range(network.num_layers)]
    sums = [layer for layer in layers if layer.kind == "sum"]
    for _ in range(len(layers)):
        before = len(scales)
        for layer in (one for one in layers if one.kind == "same"):
            for source, wanted in ((layer.output, layer.inputs[0]), (layer.inputs[0], layer.output)):
                if source in scales:
                    scales.setdefault(wanted, scales[source])
        if len(scales) == before:
            break
    for layer in sums:
        if layer.output in scales and any(name in scales for name in layer.inputs):
            for name in layer.inputs:
                scales.setdefault(name, branch or scales[layer.output])
    return cache if len(scales) == known else _text(header, scales)


class _Layer:
    """What counts of one layer: does it keep values (``same``), add (``sum``), or neither; its tensors by name."""

    def __init__(self, kind: str, inputs: List[str], output: str) -> None:
        self.kind, self.inputs, self.output = kind, inputs, output

    @classmethod
    def of(cls, trt: Any, layer: Any) -> _Layer:
        tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
        inputs = [tensor.name for tensor in tensors if tensor is not None]
        outputs = [layer.get_output(index).name for index in range(layer.num_outputs)]
        kind = _kind(trt, layer) if inputs and len(outputs) == 1 else ""
        return cls(kind, inputs, outputs[0] if outputs else "")


MOVING = ("SHUFFLE", "SLICE", "PADDING", "IDENTITY")


def _kind(trt: Any, layer: Any) -> str:
    """Return ``same``, ``sum`` or nothing; what a layer does in detail shows once it is taken for its own class."""
    kinds = {name: getattr(trt.LayerType, name, None) for name in (*MOVING, "ACTIVATION", "POOLING", "ELEMENTWISE")}
    kind = next((name for name, value in kinds.items() if value is not None and value == layer.type), "")
    if kind in MOVING:
        return "same"
    if kind == "ACTIVATION":
        layer.__class__ = trt.IActivationLayer
        return "same" if layer.type == member(trt.ActivationType, "RELU") else ""
    if kind == "POOLING":
        layer.__class__ = trt.IPoolingLayer
        return "same" if layer.type == member(trt.PoolingType, "MAX") else ""
    if kind == "ELEMENTWISE":
        layer.__class__ = trt.IElementWiseLayer
        return "sum" if layer.op == member(trt.ElementWiseOperation, "SUM") else ""
    return ""


def make_calibrator(trt: Any, cache: str) -> Any:
    """Return a calibrator of the loaded TensorRT that hands out ``cache`` and has no samples; keep it during the build.

    Raises:
        BackendError: this version has no calibrators.
    """
    base = getattr(trt, "IInt8EntropyCalibrator2", None)
    if base is None:
        raise BackendError(
            f"TensorRT {trt.__version__} takes ranges from Q/DQ alone. Compile for the GPU: --target gpu"
        )

    class Calibrator(base):  # type: ignore[misc, valid-type]  # the base is known at run time only
        def __init__(self) -> None:
            super().__init__()  # without it, older bindings crash
            self.content = cache.encode()

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: List[str]) -> Optional[List[int]]:
            return None

        def read_calibration_cache(self) -> bytes:
            return self.content

        def write_calibration_cache(self, content: Any) -> None:
            """Drop what TensorRT would store: it is what it was given."""

    return Calibrator()
