"""The nouns of judging: the report on an engine, and what was done for the accuracy budget."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import msgspec

from edgeres.measurements import LatencyReport
from edgeres.nets import Engine, LayerSummary

# Python 3.8 (JetPack 5) evaluates these annotations through typing, so they are spelled the old way.


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
    FP32 is right on significantly fewer samples than by guessing, so that nothing is judged. ``chance`` is what
    guessing gets right, 0…1, where FP32 is not significantly better than that; None elsewhere. ``different`` is how
    many samples there are without exact repeats of the same label; None where nothing is repeated. ``latency`` is None
    where no limit was asked for, and in every bundle, which is no machine's; ``latency_error`` says why what was asked
    for could not be measured.
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
    chance: Optional[float] = None
    different: Optional[int] = None

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
