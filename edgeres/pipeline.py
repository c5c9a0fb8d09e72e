"""The order of the work: hygiene, export, observe, equalize, calibrate, quantize, compile, reference, validate.

Each stage turns one noun into the next, leaves files in the workspace, and is skipped where a hash of everything it
depends on says that its result is there already. Rooms are entered late, so that a robot that only validates needs
none of the tools that build.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from edgeres import __version__, files, imported, observation
from edgeres.artifacts import (
    Bundle,
    CalibrationTable,
    Engine,
    ExportedModel,
    FileRef,
    Hygiene,
    Imported,
    LayerPlan,
    Manifest,
    QuantizedModel,
    Report,
    StageRecord,
    TensorRange,
    from_data,
    from_json,
    to_data,
    to_json,
)
from edgeres.errors import BundleError, CalibrationError, EdgeresError, ExportError, QuantizationError, RecipeError
from edgeres.progress import Progress, counted
from edgeres.provenance import provenance, versions
from edgeres.recipe import Recipe, locate, recipe_data
from edgeres.workforce import Alone, Workforce, hired
from edgeres.workspace import Workspace, stage_key

if TYPE_CHECKING:
    from edgeres.export.exported import Exported
    from edgeres.noise import Scaling
    from edgeres.samples import Samples

# Where a build may stop. Hygiene is looked at first of all, but an export alone does not need it.
STAGES = (
    "export", "hygiene", "observe", "equalize", "calibrate", "quantize", "compile", "reference", "sensitivity",
    "validate",
)  # fmt: skip
MODEL_STAGES = ("export", "calibrate", "quantize")  # what an engine is compiled from
FORMAT = 10  # part of every key: raise it when a stage's result changes with the same inputs

Made = Tuple[Any, Tuple[str, ...], str]
"""What a stage's work returns: its noun (or plain data), the files it wrote, and a few words on what it made."""


class Terms(NamedTuple):
    """On what terms a bundle is built that is one of several (:mod:`edgeres.matrix`): ``lenders`` are those that are
    done, whose stages are taken over where they would come out the same; ``elsewhere`` says that the engine is made on
    another machine, so that the verdict is on what the model means; ``workforce`` runs the samples of all of them."""

    lenders: Tuple[Bundle, ...] = ()
    elsewhere: bool = False
    workforce: Optional[Workforce] = None


class _Reached(Exception):
    """The last stage that was wanted is done, and the next has no earlier result to take over."""


