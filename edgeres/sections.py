"""The recipe as a noun: its sections, and the words that their values are of."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Optional, Tuple

import msgspec

from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.artifacts import Preprocessing
from edgeres.errors import RecipeError
from edgeres.places import locate

PRECISIONS = ("fp32", "fp16", "int8")
METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
ACTIVATION_RANGES = ("auto", "symmetric", "shifted")
GROUPED = ("auto", "int8", "float")
WEIGHT_RANGES = ("auto", "full", "paired")
RECOVERIES = ("auto", "none", "fast", "full")
POLICIES = ("ci", "point")
ENGINE_INPUTS = ("auto", "uint8", "float32")
BACKENDS = ("auto", "cpu", "tensorrt", "tensorrt-rtx")
TARGETS = ("cpu", "gpu", "dla0", "dla1", "rtx")


class ModelSection(msgspec.Struct, frozen=True):
    """``source`` is a name from ``edgeres models``, ``package.module:callable``, or an ``.onnx`` file."""

    source: str = ""
    weights: Optional[str] = None
    num_classes: Optional[int] = None
    seed: int = 0

    @property
    def onnx(self) -> Optional[Path]:
        """The ``.onnx`` file that the model is, or None where it is a name or a callable."""
        return locate(self.source) if self.source.lower().endswith(".onnx") else None


class InputSection(msgspec.Struct, frozen=True):
    """``size`` is [height, width] in pixels; the rest as in :class:`edgeres.artifacts.Preprocessing`."""

    size: Optional[Tuple[int, int]] = None
    resize: Optional[int] = None
    mean: Tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: Tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: str = "rgb"
    fit: str = "crop"
    pad: Optional[Tuple[int, int, int]] = None


class CalibrationSection(msgspec.Struct, frozen=True):
    """``samples`` is a folder, a list file or an array file; ``count`` of them are used, spread evenly over all."""

    samples: Optional[str] = None
    count: int = 512
    method: str = "auto"
    percentile: float = 99.99


class QuantizationSection(msgspec.Struct, frozen=True):
    """``keep_float`` are shell patterns of torch modules that stay in float.

    ``activation_range`` is ``symmetric``, with which recovery shifts only what comes for nothing; ``shifted``, which
    gives all that is never negative the full int8 range; or ``auto``, which takes what suits the engine's target.
    ``recovery`` is how much is done for the accuracy: ``none``, ``fast``, ``full``, or ``auto``, which is ``fast``, and
    more where the verdict is ``fail``. Then ``auto`` and ``full`` also give layers back to float until the accuracy
    budget is kept, for up to ``budget_minutes``; 0: neither.
    ``grouped`` is how convolutions in groups run: ``int8``, ``float``, or ``auto``, which is by the engine's target.
    ``weight_range`` is ``full``; ``paired``, which keeps neighbours within what 16 bits hold beside any byte; or
    ``auto``, by the engine's target.
    """

    keep_float: Tuple[str, ...] = ()
    activation_range: str = "auto"
    grouped: str = "auto"
    weight_range: str = "auto"
    recovery: str = "auto"
    budget_minutes: float = 10.0


class ValidationSection(msgspec.Struct, frozen=True):
    """``max_drop`` is the accuracy budget: percentage points of top-1 that may be lost against FP32."""

    samples: Optional[str] = None
    max_drop: float = 0.5
    policy: str = "ci"


class EngineSection(msgspec.Struct, frozen=True):
    """``backend`` runs the model: ``auto`` takes the best that this machine has; ``target`` is the device.

    For TensorRT: ``batch`` is (min, opt, max); ``workspace_mib`` limits the builder's scratch memory;
    ``optimization_level`` is 0…5; ``timing_cache`` is a file that speeds up the next build; ``gpu_fallback`` lets
    layers that a DLA does not have run on the GPU; ``strict`` refuses an engine with a layer that does not run as
    planned. ``input`` is what the engine takes: ``uint8`` pixels, a quarter of the bytes, normalized ``float32``, or
    ``auto``: pixels where any normalized input is then still answered alike (int8 nets that read exact pixels).
    ``timeout_minutes`` is how long the builder may take.
    """

    backend: str = "auto"
    target: Optional[str] = None
    batch: Tuple[int, int, int] = (1, 8, 32)
    workspace_mib: Optional[int] = None
    optimization_level: Optional[int] = None
    timing_cache: Optional[str] = None
    gpu_fallback: bool = True
    version_compatible: bool = False
    hardware_compatible: bool = False
    strict: bool = False
    input: str = "auto"
    timeout_minutes: float = 240.0


SECTIONS: Dict[str, type] = {
    "model": ModelSection,
    "input": InputSection,
    "calibration": CalibrationSection,
    "quantization": QuantizationSection,
    "validation": ValidationSection,
    "engine": EngineSection,
}


class Recipe(msgspec.Struct, frozen=True):
    """What the user wants, whole: every default filled in, every path absolute."""

    name: str
    precision: str
    model: ModelSection
    input: InputSection
    calibration: CalibrationSection
    quantization: QuantizationSection
    validation: ValidationSection
    engine: EngineSection

    @property
    def architecture(self) -> Optional[Architecture]:
        """The named architecture, or None where the model is a callable or a file."""
        return ARCHITECTURES.get(self.model.source)

    @property
    def preprocessing(self) -> Preprocessing:
        """How frames become input.

        Raises:
            RecipeError: the size is open (an ``.onnx`` model whose size nobody has looked up yet).
        """
        if self.input.size is None:
            raise RecipeError("input.size", ["is not known: say --input-size HEIGHTxWIDTH"])
        frame = self.input
        return Preprocessing(self.input.size, frame.resize, frame.mean, frame.std, frame.color, frame.fit, frame.pad)

    def with_size(self, size: Tuple[int, int]) -> Recipe:
        """Return the recipe for a model that turned out to take images of ``size`` (height, width)."""
        resize = self.input.resize
        if resize is None and self.input.fit != "letterbox":
            resize = max(size)
        return msgspec.structs.replace(self, input=msgspec.structs.replace(self.input, size=size, resize=resize))
