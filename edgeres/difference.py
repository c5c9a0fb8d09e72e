"""How two bundles differ, as plain data and in words: recipe, ranges, layers, accuracy, latency, answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from edgeres import files
from edgeres.artifacts import Manifest, Report
from edgeres.bundle import read_listed
from edgeres.inspection import read_and_inspect
from edgeres.judge import read_reference
from edgeres.measurements import Benchmark
from edgeres.reporting import benchmark_of
from edgeres.signatures import Keys, key_list
from edgeres.validation import decibels
from edgeres.validation.baseline import unpacked
from edgeres.validation.paired import paired_change

SHOWN = 20  # rows and samples that people see of each kind; the data has all

Facts = Dict[str, Any]


class Table(NamedTuple):
    """Rows to print, under columns and a title."""

    title: str
    columns: Sequence[str]
    rows: List[List[str]]


def difference(first: Path, second: Path, trusted_keys: Optional[Keys] = None) -> Facts:
    """Return how the ``second`` of two verified bundles differs from the ``first``.

    Pairs are ``[first, second]``, None where one has none. ``recipe`` has the settings that differ; ``ranges`` every
    tensor whose ``amax`` differs, the largest ratio first; ``layers`` those planned in, and ``engines`` those that run
    in, another precision; ``noise`` each layer's own SQNR in dB and share of the noise; ``accuracy`` the drop from the
    first to the second in percentage points, paired by sample, and ``answers`` the samples that they answer
    differently; both None where ``unpaired`` says why. ``latency`` is the engines' p50 in ms by batch size.

    Args:
        trusted_keys: as of :func:`edgeres.load`: one of them has to have signed each bundle.

    Raises:
        BundleError: one is no bundle, or is damaged, or nobody who is trusted vouches for it.
    """
    keys = key_list(trusted_keys)
    manifests, facts = zip(*(read_and_inspect(folder, keys) for folder in (first, second)))
    accuracy, answers, unpaired = _paired((first, second), manifests)
    return {
        "bundles": [str(first), str(second)],
        "recipe": _settings(*(manifest.recipe for manifest in manifests)),
        "ranges": _ranges(*(found["ranges"] for found in facts)),
        "layers": _precisions(*(found["plan"] for found in facts)),
        "engines": _engines(*manifests),
        "noise": _noise(*(found["errors"] for found in facts)),
        "verdicts": [_verdict(manifest.report) for manifest in manifests],
        "accuracy": accuracy,
        "answers": answers,
        "unpaired": unpaired,
        "latency": _latency(*(benchmark_of(path, made) for path, made in zip((first, second), manifests))),
    }


def _settings(first: Facts, second: Facts) -> Facts:
    """Return the recipes' settings that differ: ``[first, second]`` by dotted name."""
    one, other = _flat(first), _flat(second)
    names = sorted({*one, *other})
    return {name: [one.get(name), other.get(name)] for name in names if one.get(name) != other.get(name)}


def _flat(table: Facts, prefix: str = "") -> Facts:
    found: Facts = {}
    for key, value in table.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _ranges(first: Facts, second: Facts) -> List[Facts]:
    """Return the tensors whose range differs; ``ratio`` is the second's ``amax`` over the first's."""
    found = []
    for name in {**first, **second}:
        reach = [side[name]["amax"] if name in side else None for side in (first, second)]
        shift = [side[name]["shift"] > 0 if name in side else None for side in (first, second)]
        ratio = reach[1] / reach[0] if reach[0] and reach[1] is not None else None
        if reach[0] != reach[1] or shift[0] != shift[1]:
            found.append({"tensor": name, "amax": reach, "shifted": shift, "ratio": ratio})
    return sorted(found, key=lambda row: -_distance(row["ratio"]))


def _distance(ratio: Optional[float]) -> float:
    """Return how far a ratio is from 1, either way; what only one bundle has is farthest."""
    return abs(math.log(ratio)) if ratio and ratio > 0 else math.inf


def _precisions(first: List[Facts], second: List[Facts]) -> List[Facts]:
    """Return the layers that are planned in another precision, or in one of the bundles alone."""
    one, other = ({layer["name"]: layer for layer in plan} for plan in (first, second))
    found = []
    for name, layer in {**other, **one}.items():
        kinds = [side[name]["precision"] if name in side else None for side in (one, other)]
        reason = other.get(name, layer)["reason"]
        if kinds[0] != kinds[1]:
            found.append({"layer": layer["module"] or name, "precision": kinds, "reason": reason})
    return found


