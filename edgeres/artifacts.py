"""The nouns that flow through edgeres: frozen records of files and of facts, never a file's content.

::

    Recipe ─export─▶ ExportedModel ─calibrate─▶ CalibrationTable ─quantize─▶ QuantizedModel ─compile─▶ Engine
                          └─ FP32 reference logits ──────────▶ validate ◀── engine logits ◀── load ──────┘
                                                                  └─▶ Report;   Manifest binds them all, written last

Each converts to JSON and back by msgspec (:func:`to_json`, :func:`from_json`); unknown fields are refused, so that a
file from a newer edgeres is named as that instead of being half understood. Paths are relative to the bundle.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Type, TypeVar, Union

import msgspec

from edgeres.errors import BundleError
from edgeres.measurements import LatencyReport

# Python 3.8 (JetPack 5) evaluates these annotations through typing, so they are spelled the old way.


class FileRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in a bundle: its path relative to the bundle, its SHA-256 (hex) and its size in bytes."""

    path: str
    sha256: str
    bytes: int


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a camera frame becomes the network's input; the same for calibration, validation and serving.

    ``size`` is (height, width) in pixels. ``resize`` scales the short side to so many pixels before the centre crop
    (None: frames are cropped only). ``mean`` and ``std`` are per channel, in units of 0…1, in the network's ``color``
    order; frames themselves are always RGB. ``fit`` is ``crop``, or ``letterbox``: the whole frame is scaled into
    ``size``, in the middle, and the rest filled with the colour ``pad`` (red, green, blue, 0…255).
    """

    size: Tuple[int, int]
    resize: Optional[int] = None
    mean: Tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: Tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: str = "rgb"
    fit: str = "crop"
    pad: Optional[Tuple[int, int, int]] = None

    @property
    def batch_size(self) -> int:
        """How many samples to run at once: enough to keep a few cores busy, few enough that every activation of a
        ResNet-50 batch, exposed for calibration, fits in half a gigabyte. Results do not depend on it."""
        return max(1, min(64, 12 * 224 * 224 // (self.size[0] * self.size[1])))


class SampleSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which samples were used, in order: ``names`` and ``sha256`` run in parallel; ``digest`` covers both.

    ``source`` is the name of the folder or file that they come from.
    """

    source: str
    digest: str
    names: Tuple[str, ...]
    sha256: Tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.names)


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was found about samples. ``text`` says what, where, and what to do next.

    ``severity`` is ``warning``, or ``note`` where too few samples are concerned to matter. ``count`` is how many are,
    ``names`` are the first of them.
    """

    kind: str
    severity: str
    text: str
    count: int
    names: Tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One statistic of images, in calibration and validation samples: the medians, and how far apart the two are.

    ``distance`` is the largest difference of the two distribution functions, 0…1; ``chance`` is what so many samples of
    one kind stay below; ``far`` says whether it is worth a warning. The medians are in units of a pixel's full scale,
    or ratios.
    """

    statistic: str
    calibration: float
    validation: float
    distance: float
    chance: float
    far: bool


