"""What a page shows: nouns of the bundle, and the samples whose answer changed."""

from __future__ import annotations

from collections import Counter
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from edgeres.artifacts import (
    CalibrationTable,
    LayerPlan,
    Manifest,
    QuantizationErrors,
    QuantizedModel,
    TensorRange,
    final_ranges,
    summaries,
    to_data,
)
from edgeres.measurements import Benchmark
from edgeres.provenance import commit_words


class Flip(NamedTuple):
    """A sample that the engine answers otherwise than FP32 does: its place among the samples, its name, the answers in
    words, and how sure each is (softmax, 0…1; None: the engine's logits are not in the bundle).

    ``label`` is empty without labels. ``kind`` is ``lost`` where FP32 alone is right, ``gained`` where the engine alone
    is, else ``other``. ``picture`` is a data URI of an image of ``size`` (width, height) in pixels, or empty.
    """

    position: int
    name: str
    label: str
    before: str
    after: str
    sure_before: float
    sure_after: Optional[float]
    kind: str
    picture: str = ""
    size: Tuple[int, int] = (0, 0)

    @property
    def words(self) -> str:
        """The same in a sentence, for who does not see the picture."""
        after = "" if self.sure_after is None else f" ({100 * self.sure_after:.0f} % sure)"
        label = f"label {self.label}, " if self.label else ""
        return (
            f"{self.name}: {label}FP32 answers {self.before} ({100 * self.sure_before:.0f} % sure), "
            f"the engine {self.after}{after}"
        )


class Pair(NamedTuple):
    """How often one answer became another, and how many of these changes lost and gained a right one."""

    before: str
    after: str
    samples: int
    lost: int
    gained: int


class Contents(NamedTuple):
    """All that a page tells of a bundle. ``flips`` are the first of ``flipped``; ``unseen`` says why pictures are
    missing, where they are; ``headlines`` are the verdicts in words, ``fallen`` the classes that fell, ``limits``
    verdict and words of each limit on the latency."""

    manifest: Manifest
    headlines: Sequence[str] = ()
    fallen: Sequence[str] = ()
    limits: Sequence[Tuple[str, str]] = ()
    advice: Sequence[str] = ()
    flips: Sequence[Flip] = ()
    flipped: int = 0
    unseen: str = ""
    pairs: Sequence[Pair] = ()
    model: Optional[QuantizedModel] = None
    errors: Optional[QuantizationErrors] = None
    table: Optional[CalibrationTable] = None
    measured: Optional[Benchmark] = None

    @property
    def sections(self) -> Dict[str, str]:
        """The sections that there is something for, in order: title by id."""
        report = self.manifest.report
        wanted = (
            ("next", "What to do next", self.advice),
            ("accuracy", "Accuracy", report),
            ("changes", "Changed answers", report),
            ("classes", "Classes", report is not None and report.classes),
            ("confidence", "Confidence", report is not None and report.confidence),
            ("noise", "Where the error comes from", self.errors is not None and self.errors.layers),
            ("ranges", "Ranges", self.table is not None and self.table.tensors),
            ("precisions", "Precisions", self.manifest.engines or self.model is not None),
            ("budget", "What was done for the budget", self.manifest.climb),
            ("latency", "Latency", self.measured),
            ("warnings", "Warnings", self.manifest.warnings),
            ("provenance", "Provenance", True),
        )
        return {name: title for name, title, there in wanted if there}

    @property
    def ranked_ranges(self) -> List[Tuple[str, TensorRange]]:
        """Each tensor with its range, the noisiest first; those without noise come last."""
        tensors = final_ranges(self.table, self.model).items()
        return sorted(tensors, key=lambda item: (item[1].sqnr_db is None, item[1].sqnr_db or 0.0, item[0]))

    @property
    def precisions(self) -> List[Tuple[str, Dict[str, int], Tuple[str, ...]]]:
        """How many layers are in which precision: as planned, and in each engine whose builder reported; with what is
        not as planned."""
        planned = Counter(layer.precision for layer in self.model.layers) if self.model is not None else Counter()
        found: List[Tuple[str, Dict[str, int], Tuple[str, ...]]] = []
        if planned:
            found.append(("As planned", _by_count(planned), ()))
        for summary in summaries(self.manifest.engines):
            title = f"Engine for {summary.target}, as its builder reported"
            found.append((title, _by_count(summary.precisions), summary.not_as_planned))
        return found

    @property
    def float_layers(self) -> List[LayerPlan]:
        """The layers that stay in float where the model is int8."""
        if self.model is None or self.model.precision != "int8":
            return []
        return [layer for layer in self.model.layers if layer.precision == "float"]

    @property
    def origin(self) -> List[Tuple[str, str]]:
        """Where the bundle comes from: name and text."""
        recipe, made = self.manifest.recipe, self.manifest.provenance
        told = {
            "model": _listed(recipe.get("model")),
            "input": _listed(to_data(self.manifest.preprocessing)),
            "calibration": _listed(recipe.get("calibration")),
            "calibration samples": self.table.samples.digest if self.table is not None else "",
            "quantization": _listed(recipe.get("quantization")),
            "validation": _listed(recipe.get("validation")),
            "validation samples": self.manifest.report.samples_sha256 if self.manifest.report is not None else "",
            "engines": "; ".join(
                f"{engine.target}: {engine.precision} by {engine.backend}, {_listed(engine.built_for)}"
                for engine in self.manifest.engines
            ),
            "made with": _listed({"python": made.get("python"), **_table(made.get("tools"))}),
            "host": _listed(made.get("host")),
            "commit": commit_words(made.get("git")),
        }
        return [(name, text) for name, text in told.items() if text]


