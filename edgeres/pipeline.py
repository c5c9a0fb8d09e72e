"""The order of the work: hygiene, export, observe, equalize, calibrate, quantize, compile, reference, validate.

Each stage turns one noun into the next, leaves files in the workspace, and is skipped where a hash of everything it
depends on says that its result is there already. Rooms are entered late, so that a robot that only validates needs
none of the tools that build.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from edgeres import __version__, comparison, engines, exporting, files, imported, quantization
from edgeres.artifacts import (
    Bundle,
    Engine,
    ExportedModel,
    Hygiene,
    Imported,
    Manifest,
    QuantizedModel,
    Report,
    StageRecord,
    from_data,
    to_data,
)
from edgeres.errors import BundleError, CalibrationError
from edgeres.progress import Progress, counted
from edgeres.provenance import provenance
from edgeres.recipe import Recipe, recipe_data
from edgeres.stages import FORMAT, STAGES, Made, Reached
from edgeres.workforce import Alone, Workforce, hired
from edgeres.workspace import Workspace, stage_key

if TYPE_CHECKING:
    from edgeres.samples import Samples


class Terms(NamedTuple):
    """On what terms a bundle is built that is one of several (:mod:`edgeres.matrix`): ``lenders`` are those that are
    done, whose stages are taken over where they would come out the same; ``elsewhere`` says that the engine is made on
    another machine, so that the verdict is on what the model means; ``workforce`` runs the samples of all of them."""

    lenders: Tuple[Bundle, ...] = ()
    elsewhere: bool = False
    workforce: Optional[Workforce] = None


class Build:
    """One run of the pipeline over one recipe: what its stages share, and these in order.

    What a stage does stands in a module of its own, as functions of the build.
    """

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace,
        until: str,
        progress: Progress,
        workforce: Optional[Workforce] = None,
    ) -> None:
        self.recipe = recipe
        self.workspace = workspace
        self.last = STAGES.index(until)
        self.progress = progress
        self.workforce = workforce or Alone()
        self.elsewhere = False  # whether the engine is made on another machine
        self.engines: Tuple[Engine, ...] = ()
        self.report: Optional[Report] = None
        self.warnings: List[str] = []
        self.said: List[str] = []  # of these, in the running stage
        self.level: Optional[int] = None  # of recovery, where the accuracy budget asks for another than the recipe
        self.given_back: Dict[str, str] = {}  # node → why the accuracy budget keeps it in float
        self.grouped: Dict[str, str] = {}  # convolutions in groups: node → why a target may run it better in float
        self.imported: Optional[Imported] = None  # a file's own ranges, where they are kept
        self.calibration: Optional[Samples] = None
        self.validation: Optional[Samples] = None

    @property
    def judges(self) -> bool:
        """Whether this build was to go as far as a verdict."""
        return STAGES[self.last] == "validate"

    @property
    def left_float(self) -> Dict[str, str]:
        """The nodes that the recipe does not name and that stay in float all the same, and why."""
        from edgeres.compilation import grouped_precision

        by_target = self.grouped if self.grouped and grouped_precision(self.recipe) == "float" else {}
        own = self.imported.float_layers if self.imported is not None else ()
        return {**by_target, **dict.fromkeys(own, imported.REASON), **self.given_back}

    def warn(self, text: str) -> None:
        if text not in self.said:
            self.said.append(text)
        if text not in self.warnings:  # each net that is tried for the accuracy budget has the same to say
            self.warnings.append(text)
            self.progress.warn(text)

    def stage(self, name: str, inputs: Dict[str, Any], text: str, work: Callable[[], Made]) -> StageRecord:
        """Run a stage, or take its earlier result over where ``inputs`` say that it would come out the same."""
        key = self.key(name, inputs)
        known = self.workspace.records.get(name)
        if known is not None and known.key == key:
            return self._retold(known)
        earlier = self.workspace.reuse(name, key)
        if earlier is not None:
            self.progress.reused(name, text)
            return self._retold(earlier)
        if STAGES.index(name) > self.last:
            raise Reached
        self.progress.stage(name, text)
        self.said = []
        start = time.perf_counter()
        noun, paths, made = work()
        seconds = time.perf_counter() - start
        record = self.workspace.finish(name, key, paths, seconds, to_data(noun), tuple(self.said))
        self.progress.finished(name, seconds, made)
        return record

    def key(self, name: str, inputs: Dict[str, Any]) -> str:
        """Return the key of a stage's result: a hash of everything that it depends on."""
        return stage_key(name, {**inputs, "format": FORMAT, "edgeres": __version__})

    def _retold(self, record: StageRecord) -> StageRecord:
        """Say again what was warned of while the stage ran: it is still true of its result."""
        for text in record.warnings:
            self.warn(text)
        return record

    def open_samples(self) -> None:
        """Find the calibration and validation samples and refuse what is wrong with them; nothing is decoded yet."""
        from edgeres.preflight import open_inputs, require_backend, require_host_packages

        require_host_packages(self.recipe)
        if self.last >= STAGES.index("compile") and not self.elsewhere:
            require_backend(self.recipe)
        if self.recipe.precision != "int8" and STAGES[self.last] in ("observe", "calibrate"):
            raise CalibrationError(f"{self.recipe.precision} needs no ranges. Calibrate for int8: --precision int8")
        self.calibration, self.validation = open_inputs(
            self.recipe, STAGES[self.last] != "export", STAGES[self.last] == "validate", self.workforce.look
        )
        wanted = self.recipe.calibration.count
        if self.calibration is not None and self.recipe.precision == "int8" and len(self.calibration) < wanted:
            found = counted(len(self.calibration), "calibration sample")
            self.warn(f"there {'is' if len(self.calibration) == 1 else 'are'} {found}; {wanted} were asked for")

    def hygiene(self) -> None:
        """Say what is wrong with the calibration samples, before any time is spent on them.

        However wrong they are, the build goes on: the verdict at its end, with numbers, is what a gate needs.
        """
        samples, others, frame = self.calibration, self.validation, self.recipe.input
        # A letterbox scales each frame otherwise; to tell sharp from blurred, about as large as its input will do.
        resize = max(frame.size) if frame.size is not None and frame.fit == "letterbox" else frame.resize
        if samples is None or self.recipe.precision != "int8":
            return
        inputs = {
            "calibration": samples.sample_set().digest,
            "available": samples.whole().names,
            "validation": others.sample_set().digest if others is not None else None,
            "size": frame.size,
            "resize": resize,
        }

        def work() -> Made:
            from edgeres.samples import examine

            found = examine(samples, others, size=frame.size, resize=resize, watch=self.progress.advance)
            said = counted(len(found.warnings), "warning") if found.warnings else "no warnings"
            return found, (), f"{counted(found.calibration + found.validation, 'sample')} looked at, {said}"

        with contextlib.suppress(Reached):
            record = self.stage("hygiene", inputs, counted(len(samples), "calibration sample"), work)
            for text in from_data(record.facts, Hygiene, "stage hygiene").warnings:
                self.warn(text)

    def export(self) -> ExportedModel:
        """Write the FP32 ONNX."""
        return exporting.export(self)

    def quantize(self, exported: ExportedModel) -> QuantizedModel:
        """Write the model in the wanted precision; int8 observes, equalizes and calibrates first."""
        return quantization.quantize(self, exported)

    def make(self, exported: ExportedModel) -> None:
        """Quantize, compile and validate at the present level of recovery, with what is given back to float."""
        model = self.quantize(exported)
        if self.elsewhere:
            engine = engines.meaning(self, model)
        else:
            engine = engines.judged(self, model, engines.made(self, exported, model))
        comparison.validate(self, exported, model, engine)