class Hygiene(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found about the calibration samples before anything was computed from them.

    ``calibration`` and ``validation`` are how many samples were looked at; hashes were compared of all.
    """

    calibration: int
    validation: int
    findings: Tuple[Finding, ...]
    comparisons: Tuple[Comparison, ...] = ()

    @property
    def warnings(self) -> Tuple[str, ...]:
        return tuple(finding.text for finding in self.findings if finding.severity == "warning")


class FileGrid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The grid that a user's file puts a tensor on: ``scale`` × the whole numbers from ``low`` to ``high``.

    ``scale`` is in the tensor's own units per step; ``low`` and ``high`` are counted from what stands for zero, so int8
    with zero point 0 is −128 to 127, and uint8 with zero point 0 is 0 to 255.
    """

    scale: float
    low: int
    high: int


class Imported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file that was quantized already says of itself, by the names of the float network within it.

    ``activations`` has a grid by tensor; ``weights`` the steps of each output channel, by initializer, where they are
    symmetric int8; ``float_layers`` are the weighted nodes that the file leaves in float. ``changes`` says in words
    what of the file no TensorRT reads, and what became of it. ``tool`` is who made it, empty where nothing tells.
    """

    tool: str
    activations: Dict[str, FileGrid]
    weights: Dict[str, Tuple[float, ...]]
    float_layers: Tuple[str, ...]
    changes: Tuple[str, ...]


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
    all tensors that are never negative have the full int8 range, for the price of border maps; in a ``symmetric`` model
    some may have it that cost nothing. ``grouped_int8`` counts the int8 convolutions that are
    in groups. ``integer`` is the same model in onnxruntime's integer operators, for a CPU. ``learned`` are the ranges
    that accuracy recovery changed: the model has these, and of all others those of the calibration table.
    """

    file: FileRef
    precision: str
    layers: Tuple[LayerPlan, ...]
    mixed: Optional[FileRef] = None
    activation_range: str = "symmetric"
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


class Discordant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples on which exactly one of the two is right."""

    only_reference_correct: int
    only_engine_correct: int


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far one network's answers are from another's: as in :class:`Report`, ``drop_pp`` None without labels."""

    agreement: float
    sqnr_db: Optional[float]
    drop_pp: Optional[float] = None


class Attribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The two steps from FP32 to an engine, of which a drop is the sum.

    ``quantization`` leads from FP32 to what the quantized ONNX means, computed exactly; ``engine`` from there to what
    the engine answers, which on the CPU is nothing.
    """

    quantization: Change
    engine: Change


class ClassChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A class in which the engine and the reference are right on different samples.

    ``p_adjusted`` is the chance of such a loss where the engine is no worse, corrected for the number of classes;
    ``fell`` where it is below 0.05. ``name`` is empty where the classes have none.
    """

    label: int
    name: str
    samples: int
    only_reference_correct: int
    only_engine_correct: int
    drop_pp: float
    p_adjusted: float
    fell: bool


class Confidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How sure the two say they are: the softmax of their answers.

    ``shift_pp`` is how much surer the engine is on average, in percentage points, and ``largest_shift_pp`` the most on
    a sample, whichever way. The errors are expected calibration errors, 0…1 (Guo et al. 2017, 15 bins); None without
    labels.
    """

    shift_pp: float
    largest_shift_pp: float
    calibration_error_reference: Optional[float] = None
    calibration_error_engine: Optional[float] = None


class BaselineChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine against the last accepted one, on the same samples; a loss is positive.

    ``top1`` is the earlier one's; in ``discordant`` it is the reference. The budget is the report's.
    """

    top1: float
    drop_pp: float
    drop_ci95_pp: Tuple[float, float]
    discordant: Discordant
    agreement: float
    mcnemar_p: float
    verdict: str
    samples_to_decide: Optional[int] = None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The comparison of an engine with the FP32 reference on the same samples; field names are the contract's.

    Accuracy fields are None where the samples have no labels; percentage points (``_pp``) are 100 × a share. ``layers``
    tells of the engine that was judged, and in a bundle of every engine in it, as far as their builders reported.
    ``target`` is the judged engine's. Top-5 is None where there are no more than five classes. ``classes`` are those in
    which the two are right on different samples. ``answers`` are the engine's, packed as
    :mod:`edgeres.validation.baseline` says, and ``samples_sha256`` says to which samples: a later report is compared by
    them. ``verdict`` is against FP32 alone; :meth:`outcome` counts the baseline and ``latency``, too. ``below_chance``:
    FP32 is right on significantly fewer samples than by guessing, so that nothing is judged. ``latency`` is None where
    no limit was asked for, and in every bundle, which is no machine's; ``latency_error`` says why what was asked for
    could not be measured.
    """

    samples: int
    agreement: float
    sqnr_db: Optional[float]
    max_drop_pp: float
    verdict: str
    backend: str
    precision: str
    policy: str = "ci"
    top1_reference: Optional[float] = None
    top1_engine: Optional[float] = None
    drop_pp: Optional[float] = None
    drop_ci95_pp: Optional[Tuple[float, float]] = None
    discordant: Optional[Discordant] = None
    mcnemar_p: Optional[float] = None
    samples_to_decide: Optional[int] = None
    samples_source: str = "validation"
    interval_method: str = "Tango 1998"
    activation_range: str = "symmetric"
    layers: Tuple[LayerSummary, ...] = ()
    target: str = ""
    attribution: Optional[Attribution] = None
    top5_reference: Optional[float] = None
    top5_engine: Optional[float] = None
    classes: Tuple[ClassChange, ...] = ()
    confidence: Optional[Confidence] = None
    samples_sha256: str = ""
    answers: str = ""
    baseline: Optional[BaselineChange] = None
    below_chance: bool = False
    latency: Optional[LatencyReport] = None
    latency_error: str = ""

    def accuracy(self) -> str:
        """Return the worse of the verdicts against FP32 and, where there is one, against the baseline."""
        return self._worst([] if self.baseline is None else [self.baseline.verdict])

    def outcome(self) -> str:
        """Return the gate's verdict: that on the accuracy, or a worse one on a limit of the latency; ``error`` where
        the latency could not be measured, whose repair is not to measure again."""
        limits = self.latency.limits if self.latency is not None else ()
        return self._worst(
            [self.accuracy(), *(limit.verdict for limit in limits), *(["error"] if self.latency_error else [])]
        )

    def _worst(self, others: Sequence[str]) -> str:
        return next((bad for bad in ("fail", "error", "inconclusive") if bad in (self.verdict, *others)), self.verdict)

    def judges(self, engine: Engine) -> bool:
        """Whether the verdict is on this engine; a report of an earlier edgeres tells no target, only the backend."""
        return self.target == engine.target if self.target else self.backend == engine.backend


class LayerCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a layer (or a block, a skip, a pool) costs where it alone is quantized, measured on calibration samples.

    ``expected`` is the share of answers that noise of its power changes, ``changed`` the share that did change,
    ``sqnr_db`` is of the logits, without what all classes share; ``weighted`` says how many ``nodes`` have weights.
    """

    layer: str
    nodes: Tuple[str, ...]
    weighted: int
    expected: float
    changed: float
    sqnr_db: Optional[float]


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One net that was made within the accuracy budget, and how it was judged.

    ``rung`` is ``none``, ``fast``, ``full`` (with reconstruction) or ``give back``; ``level`` is recovery's, 0 to 2;
    ``layers`` are all that it gave back to float. ``bought_pp`` is by how much less it loses than the rung before.
    """

    rung: str
    level: int
    layers: Tuple[str, ...]
    drop_pp: Optional[float]
    agreement: float
    sqnr_db: Optional[float]
    verdict: str
    seconds: float
    bought_pp: Optional[float] = None


class Climb(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was done for the accuracy budget: every rung, in order, and which of them the bundle holds (``taken``).

    ``given_back`` are the layers of all rungs, with what each costs alone; ``ended`` is why it went no further, empty
    where a verdict was not ``fail`` any more. ``without_full`` is why no rung tried reconstruction: the ``size`` of the
    model, a ``loss`` beyond it, no ``time`` for it, or it ``failed``; empty where one did, or none was needed.
    """

    rungs: Tuple[Rung, ...]
    taken: int
    given_back: Tuple[LayerCost, ...] = ()
    ended: str = ""
    without_full: str = ""

    @property
    def taken_layers(self) -> Tuple[LayerCost, ...]:
        """What the rung that was taken gave back."""
        return tuple(cost for cost in self.given_back if cost.layer in self.rungs[self.taken].layers)


class StageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished stage: ``key`` hashes everything that its result depends on; ``facts`` is its noun, as JSON data.

    ``warnings`` are what was said while it ran, to be said again where its result is taken over.
    """

    key: str
    files: Tuple[FileRef, ...]
    seconds: float
    facts: Dict[str, Any]
    warnings: Tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Written last: what was wanted, what was made, with which tools, and how it was judged."""

    name: str
    precision: str
    recipe: Dict[str, Any]
    preprocessing: Preprocessing
    files: Tuple[FileRef, ...]
    stages: Dict[str, StageRecord]
    provenance: Dict[str, Any]
    engines: Tuple[Engine, ...] = ()
    report: Optional[Report] = None
    warnings: Tuple[str, ...] = ()
    format: int = 1

    @property
    def climb(self) -> Optional[Climb]:
        """What was done for the accuracy budget; None where the first net kept it, or nothing was to be done."""
        record = self.stages.get("budget")
        if record is None:
            return None
        found = from_data(record.facts, Climb, "stage budget")
        if not 0 <= found.taken < len(found.rungs):
            raise BundleError("stage budget: the rung that was taken is none of those tried. Build the bundle again.")
        return found


class Bundle(msgspec.Struct, frozen=True):
    """A finished bundle: its folder and its manifest. ``report`` is the comparison with FP32, if there was one."""

    path: str
    manifest: Manifest

    @property
    def report(self) -> Optional[Report]:
        return self.manifest.report


T = TypeVar("T")
JsonSource = Union[bytes, str]


def to_json(noun: Any) -> bytes:
    """Return a noun as indented UTF-8 JSON that ends in a newline; equal nouns give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(noun, order="deterministic"), indent=2) + b"\n"


def from_json(content: JsonSource, kind: Type[T], where: str) -> T:
    """Return the noun of ``kind`` that JSON holds.

    Raises:
        BundleError: it is not JSON, or not such a noun; ``where`` names the file in the message.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as problem:
        raise BundleError(
            f"{where}: not a {kind.__name__} that this edgeres understands ({problem}). "
            "It is damaged or was written by another version: build it again."
        ) from None


def to_data(noun: Any) -> Any:
    """Return a noun as plain dicts, lists, strings and numbers."""
    return msgspec.to_builtins(noun)


def from_data(data: Any, kind: Type[T], where: str) -> T:
    """Return the noun of ``kind`` that plain data holds.

    Raises:
        BundleError: the data is not such a noun; ``where`` names its place in the message.
    """
    try:
        return msgspec.convert(data, type=kind)
    except msgspec.ValidationError as problem:
        raise BundleError(f"{where}: {problem}. Build the bundle again.") from None