def flips(reference: Dict[str, np.ndarray], answers: np.ndarray, logits: Optional[np.ndarray]) -> List[Flip]:
    """Return every sample whose answer changed: what was lost first, and the surest first among these.

    Args:
        reference: the arrays of ``reference.npz``: ``logits`` (N, K), ``names`` (N,), and ``labels``, ``classes`` where
            there are any.
        answers: the engine's, integers (N,).
        logits: the engine's, or such as are next to them, (N, K), where they are known. What answers otherwise than
            the engine does not tell how sure that is.
    """
    before = reference["logits"].argmax(axis=1)
    labels, names = reference.get("labels"), reference.get("classes")
    found = []
    for index in np.flatnonzero(before != answers).tolist():
        old, new = int(before[index]), int(answers[index])
        label = None if labels is None else int(labels[index])
        found.append(
            Flip(
                index,
                str(reference["names"][index]),
                "" if label is None else class_name(label, names),
                class_name(old, names),
                class_name(new, names),
                _share(reference["logits"][index], old),
                None if logits is None or logits[index].argmax() != new else _share(logits[index], new),
                {old: "lost", new: "gained"}.get(label, "other") if label is not None else "other",
            )
        )
    order = ("lost", "gained", "other")
    return sorted(found, key=lambda flip: (order.index(flip.kind), -flip.sure_before, flip.position))


def pairs(found: Sequence[Flip]) -> List[Pair]:
    """Return which answers became which, the most frequent first."""
    counts: Dict[Tuple[str, str], List[str]] = {}
    for flip in found:
        counts.setdefault((flip.before, flip.after), []).append(flip.kind)
    listed = [
        Pair(before, after, len(kinds), kinds.count("lost"), kinds.count("gained"))
        for (before, after), kinds in counts.items()
    ]
    return sorted(listed, key=lambda pair: (-pair.samples, pair.before, pair.after))


def class_name(label: int, names: Optional[np.ndarray]) -> str:
    """Return a class's name, or its number where it has none."""
    return str(names[label]) if names is not None and 0 <= label < len(names) else str(label)


def _by_count(counts: Mapping[str, int]) -> Dict[str, int]:
    """Return counts by name, the largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _table(value: Any) -> Dict[str, Any]:
    """Return a table of a recipe or of a manifest's provenance, which may hold anything; else an empty one."""
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> str:
    """Return such a table in a line, without what nobody set."""
    said = ((key, item) for key, item in _table(value).items() if item not in (None, "", [], ()))
    return ", ".join(
        f"{key} {' '.join(map(str, item)) if isinstance(item, (list, tuple)) else item}" for key, item in said
    )


def _share(logits: np.ndarray, answer: int) -> float:
    """Return the softmax of one answer, 0…1, of logits (K,)."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max())
    return float(powers[answer] / powers.sum())