class Build:
    """One run of the pipeline over one recipe; a method per stage, called in order by :func:`build`."""

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
            raise _Reached
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

        with contextlib.suppress(_Reached):
            record = self.stage("hygiene", inputs, counted(len(samples), "calibration sample"), work)
            for text in from_data(record.facts, Hygiene, "stage hygiene").warnings:
                self.warn(text)

    def export(self) -> ExportedModel:
        """Write the FP32 ONNX."""
        model, size = self.recipe.model, self.recipe.input.size

        def work() -> Made:
            exported = _exported(self.recipe)
            if model.num_classes not in (None, exported.num_classes):
                raise ExportError(
                    f"{model.source} answers {exported.num_classes} classes, not the {model.num_classes} asked for. "
                    "Leave --num-classes out, or let the model take it."
                )
            for text in exported.notes:
                self.warn(text)
            self.workspace.write(files.FP32_MODEL, exported.content)
            noun = exported.record(files.file_ref(self.workspace.folder, files.FP32_MODEL))
            made = f"{files.FP32_MODEL}, opset {noun.opset}, within {noun.max_relative_error:.0e} of the original"
            return noun, (files.FP32_MODEL,), made

        inputs: Dict[str, Any] = {
            "classes": model.num_classes,
            "size": size,
            "tools": versions(("torch", "onnx", "onnxruntime")),
        }
        if model.onnx is not None:
            from edgeres.export import files_of

            inputs["files"] = [_input_hash(path) for path in files_of(model.onnx)]
        else:
            inputs["source"] = model.source
        if model.onnx is None and self.recipe.architecture is None:
            inputs["once"] = os.urandom(16).hex()  # a callable's code may change in ways that no hash of ours sees
        if model.weights is not None:
            inputs["weights"] = _input_hash(locate(model.weights))
        elif self.recipe.architecture is not None:
            inputs["seed"] = model.seed
            self.warn(
                f"NO WEIGHTS: {model.source} has random ones (seed {model.seed}), so its answers mean nothing. "
                "For a trained network: --weights FILE"
            )
        exported = from_data(self.stage("export", inputs, model.source, work).facts, ExportedModel, "stage export")
        if exported.imported is not None:
            self.imported = imported.kept(self.recipe, exported)
            self.warn(imported.fate(self.recipe, exported.imported))
        if size is None:
            self.recipe = self.recipe.with_size((exported.input_shape[1], exported.input_shape[2]))
        if self.validation is not None:
            from edgeres.preflight import label_problems

            problems = label_problems(self.validation, exported.num_classes)
            if problems:
                raise RecipeError("cannot go on", problems)
        return exported

    def observe(self, exported: ExportedModel, tensors: Tuple[str, ...]) -> FileRef:
        """Run the calibration samples through the FP32 model and keep the statistics."""
        if self.calibration is None and STAGES.index("observe") > self.last:
            raise _Reached
        return observation.observe(self, exported, tensors)

    def calibrate(
        self,
        exported: ExportedModel,
        tensors: Tuple[str, ...],
        statistics: FileRef,
        shifted: FrozenSet[str],
        scalings: Dict[str, Scaling],
    ) -> CalibrationTable:
        """Choose each tensor's range, once scaled, from the statistics; ``shifted`` may use the full int8 range."""
        plan = self.recipe.calibration
        assert self.calibration is not None  # observe() has refused that
        chosen = self.calibration.sample_set()
        # The same counts may come from other samples or another model (a new classifier behind the same features), and
        # the table binds these too.
        inputs = {
            "statistics": statistics.sha256,
            "tensors": tensors,
            "method": plan.method,
            "percentile": plan.percentile,
            "model": exported.file.sha256,
            "samples": chosen.digest,
            "source": chosen.source,
            "preprocessing": to_data(self.recipe.preprocessing),
            "shifted": sorted(shifted),
            "scalings": files.sha256_file(self.workspace.folder / files.SCALINGS) if scalings else "",
        }
        given: Dict[str, float] = {}
        if self.imported is not None:
            given, own = imported.amax_of(self.imported, tensors, shifted)
            shifted = own | shifted.difference(given)
            inputs["given"] = given

        def work() -> Made:
            from edgeres.calibrate import Statistics, choose

            path = self.workspace.folder / files.STATISTICS
            found = Statistics.from_bytes(path.read_bytes(), str(path))
            ranges = choose(found, plan.method, plan.percentile, shifted, scalings, given)
            table = CalibrationTable(
                model_sha256=exported.file.sha256,
                preprocessing=self.recipe.preprocessing,
                samples=chosen,
                method=plan.method,
                percentile=plan.percentile,
                tensors={name: ranges[name] for name in tensors},
            )
            self.workspace.write(files.TABLE, to_json(table))
            for text in imported.range_notes(self.imported, table.tensors) if self.imported else ():
                self.warn(text)
            how = f"{counted(len(tensors), 'range')} by {plan.method}"
            how = f"{counted(len(given), 'range')} of the file, others by {plan.method}" if given else how
            return {"method": plan.method}, (files.TABLE,), how

        self.stage("calibrate", inputs, f"method {plan.method}", work)
        return self.table(exported)

    def table(self, exported: ExportedModel) -> CalibrationTable:
        """Return the calibration table, refusing one that belongs to something else."""
        path = self.workspace.folder / files.TABLE
        table = from_json(path.read_bytes(), CalibrationTable, str(path))
        samples = self.calibration.sample_set() if self.calibration is not None else None
        for what, same in (
            ("model", table.model_sha256 == exported.file.sha256),
            ("preprocessing", table.preprocessing == self.recipe.preprocessing),
            ("set of samples", samples is None or table.samples.digest == samples.digest),
        ):
            if not same:
                raise CalibrationError(f"{path} belongs to another {what}. Calibrate again: edgeres calibrate")
        return table

    def quantize(self, exported: ExportedModel) -> QuantizedModel:
        """Write the model in the wanted precision; int8 calibrates first."""
        precision, keep = self.recipe.precision, self.recipe.quantization.keep_float
        name = files.model_file(precision)
        if precision == "fp32":
            return QuantizedModel(exported.file, "fp32", ())
        inputs: Dict[str, Any] = {"model": exported.file.sha256, "precision": precision, "keep_float": keep}
        if precision == "fp16":

            def work() -> Made:
                from edgeres.quantize import fp16_content

                content, layers = fp16_content(self.workspace.folder / files.FP32_MODEL, exported.modules)
                self.workspace.write(name, content)
                ref = files.file_ref(self.workspace.folder, name)
                return QuantizedModel(ref, precision, layers), (name,), f"{name}, all layers in float16"

        else:
            from edgeres import explanation, recovery
            from edgeres.compilation import activation_range, pairs_weights
            from edgeres.quantize import grouped_in_file, int8_content, plan_file, shiftable_file, twin_file
            from edgeres.targets import resolve

            fp32 = self.workspace.folder / files.FP32_MODEL
            own, self.grouped = self.imported, grouped_in_file(fp32)
            inputs["left_float"] = self.left_float
            inputs["paired"] = paired = pairs_weights(self.recipe)
            inputs["for_cpu"] = resolve(self.recipe.engine)[1] == "cpu"
            placement = plan_file(fp32, exported.modules, keep, self.left_float, paired)
            every = {*plan_file(fp32, exported.modules, keep).tensors, *placement.tensors}
            shifted = activation_range(self.recipe) == "shifted"
            statistics = self.observe(exported, tuple(sorted(every)))
            allowed = shiftable_file(fp32, placement, not shifted) if shifted or recovery.level(self) else frozenset()
            scalings = recovery.equalize(self, exported, placement, statistics, allowed)
            if not shifted and not scalings:
                allowed = frozenset()  # what a shift buys for nothing is part of recovery, and there is none
            table = self.calibrate(exported, placement.tensors, statistics, allowed, scalings)
            inputs.update(ranges=to_data(table.tensors), **recovery.depends_on(self, scalings))
            inputs["errors"] = explanation.depends_on(self)
            steps = imported.steps_for(own, self.recipe)
            if own is not None:
                inputs["imported"], inputs["steps"] = to_data(own), steps  # which a DLA has none of

            def work() -> Made:
                recovered = recovery.content(self, exported, table.tensors, scalings)
                if recovered is None:
                    content, layers = int8_content(fp32, placement, table.tensors, steps)
                    twin = twin_file(fp32, placement, table.tensors, steps)
                else:
                    content, layers, twin = recovered
                if own is not None:
                    self.workspace.write(name, content)
                    for text in imported.likeness(self, name, exported.input_name):
                        self.warn(text)
                learned = recovery.learned(self, twin.ranges, scalings)
                return explanation.explained(
                    self, self._write_int8(content, layers, twin.ranges, learned, shifted), exported, twin
                )

        record = self.stage("quantize", inputs, precision, work)
        return from_data(record.facts, QuantizedModel, "stage quantize")

    def _write_int8(
        self,
        content: bytes,
        layers: Tuple[LayerPlan, ...],
        ranges: Mapping[str, TensorRange],
        learned: Dict[str, TensorRange],
        shifted: bool,
    ) -> Made:
        """Write the Q/DQ model, and its second form where that is another.

        Args:
            shifted: whether shifts may cost border maps, or are only those that come for nothing.
        """
        from edgeres.quantize import mixed_content

        name = files.model_file("int8")
        self.workspace.write(name, content)
        paths, second = [name], name
        try:
            mixed = mixed_content(self.workspace.folder / name)
            if mixed != content:  # a net that is int8 throughout has nothing left to be float16
                self.workspace.write(files.MIXED_MODEL, mixed)
                second = files.MIXED_MODEL
                paths.append(second)
        except QuantizationError as problem:  # the CPU and TensorRT up to 10.11 do without
            self.warn(f"there is no form of this model for TensorRT 10.12 and newer: {problem}")
            second = ""
        if not any(layer.precision == "int8" for layer in layers):
            self.warn("NOT ONE layer is in int8: see `edgeres inspect` for the reason of each")
        integer = self._write_integer(name)
        paths += [integer] if integer else []
        count = sum(layer.precision == "int8" for layer in layers)
        grouped = sum(layer.precision == "int8" for layer in layers if layer.node in self.grouped)
        full = sum(value.shift > 0 for value in ranges.values())
        noun = QuantizedModel(
            file=files.file_ref(self.workspace.folder, name),
            precision="int8",
            layers=layers,
            mixed=files.file_ref(self.workspace.folder, second) if second else None,
            activation_range="shifted" if shifted and full else "symmetric",
            grouped_int8=grouped,
            integer=files.file_ref(self.workspace.folder, integer) if integer else None,
            learned=learned,
        )
        made = f"{name}, {counted(count, 'layer')} in int8"
        made += f", {counted(full, 'tensor')} over the full range" if full else ""
        return noun, tuple(paths), made

    def _write_integer(self, name: str) -> str:
        """Write the Q/DQ model in integer operators where the engine is for a CPU; return the file's name, or none."""
        from edgeres.quantize import integer_content
        from edgeres.targets import resolve

        if resolve(self.recipe.engine)[1] != "cpu":
            return ""
        self.workspace.write(files.INTEGER_MODEL, integer_content(self.workspace.folder / name))
        return files.INTEGER_MODEL

    def make(self, exported: ExportedModel) -> None:
        """Quantize, compile and validate at the present level of recovery, with what is given back to float."""
        model = self.quantize(exported)
        engine = self.meaning(model) if self.elsewhere else self.judged_engine(model, self.compile(exported, model))
        self.validate(exported, model, engine)

    def compile(self, exported: ExportedModel, model: QuantizedModel) -> Engine:
        """Make the backend's engine; engines of the earlier bundle that were compiled from the same models stay."""
        try:
            engine: Optional[Engine] = self.compiled(exported, model)
        except _Reached:  # not asked for
            engine = None
        others = self.workspace.take_engines(MODEL_STAGES, None if engine is None else engine.target)
        if engine is None and others:
            self.progress.reused("compile", ", ".join(other.target for other in others))
        for text in (text for other in others for text in other.warnings or other.not_as_planned):
            self.warn(text)
        self.engines = others if engine is None else (engine, *others)
        if not self.engines:
            raise _Reached
        return self.engines[0]

    def meaning(self, model: QuantizedModel) -> Engine:
        """Return what stands for an engine that is made elsewhere: the model on the CPU. Engines of the earlier bundle,
        which may have come from there, stay where they were compiled from the same models."""
        from edgeres.backends import cpu

        self.engines = self.workspace.take_engines(MODEL_STAGES, None)
        if STAGES.index("compile") > self.last:
            raise _Reached
        self.warn(
            f"the engine is to be made elsewhere, so the verdict is on what {model.file.path} means, computed on the "
            "CPU. There, when it is compiled: edgeres validate BUNDLE"
        )
        return cpu.compile_engine(model.file, model.precision, model.activation_range)

    def compiled(self, exported: ExportedModel, model: QuantizedModel) -> Engine:
        """Make the engine that the recipe wants."""
        from edgeres.compilation import Source, compile_engine, engine_words
        from edgeres.targets import resolve

        section = self.recipe.engine
        backend, target = resolve(section)
        inputs = {
            "models": [
                to_data(ref) for ref in (exported.file, model.file, model.mixed, model.integer) if ref is not None
            ],
            "precision": model.precision,
            "preprocessing": to_data(self.recipe.preprocessing),
            "engine": {name: value for name, value in to_data(section).items() if name != "timeout_minutes"},
            "backend": backend,
            "target": target,
            "tools": versions(("onnxruntime", "tensorrt", "tensorrt_rtx")),
            "machine": platform.machine(),
        }
        if backend != "cpu":
            inputs["once"] = os.urandom(16).hex()  # a GPU, its driver and its library may change unseen by any hash

        def work() -> Made:
            equalized = "equalize" in self.workspace.records
            source = Source(self.workspace.folder, exported, model, equalized, self.recipe.preprocessing)
            engine, warnings = compile_engine(
                source, section, lambda _, done, total: self.progress.advance(done, total)
            )
            for text in warnings:
                self.warn(text)
            paths = () if backend == "cpu" else (engine.file.path,)
            return engine, paths, f"{target}: {engine_words(engine)}"

        record = self.stage("compile", inputs, target, work)
        return from_data(record.facts, Engine, "stage compile")

    def judged_engine(self, model: QuantizedModel, engine: Engine) -> Engine:
        """Return the engine to judge: the one that was made, or where no GPU here can run it, the model on the CPU."""
        from edgeres.backends import cpu
        from edgeres.targets import gpu_is_usable

        if engine.backend == "cpu" or gpu_is_usable(engine.backend):
            return engine
        self.warn(
            f"no GPU here can run {engine.file.path}, so the verdict is on what {model.file.path} means, computed on "
            f"the CPU. Where the engine will run: edgeres validate BUNDLE --backend {engine.backend}"
        )
        return cpu.compile_engine(model.file, model.precision, model.activation_range)

    def validate(self, exported: ExportedModel, model: QuantizedModel, engine: Engine) -> None:
        """Compare the engine with the FP32 model, on the validation samples or else on those of calibration."""
        from edgeres.backends import cpu
        from edgeres.compilation import with_layers
        from edgeres.judge import judge, known_meaning, read_reference, reference_content

        samples, source = self.validation, "validation"
        if samples is None:
            samples, source = self.calibration, "calibration"
        if samples is None:
            self.warn("no validation samples were given, so nothing was compared. Name a folder: --validation FOLDER")
            return
        if samples.labels is None:
            self.warn("the samples have no labels, so agreement and SQNR are measured, not accuracy")
        preprocessing, chosen = self.recipe.preprocessing, samples.sample_set()
        watch = self.progress.advance
        data = {"samples": chosen.digest, "preprocessing": to_data(preprocessing), "tools": versions(("onnxruntime",))}

        def answers(record: Engine) -> Any:
            content = (self.workspace.folder / record.file.path).read_bytes()
            return self.workforce.answer(content, record, samples, preprocessing, watch)

        def refer() -> Made:
            logits = answers(cpu.compile_engine(exported.file, "fp32"))
            self.workspace.write(files.REFERENCE, reference_content(logits, samples))
            return {"samples": len(samples)}, (files.REFERENCE,), f"FP32 logits of {counted(len(samples), 'sample')}"

        reference = self.stage(
            "reference",
            {"model": exported.file.sha256, **data},
            f"FP32 on {counted(len(samples), f'{source} sample')}",
            refer,
        )
        judged = self.recipe.validation
        inputs = {
            "reference": reference.files[0].sha256,
            "engine": engine.file.sha256,
            "model": model.file.sha256,
            "options": engine.options,
            "max_drop": judged.max_drop,
            "policy": judged.policy,
            "source": source,
            **data,
        }

        def work() -> Made:
            logits = answers(engine)
            content = (self.workspace.folder / files.REFERENCE).read_bytes()
            meaning = known_meaning(engine, read_reference(content, files.REFERENCE)["logits"], logits)
            if meaning is None:
                meaning = answers(cpu.compile_engine(model.file, model.precision))
            report = judge(content, logits, engine, (judged.max_drop, judged.policy), source, meaning)
            report = with_layers(report, self.engines)
            self.workspace.write(files.REPORT, to_json(report))
            if model.precision == "fp32":
                return report, (files.REPORT,), report.verdict
            # A robot without onnxruntime tells the engine's part of a drop by these.
            self.workspace.write(files.MEANING, reference_content(meaning, samples))
            return report, (files.REPORT, files.MEANING), report.verdict

        record = self.stage("validate", inputs, f"{engine.precision} on {engine.backend}", work)
        self.report = self.told(record)

    def told(self, record: StageRecord) -> Report:
        """Return a report that tells of the layers of each engine in the bundle, which may have others by now."""
        from edgeres.compilation import with_layers

        found = from_data(record.facts, Report, "stage validate")
        report = with_layers(found, self.engines)
        if report != found:
            self.workspace.write(files.REPORT, to_json(report))
            paths = tuple(ref.path for ref in record.files)
            self.workspace.finish("validate", record.key, paths, record.seconds, to_data(report), record.warnings)
        return report


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
        with contextlib.suppress(_Reached):
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


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell of an input that vanished, or cannot be read any more, after it was found to be there."""
    try:
        yield
    except OSError as problem:
        if problem.filename not in (None, str(path)):  # a failing read tells no name
            raise
        raise EdgeresError(
            f"{path}: {problem.strerror or problem}. The build stopped there; put that right and build again, and it "
            "goes on where it stopped."
        ) from problem


def _input_hash(path: Path) -> str:
    with _reading(path):
        return files.sha256_file(path)


def _exported(recipe: Recipe) -> Exported:
    """Return the model of a recipe, exported; the one place where the models' room and the export's room meet."""
    from edgeres.export import adopt_onnx, export_module

    model = recipe.model
    if model.onnx is not None:
        return adopt_onnx(model.onnx, recipe.input.size)
    from edgeres import models

    if recipe.architecture is not None:
        module = models.create(model.source, model.num_classes, model.seed)
    else:
        module = models.from_callable(model.source, model.num_classes, model.seed)
    if model.weights is not None:
        with _reading(locate(model.weights)):
            models.load_weights(module, locate(model.weights))
    return export_module(module, recipe.preprocessing.size)


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