def build(
    recipe: Recipe,
    out: Optional[Path] = None,
    until: str = "validate",
    progress: Optional[Progress] = None,
    cluster: Optional[str] = None,
    terms: Optional[Terms] = None,
) -> Bundle:
    """Run the pipeline and return the finished bundle; an earlier bundle at ``out`` is replaced only at the very end.

    Args:
        out: the bundle's folder; by default ``build/<name>-<precision>``.
        until: the last stage to run, of ``STAGES``; results of later ones are kept only where they still hold.
        cluster: who runs the samples, ``local`` or a Dask scheduler's address; None for this machine alone. The bundle
            is the same, to the bit.
        terms: of a bundle that is one of several. A workforce among them takes the place of ``cluster``.

    Raises:
        EdgeresError: with what is wrong and what to do; the earlier bundle, if any, is whole.
    """
    from edgeres.budget import build_within
    from edgeres.reporting import with_page

    if until not in STAGES:
        raise BundleError(f"there is no stage {until!r}. The stages are {', '.join(STAGES)}")
    place = out or default_out(recipe)
    progress = progress or Progress()
    terms = terms or Terms()
    given = terms.workforce
    at_work = hired(cluster, progress.warn) if given is None else contextlib.nullcontext(given)
    with at_work as workforce, Workspace(place) as workspace:
        job = Build(recipe, workspace, until, progress, workforce)
        job.elsewhere, workspace.lenders = terms.elsewhere, terms.lenders
        job.open_samples()
        with contextlib.suppress(Reached):
            job.hygiene()
            exported = job.export()
            build_within(job, exported)
        manifest = _manifest(job)
        lost = [path for path in workspace.left_out(manifest) if path != files.PAGE]  # which is made anew
        if lost:
            for text in _losses(lost, place):
                job.warn(text)
            manifest = _manifest(job)
        manifest = with_page(workspace.folder, manifest)
        unsigned = workspace.signature_loss(manifest)
        workspace.commit(manifest)
        for text in unsigned:
            job.progress.warn(text)  # the manifest, which may be signed next, does not tell of it
    return Bundle(str(place), manifest)


def default_out(recipe: Recipe) -> Path:
    """Return the folder that a recipe's bundle goes to unless told otherwise."""
    return Path("build") / f"{recipe.name}-{recipe.precision}"


def _losses(paths: List[str], place: Path) -> List[str]:
    """Return what to say of files of the earlier bundle that a new one does not have, with how to make them again."""
    engines = [path for path in paths if path.startswith(files.ENGINES)]
    others = [path for path in paths if path not in engines]
    said = [f"{', '.join(others)} no longer fit and are left out. Make them again: edgeres build {place}"]
    targets = [Path(path).stem for path in engines]
    again = " and ".join(f"edgeres compile {place} --target {target}" for target in targets)
    compiled = [f"{', '.join(engines)} no longer fit and are left out. Compile again: {again}"]
    return (said if others else []) + (compiled if engines else [])


def _manifest(job: Build) -> Manifest:
    """Bind everything that was made; the resolved recipe goes into the bundle too."""
    from edgeres.recipe_file import recipe_toml

    job.workspace.write(files.RECIPE, recipe_toml(job.recipe))
    made = {ref.path for record in job.workspace.records.values() for ref in record.files}
    paths = sorted(made | {engine.file.path for engine in job.engines} | {files.RECIPE})
    return Manifest(
        name=job.recipe.name,
        precision=job.recipe.precision,
        recipe=recipe_data(job.recipe),
        preprocessing=job.recipe.preprocessing,
        files=tuple(files.file_ref(job.workspace.folder, path) for path in paths),
        stages=job.workspace.records,
        provenance=provenance(Path.cwd()),
        engines=job.engines,
        report=job.report,
        warnings=tuple(job.warnings),
    )
