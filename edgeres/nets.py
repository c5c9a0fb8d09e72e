"""The nouns of what a network becomes: exported, with ranges, quantized, with its errors, compiled."""

from __future__ import annotations

from typing import Dict, Iterable, Optional, Tuple

import msgspec

from edgeres.inputs import FileRef, Imported, Preprocessing, SampleSet

# Python 3.8 (JetPack 5) evaluates these annotations through typing, so they are spelled the old way.


class ExportedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The FP32 ONNX. ``modules`` maps each node's name to the torch module (or source node) that it came from."""

    file: FileRef
    opset: int
    input_name: str
    output_name: str
    input_shape: Tuple[int, int, int]
    num_classes: int
    modules: Dict[str, str]
    max_relative_error: Optional[float] = None
    """Largest |onnx − torch| over the largest |torch| on a batch; None where there was no torch model to compare."""
    imported: Optional[Imported] = None
    """The quantization that the user's file came with; None where it came with none."""


LEARNED = "learned"  # the method of a range that accuracy recovery found by gradient


class TensorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's range and the statistics that it was chosen from; everything in the tensor's own units.

    ``scale`` is ``amax / 127``; for a tensor that is never negative it may be ``amax / 255``, and then ``shift``, 128
    steps, is subtracted before it is quantized (``shifts`` where that differs by channel). ``clipped`` is the share of
    elements beyond ``amax``; ``sqnr_db`` is the expected signal-to-quantization-noise ratio of the tensor alone.
    """

    amax: float
    scale: float
    method: str
    minimum: float
    maximum: float
    elements: int
    zeros: float
    clipped: float
    sqnr_db: Optional[float]
    shift: float = 0.0
    shifts: Tuple[float, ...] = ()


class CalibrationTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ranges of every tensor that will be quantized, bound to the model, samples and preprocessing they are for."""

    model_sha256: str
    preprocessing: Preprocessing
    samples: SampleSet
    method: str
    percentile: float
    tensors: Dict[str, TensorRange]
    format: int = 1


class LayerPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was decided for one node and why, in a sentence that ``edgeres inspect`` prints."""

    node: str
    op: str
    module: str
    precision: str
    reason: str


class QuantizedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The Q/DQ (or FP16) ONNX, and the decision taken for each layer.

    ``mixed`` is the int8 model's second form, in which everything that is not quantized computes in float16: strongly
    typed TensorRT (10.12 and later) takes precisions from the graph alone. ``activation_range`` is ``shifted`` where
    tensors have the full int8 range for the price of border maps, else ``symmetric``; ``shifted`` counts all that have
    it. ``grouped_int8`` counts the int8 convolutions that are
    in groups. ``integer`` is the same model in onnxruntime's integer operators, for a CPU. ``learned`` are the ranges
    that accuracy recovery changed: the model has these, and of all others those of the calibration table.
    """

    file: FileRef
    precision: str
    layers: Tuple[LayerPlan, ...]
    mixed: Optional[FileRef] = None
    activation_range: str = "symmetric"
    shifted: int = 0
    grouped_int8: int = 0
    integer: Optional[FileRef] = None
    learned: Dict[str, TensorRange] = {}


def final_ranges(table: Optional[CalibrationTable], model: Optional[QuantizedModel]) -> Dict[str, TensorRange]:
    """Return the ranges that an int8 model has, by tensor, in the table's order; none without a table."""
    if table is None:
        return {}
    learned = model.learned if model is not None else {}
    return {name: learned.get(name, chosen) for name, chosen in table.tensors.items()}


