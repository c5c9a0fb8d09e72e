"""What `inspect` and `doctor` found, as tables for people; their --json is the data itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from edgeres.artifacts import Manifest, QuantizationErrors, TensorRange, from_data
from edgeres.errors import printable
from edgeres.inspection import ERROR_COLUMNS, error_row, grouped, pair_row, range_words
from edgeres.matrix import Matrix
from edgeres.progress import counted
from edgeres.targets import here
from edgeres.terminal import show_ladder, show_manifest, show_rows
from edgeres.validation import decibels
from edgeres.validation.cases import one_line

WORST = 10  # layers that `inspect` shows to people; --json has all


def show_matrix(matrix: Matrix) -> None:
    """Print what became of the rows of a matrix, and of those that are not built, why."""
    columns = ("bundle", "precision", "target", "state", "verdict", "drop, pp", "SQNR", "model", "s", "saved, s")
    rows = [
        [
            row.bundle,
            row.precision,
            row.target,
            row.state,
            row.verdict,
            "" if row.drop_pp is None else f"{row.drop_pp:+.2f}",
            decibels(row.sqnr_db) if row.verdict else "",
            "" if row.model_bytes is None else f"{row.model_bytes / 1e6:.2f} MB",
            f"{row.seconds:.1f}",
            f"{row.saved_seconds:.1f}" if row.reused else "",
        ]
        for row in matrix.rows
    ]
    show_rows(columns, rows)
    for row in matrix.rows:
        if row.message:
            click.echo(printable(f"{row.name}: {row.message}"))
        if row.reused:
            click.echo(one_line(f"{row.name}: taken over, and not run again: {', '.join(row.reused)}"))


def show_inside(path: Path, manifest: Optional[Manifest], facts: Dict[str, Any]) -> None:
    """Print what `inspect` found in a file or in a bundle."""

    if manifest is not None:
        show_manifest(str(path), manifest)
        if manifest.climb is not None:
            show_ladder(manifest.climb)
        if facts["sensitivity"] is not None:
            columns = ["quantized alone", "costs, % of answers", "changed", "SQNR"]
            show_rows(columns, _cost_rows(facts["sensitivity"]["layers"]), "layers and blocks, on calibration samples")
        rows = [[x["module"] or x["name"], x["type"], x["precision"], x["reason"]] for x in facts["plan"]]
        show_rows(["module", "type", "precision", "why"], rows, "layers, as planned")
        if facts["layers"] != facts["plan"]:
            rows = [[x["module"] or x["name"], x["type"], x["precision"]] for x in facts["layers"]]
            show_rows(["module", "type", "runs in"], rows, f"layers of the engine for {facts['layers'][0]['target']}")
        show_rows(["tensor", "range"], _range_rows(facts["ranges"]), "ranges")
        if facts["hygiene"] is not None and facts["hygiene"]["comparisons"]:
            columns = ["images'", "calibration", "validation", "distance", ""]
            show_rows(columns, _comparison_rows(facts["hygiene"]), "medians, and the distance of the distributions")
        if facts["errors"]:
            show_rows(*_error_rows(facts["errors"]))
    else:
        rows = [[x["name"], x["type"], x["precision"]] for x in facts["layers"]]
        made = f", quantized by {facts['quantized_by']}" if facts["quantized_by"] else ""
        show_rows(["layer", "type", "precision"], rows, f"{path}, opset {facts['opset']}{made}")
        if facts["ranges"]:
            columns = ["tensor", "role", "type", "zero point", "reach", "channels"]
            show_rows(columns, [pair_row(name, pair) for name, pair in facts["ranges"].items()], "Q/DQ pairs")
        for problem in grouped(facts["lint"]):
            click.echo(one_line(f"TensorRT rule broken: {problem}"))


def show_health(facts: Dict[str, Any]) -> None:
    """Print what `doctor` found."""

    click.echo(
        f"{facts['system']}, Python {facts['python']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.1f} GiB"
    )
    click.echo(f"int8 on this CPU: {facts['cpu_int8']}")
    gpu = facts["gpu"]
    click.echo(f"GPU: {'usable' if gpu['gpu_usable'] else 'none that TensorRT and CUDA can use from here'}")
    if gpu["jetson"]:
        click.echo(printable(f"Jetson: {', '.join(f'{name} {text}' for name, text in gpu['jetson'].items())}"))
    show_rows(["target", "what", "here"], [[x["target"], x["what"], here(x)] for x in gpu["targets"]])
    speakers = {name: gpu[name] for name in ("tensorrt", "tensorrt_rtx", "cuda_python", "pycuda")}
    installed = {**facts["packages"], **speakers}.items()
    show_rows(["package", "version"], [[name, number or "not installed"] for name, number in installed])
    rows = [[x["what"], "yes" if x["can"] else "no", x["install"] or ""] for x in facts["abilities"]]
    show_rows(["can it", "", "to make it so"], rows)


def _error_rows(errors: Dict[str, Any]) -> Tuple[List[str], List[List[str]], str]:
    """Return columns, rows and title of the layers that cause most of the error."""

    found = from_data(errors, QuantizationErrors, "errors")
    worst = found.layers[:WORST]
    samples = counted(found.samples, "sample")
    title = f"where the error comes from: the worst {len(worst)} of {len(found.layers)}, on {samples}"
    return list(ERROR_COLUMNS), [error_row(layer) for layer in worst], title


def _range_rows(ranges: Dict[str, Any]) -> List[List[str]]:

    return [[name, range_words(from_data(value, TensorRange, name))] for name, value in ranges.items()]


def _cost_rows(costs: List[Dict[str, Any]]) -> List[List[str]]:

    return [
        [x["layer"], f"{100 * x['expected']:.2g}", f"{100 * x['changed']:.2g} %", decibels(x["sqnr_db"])] for x in costs
    ]


def _comparison_rows(hygiene: Dict[str, Any]) -> List[List[str]]:
    return [
        [x["statistic"], *(f"{x[key]:.3f}" for key in ("calibration", "validation", "distance")), "far" * x["far"]]
        for x in hygiene["comparisons"]
    ]