def _engines(first: Manifest, second: Manifest) -> List[Facts]:
    """Return, for each target that both have an engine for, how many layers run in which precision, where that differs
    and the builders reported it."""
    there = {engine.target: engine.summary for engine in second.engines}
    found = []
    for engine in first.engines:
        one, other = engine.summary, there.get(engine.target)
        if one is not None and other is not None and one.precisions != other.precisions:
            found.append({"target": engine.target, "layers": [one.precisions, other.precisions]})
    return found


def _noise(first: Optional[Facts], second: Optional[Facts]) -> List[Facts]:
    """Return each layer's own SQNR in dB, and its share of the noise, in both; the largest change of SQNR first."""
    if first is None or second is None:
        return []
    one, other = ({layer["node"]: layer for layer in errors["layers"]} for errors in (first, second))
    found = [
        {
            "layer": layer["module"] or node,
            "own_sqnr_db": [layer["own_sqnr_db"], other[node]["own_sqnr_db"]],
            "share": [layer["share"], other[node]["share"]],
        }
        for node, layer in one.items()
        if node in other
    ]
    return sorted(found, key=lambda row: -_gap(*row["own_sqnr_db"]))


def _gap(one: Optional[float], other: Optional[float]) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other)


def _verdict(report: Optional[Report]) -> Optional[Facts]:
    if report is None:
        return None
    names = ("verdict", "samples", "top1_reference", "top1_engine", "drop_pp", "drop_ci95_pp", "agreement", "sqnr_db")
    return {name: getattr(report, name) for name in names}


def _paired(
    folders: Tuple[Path, Path], manifests: Sequence[Manifest]
) -> Tuple[Optional[Facts], Optional[List[Facts]], str]:
    """Return what the second loses against the first, the samples that they answer differently, and why neither can be
    told, where it cannot."""
    one, other = (manifest.report for manifest in manifests)
    if one is None or other is None:
        return None, None, "not both bundles hold a verdict"
    if not one.answers or not other.answers or not one.samples_sha256:
        return None, None, "not both bundles tell their answers, sample by sample: build them again"
    if (one.samples, one.samples_sha256) != (other.samples, other.samples_sha256):
        return None, None, "they were judged on different samples, and only the same ones can be paired"
    content = read_listed(folders[0], manifests[0], files.REFERENCE)
    if content is None:
        return None, None, f"{folders[0]} has no {files.REFERENCE}, which holds the labels"
    reference = read_reference(content, f"{folders[0]}/{files.REFERENCE}")
    if len(reference["logits"]) != one.samples:
        return None, None, f"{folders[0]}/{files.REFERENCE} is of other samples than its verdict: build it again"
    before, after = (unpacked(report.answers, one.samples) for report in (one, other))
    labels = reference.get("labels")
    accuracy: Facts = {"samples": one.samples, "agreement": float(np.mean(before == after))}
    if labels is not None:
        change = paired_change(before == labels, after == labels, other.max_drop_pp, other.policy)
        accuracy.update(
            drop_pp=change.drop_pp,
            drop_ci95_pp=list(change.interval_pp),
            only_first_correct=change.discordant.only_reference_correct,
            only_second_correct=change.discordant.only_engine_correct,
            mcnemar_p=change.mcnemar_p,
        )
    return accuracy, _answers(reference, before, after), ""


def _answers(reference: Dict[str, np.ndarray], before: np.ndarray, after: np.ndarray) -> List[Facts]:
    """Return the samples that are answered differently, in their order, with answers as numbers of classes."""
    labels = reference.get("labels")
    return [
        {
            "name": str(reference["names"][index]),
            "label": None if labels is None else int(labels[index]),
            "answers": [int(before[index]), int(after[index])],
        }
        for index in np.flatnonzero(before != after).tolist()
    ]


def _latency(first: Optional[Benchmark], second: Optional[Benchmark]) -> List[Facts]:
    """Return both engines' p50 in ms at each batch size that both were measured at."""
    if first is None or second is None:
        return []
    one, other = (
        {found.batch: found.p50_ms for found in side.latencies if found.model == side.precision}
        for side in (first, second)
    )
    return [{"batch": size, "p50_ms": [one[size], other[size]]} for size in one if size in other]


