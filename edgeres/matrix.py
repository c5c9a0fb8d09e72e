"""A build matrix: the bundles of a recipe with ``[[targets]]``, one after the other, each whole, and one table of them.

What two rows have in common is done once: a stage whose key is another row's is taken over from its bundle, as it would
be from an earlier one. So the second row does not export again, nor run the calibration samples again. What cannot be
compiled on this machine becomes a bundle without that engine, whose verdict is on what its model means; its engine is
made where it runs. A row that fails stops no other.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import msgspec

from edgeres import files
from edgeres.artifacts import Bundle, Manifest, QuantizedModel, from_data
from edgeres.bundle import read_manifest
from edgeres.errors import BundleError, EdgeresError
from edgeres.pipeline import Terms
from edgeres.progress import Progress
from edgeres.recipe import Recipe, recipe_data
from edgeres.rows import Planned
from edgeres.targets import board_needed, resolve
from edgeres.workforce import hired

BUILT, NEEDS_A_BOARD, FAILED = "built", "needs a board", "failed"

Run = Callable[[Planned, Path, Progress, Terms], Bundle]
"""Builds the bundle of a row in a folder, on some terms."""


class Row(msgspec.Struct, frozen=True):
    """What became of a row: ``state`` is ``built``, ``needs a board`` or ``failed``, and ``message`` says why.

    ``verdict``, ``drop_pp`` and ``sqnr_db`` are the report's. ``model_bytes`` is the size of the file that runs (the
    engine, or else the model), ``bundle_bytes`` that of all files. ``seconds`` is what the row took; ``reused`` are the
    stages that were not run, and ``saved_seconds`` what they took when they were.
    """

    name: str
    bundle: str
    precision: str
    target: str
    state: str
    message: str = ""
    verdict: str = ""
    drop_pp: Optional[float] = None
    sqnr_db: Optional[float] = None
    model_bytes: Optional[int] = None
    bundle_bytes: Optional[int] = None
    seconds: float = 0.0
    reused: Tuple[str, ...] = ()
    saved_seconds: float = 0.0
    warnings: Tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether the row came to a bundle whose verdict is not ``fail``."""
        return self.state != FAILED and self.verdict != "fail"


class Matrix(msgspec.Struct, frozen=True):
    """The rows of a matrix, in the recipe's order."""

    rows: Tuple[Row, ...]

    @property
    def good(self) -> bool:
        """Whether no row failed, and no verdict is ``fail``."""
        return all(row.good for row in self.rows)


class _Watch(Progress):
    """Hands on what is told, and remembers what was reused."""

    def __init__(self, to: Progress) -> None:
        self._to = to
        self.taken: List[str] = []

    def stage(self, name: str, text: str) -> None:
        self._to.stage(name, text)

    def advance(self, done: int, total: int) -> None:
        self._to.advance(done, total)

    def finished(self, name: str, seconds: float, text: str) -> None:
        self._to.finished(name, seconds, text)

    def reused(self, name: str, text: str) -> None:
        self.taken.append(name)
        self._to.reused(name, text)

    def warn(self, text: str) -> None:
        self._to.warn(text)


def build_rows(
    rows: Sequence[Planned],
    out: Optional[Path] = None,
    progress: Optional[Progress] = None,
    cluster: Optional[str] = None,
    run: Optional[Run] = None,
) -> Matrix:
    """Build the bundle of each row, and return what became of them; a row that fails stops no other.

    Args:
        out: the folder that the bundles go to, each in one of its own; by default ``build``.
        cluster: as of :func:`edgeres.pipeline.build`; it is joined once, and left at the end.
        run: builds one row; by default :func:`edgeres.pipeline.build`.

    Raises:
        BundleError: ``out`` is a bundle itself.
        ClusterError: the cluster does not answer, or is not fit for it; nothing was built.
    """
    if out is not None and (out / files.MANIFEST).is_file():
        raise BundleError(f"{out} is a bundle, and one of several cannot lie in it. Name another folder: --out FOLDER")
    told = progress or Progress()
    built: List[Bundle] = []
    found: List[Row] = []
    with hired(cluster, told.warn) as workforce:  # once, for all rows
        for number, planned in enumerate(rows, 1):
            place = planned.place(out)
            told.row(number, len(rows), f"{planned.name}: {place}")
            row, bundle = _built(planned, place, told, Terms(tuple(built), False, workforce), run or _run)
            found.append(row)
            if bundle is not None:
                built.append(bundle)
    return Matrix(tuple(found))