class LayerError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What quantizing one layer does, compared with the float network on the same images.

    ``share`` is of the noise power that all layers cause in the logits, each by its own error alone, to first order.
    The ratios are signal over noise in decibels, None where nothing is lost. ``own_sqnr_db``: of the layer's output
    where only this layer (its input, weights and bias) is quantized, and everything before it exact;
    ``accumulated_sqnr_db``: of the same output where the whole network is quantized; ``input_sqnr_db``: of the tensor
    that it reads, rounded; ``weight_sqnr_db``: of its weights, None also where it has none.

    ``tensor`` is what it reads quantized; ``amax``, ``scale``, ``minimum``, ``maximum`` and ``clipped`` are that
    tensor's, as in :class:`TensorRange`. ``lowest`` and ``highest`` are the ends of its int8 grid; ``saturated`` is the
    share of its elements that these cut off where the whole network is quantized.
    """

    node: str
    op: str
    module: str
    tensor: str
    share: float
    own_sqnr_db: Optional[float]
    accumulated_sqnr_db: Optional[float]
    input_sqnr_db: Optional[float]
    weight_sqnr_db: Optional[float]
    amax: float
    scale: float
    lowest: float
    highest: float
    minimum: float
    maximum: float
    clipped: float
    saturated: float


class QuantizationErrors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a quantized network's error comes from: its ``layers``, the one that causes most first.

    ``logits_sqnr_db`` is the whole quantized network's on ``samples`` calibration images. ``first_order_sqnr_db`` is
    what the layers' own errors together would make of it to first order: where the two are far apart, errors are so
    large, or make up for each other so much, that the shares are only a hint.
    """

    samples: int
    logits_sqnr_db: Optional[float]
    first_order_sqnr_db: Optional[float]
    layers: Tuple[LayerError, ...]


class EngineLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer of a built engine, as the builder reported it.

    ``precision`` is what it computes in (``int8``, ``fp16``, ``fp32``, …); ``inputs``, ``constants`` and ``outputs``
    are data types in order; ``nodes`` the ONNX nodes fused into it; ``module`` the torch module it came from ("" where
    it is the builder's own, such as a reformat).
    """

    name: str
    type: str
    precision: str
    inputs: Tuple[str, ...]
    constants: Tuple[str, ...]
    outputs: Tuple[str, ...]
    nodes: Tuple[str, ...]
    module: str = ""


class LayerSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the layers of one engine really compute in, counted from its builder's own report.

    ``precisions`` is the number of layers by precision; layers without tensors do not count. ``not_as_planned`` is a
    sentence for each layer that was planned in int8 and is not, by the name of its torch module.
    """

    target: str
    backend: str
    precisions: Dict[str, int]
    not_as_planned: Tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """``21 layers in int8, 3 in fp32``, the most frequent first."""
        counts = sorted(self.precisions.items(), key=lambda item: (-item[1], item[0]))
        told = [f"{count} in {precision}" for precision, count in counts]
        return ", ".join([told[0].replace(" in ", " layers in ", 1), *told[1:]]) if told else "no layer of a known type"


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a backend compiled. The CPU's engine is the ONNX itself and the session options that keep its meaning.

    ``model_sha256`` is of the ONNX that it was compiled from, ``activation_range`` is that one's; ``layers`` are the
    builder's own report, and ``not_as_planned`` says which of them are not what was planned. ``warnings`` is all that
    was said when it was made, and goes when it goes. ``measured_ms`` are the medians by which it was chosen for this
    machine: milliseconds per image, by what was tried; empty where nothing was measured.

    ``input`` is what it takes: ``float32``, normalized ``(N, 3, h, w)``, or ``uint8`` ``(N, h, w, 3)``, pixels in the
    network's channel order, not normalized. ``whole_pixels``: what is not whole pixels it would round to such.
    """

    target: str
    backend: str
    precision: str
    file: FileRef
    built_for: Dict[str, str]
    options: Dict[str, str]
    model_sha256: str = ""
    layers: Tuple[EngineLayer, ...] = ()
    activation_range: str = "symmetric"
    not_as_planned: Tuple[str, ...] = ()
    warnings: Tuple[str, ...] = ()
    input: str = "float32"
    whole_pixels: bool = False
    measured_ms: Dict[str, float] = {}

    @property
    def summary(self) -> Optional[LayerSummary]:
        """What its layers compute in; None where there is no builder that reported."""
        if not self.layers:
            return None
        precisions: Dict[str, int] = {}
        for layer in self.layers:
            if layer.precision:
                precisions[layer.precision] = precisions.get(layer.precision, 0) + 1
        return LayerSummary(self.target, self.backend, precisions, self.not_as_planned)


def summaries(engines: Iterable[Engine]) -> Tuple[LayerSummary, ...]:
    """Return what the layers compute in, for each engine whose builder reported."""
    return tuple(summary for summary in (engine.summary for engine in engines) if summary is not None)