def tables(found: Facts) -> List[Table]:
    """Return a difference as tables, each with its first rows; those without rows are left out."""
    made = [
        Table(
            "recipe",
            ("setting", "first", "second"),
            [[name, *map(_word, pair)] for name, pair in found["recipe"].items()],
        ),
        Table(
            "ranges, the largest change first",
            ("tensor", "first", "second", "change"),
            [
                [row["tensor"], *map(_reach, row["amax"], row["shifted"]), _change(row["ratio"])]
                for row in found["ranges"]
            ],
        ),
        Table(
            "layers planned in another precision",
            ("layer", "first", "second", "why"),
            [[row["layer"], *map(_word, row["precision"]), row["reason"]] for row in found["layers"]],
        ),
        Table(
            "layers of the engines",
            ("target", "first", "second"),
            [[row["target"], *map(_counts, row["layers"])] for row in found["engines"]],
        ),
        Table(
            "noise, the largest change of a layer's own SQNR first",
            ("layer", "own, first", "second", "of the noise, first", "second"),
            [
                [row["layer"], *map(decibels, row["own_sqnr_db"]), *(f"{100 * x:.1f} %" for x in row["share"])]
                for row in found["noise"]
                if _gap(*row["own_sqnr_db"]) >= 0.05
            ],
        ),
        Table("accuracy", ("", "first", "second"), _accuracy_rows(*found["verdicts"])),
        Table(
            "latency, p50 in ms (not in turns; with an interval: edgeres bench SECOND --against FIRST)",
            ("batch", "first", "second", "change"),
            [
                [str(row["batch"]), *(f"{x:.3f}" for x in row["p50_ms"]), _change(row["p50_ms"][1] / row["p50_ms"][0])]
                for row in found["latency"]
            ],
        ),
        Table(
            "samples that they answer differently",
            ("sample", "label", "first", "second"),
            [[row["name"], _word(row["label"]), *map(str, row["answers"])] for row in found["answers"] or ()],
        ),
    ]
    return [_shortened(table) for table in made if table.rows]


def words(found: Facts) -> List[str]:
    """Return the two bundles' accuracy in sentences."""
    change = found["accuracy"]
    if change is None:
        return [f"Accuracy is not compared: {found['unpaired']}."]
    same = f"The same answer on {100 * change['agreement']:.2f} % of {change['samples']:,} samples."
    if "drop_pp" not in change:
        return [f"{same} Without labels nobody knows which answers are right."]
    low, high = change["drop_ci95_pp"]
    certain = "beyond chance" if low > 0 or high < 0 else "which may be chance"
    verb = "loses" if change["drop_pp"] > 0 else "gains"
    moved = f"{verb} {abs(change['drop_pp']):.2f} pp of top-1, {certain}" if change["drop_pp"] else "keeps top-1"
    return [
        same,
        f"The second {moved} (95 % interval of the loss {low:.2f} to {high:.2f}): the first alone is right on "
        f"{change['only_first_correct']}, the second alone on {change['only_second_correct']}.",
    ]


def _shortened(table: Table) -> Table:
    more = len(table.rows) - SHOWN
    if more <= 0:
        return table
    return table._replace(title=f"{table.title} ({SHOWN} of {len(table.rows)}; all: --json)", rows=table.rows[:SHOWN])


def _accuracy_rows(first: Optional[Facts], second: Optional[Facts]) -> List[List[str]]:
    sides = [side or {} for side in (first, second)]
    rows = [
        ("verdict", [side.get("verdict", "not judged") for side in sides]),
        ("top-1, FP32", [_share(side.get("top1_reference")) for side in sides]),
        ("top-1", [_share(side.get("top1_engine")) for side in sides]),
        ("same answer as FP32", [_share(side.get("agreement")) for side in sides]),
        ("SQNR", [decibels(side["sqnr_db"]) if side else "–" for side in sides]),
    ]
    return [[name, *pair] for name, pair in rows]


def _share(value: Optional[float]) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _word(value: Any) -> str:
    if value is None or value == []:
        return "–"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _reach(amax: Optional[float], shifted: Optional[bool]) -> str:
    if amax is None:
        return "–"
    return f"0 to {amax:.4g}" if shifted else f"±{amax:.4g}"


def _change(ratio: Optional[float]) -> str:
    return "" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def _counts(precisions: Dict[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in sorted(precisions.items()))