def terms_of(source: Union[str, Path, None], recipe: Recipe) -> Optional[Terms]:
    """Return the terms on which a bundle is built again whose engine is made elsewhere, so that it can be where that
    engine cannot; None of any other bundle or recipe.

    Such a bundle has a verdict, and compiled nothing. It may have got the engine since, where that runs.

    Args:
        source: what is built: a bundle, or what else a recipe comes from.
        recipe: that of the bundle, with flags on top. Another target than the bundle's is to be compiled for, here.
    """
    if source is None or not os.path.isdir(source):
        return None
    with contextlib.suppress(BundleError):  # said where the bundle is needed
        manifest = read_manifest(source)
        then, now = (data.get("engine", {}) for data in (manifest.recipe, recipe_data(recipe)))
        same = all(then.get(key) == now.get(key) for key in ("backend", "target"))
        if same and "validate" in manifest.stages and "compile" not in manifest.stages:
            return Terms(elsewhere=board_needed(recipe.engine) is not None)
    return None


def _run(planned: Planned, place: Path, progress: Progress, terms: Terms) -> Bundle:
    from edgeres.pipeline import build

    return build(planned.recipe, place, progress=progress, terms=terms)


def _built(planned: Planned, place: Path, progress: Progress, terms: Terms, run: Run) -> Tuple[Row, Optional[Bundle]]:
    """Build one row; return what became of it, and its bundle where there is one."""
    engine = planned.recipe.engine
    watch, start = _Watch(progress), time.perf_counter()
    precision, target = planned.recipe.precision, engine.target or ""
    try:
        target = resolve(engine)[1]
        obstacle = board_needed(engine)
        bundle = run(planned, place, watch, terms._replace(elsewhere=obstacle is not None))
    except EdgeresError as problem:
        seconds = round(time.perf_counter() - start, 3)
        row = Row(planned.name, str(place), precision, target, FAILED, str(problem), seconds=seconds)
        return row, None
    manifest, report = bundle.manifest, bundle.report
    has_engine = any(one.target == target for one in manifest.engines)
    there = f"There: edgeres compile {shlex.quote(place.name)} --target {target}"
    row = Row(
        name=planned.name,
        bundle=bundle.path,
        precision=precision,
        target=target,
        state=BUILT if has_engine else NEEDS_A_BOARD,
        message="" if has_engine else f"its engine cannot be compiled here: {obstacle}\n{there}",
        verdict=report.verdict if report is not None else "",
        drop_pp=report.drop_pp if report is not None else None,
        sqnr_db=report.sqnr_db if report is not None else None,
        model_bytes=_model_bytes(manifest, target),
        bundle_bytes=sum(ref.bytes for ref in manifest.files),
        seconds=round(time.perf_counter() - start, 3),
        reused=tuple(dict.fromkeys(watch.taken)),
        saved_seconds=round(sum(_seconds(manifest)[name] for name in {*watch.taken} & {*manifest.stages}), 3),
        warnings=manifest.warnings,
    )
    return row, bundle


def _seconds(manifest: Manifest) -> Dict[str, float]:
    return {name: record.seconds for name, record in manifest.stages.items()}


def _model_bytes(manifest: Manifest, target: str) -> Optional[int]:
    """Return the size of what runs: the engine for the target, or else the model in the bundle's precision."""
    for engine in manifest.engines:
        if engine.target == target:
            return engine.file.bytes
    record = manifest.stages.get("quantize")
    name = files.FP32_MODEL if record is None else from_data(record.facts, QuantizedModel, "stage quantize").file.path
    return next((ref.bytes for ref in manifest.files if ref.path == name), None)
