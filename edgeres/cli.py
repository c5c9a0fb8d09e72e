"""The command line: flags become one call, exceptions become exit codes.

What the codes mean stands in :mod:`edgeres.exits`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import click

import edgeres
from edgeres.answers import answered, print_json
from edgeres.completion import paths, targets
from edgeres.errors import BundleError, EdgeresError, printable
from edgeres.exits import FAILED, OK, UNDECIDED, exit_code
from edgeres.guide import Taught, completion, manual
from edgeres.options import (
    Seconds,
    Size,
    Sizes,
    build_options,
    cluster_option,
    engine_options,
    key_option,
    latency_options,
)
from edgeres.shipping import keygen, pack, sign, unpack, verify
from edgeres.streams import guard, order

VERDICT_CODES = {"pass": OK, "fail": FAILED, "inconclusive": UNDECIDED, "unlabelled": UNDECIDED, "error": FAILED}
OUTPUT = click.Path(path_type=Path, dir_okay=False, resolve_path=True)

if TYPE_CHECKING:
    from edgeres.artifacts import Bundle, Report
    from edgeres.ci import Hints, Outputs
    from edgeres.rows import Planned
    from edgeres.validation import Limits


@click.group(cls=Taught, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edgeres.__version__, prog_name="edgeres")
def cli() -> None:
    """From a PyTorch ResNet to a verified INT8 bundle, and onto the robot.

    \b
    edgeres build                                    the embedded default: handwritten digits
    edgeres build --model resnet50 --weights w.pth --calibration images/ --validation labelled/
    edgeres validate build/resnet50-int8             the gate: exit code 0, 1 or 3
    edgeres COMMAND --help                           what it does, with examples
    """


@cli.command()
@click.argument("recipe", required=False, shell_complete=paths(".toml"))
@build_options
@cluster_option
@click.option("--check", is_flag=True, help="Build the bundle at --out anew, beside it, and compare: is it the same?")
def build(recipe: Optional[str], out: Optional[Path], as_json: bool, check: bool, **options: Any) -> int:
    """The whole pipeline: export, calibrate, quantize, compile, validate; a bundle.

    RECIPE is a TOML file or an earlier bundle; without one and without --model, the embedded default is built. Exit
    code 1 where accuracy falls by more than the budget for certain; a verdict that is open is a warning.

    With --check, RECIPE is the bundle's own unless another is given, the bundle is only read, and the exit code is 0
    where all that is compared comes out the same, and 1 where not; what is not compared is listed. A callable that the
    recipe names is run, as in every build: check a stranger's bundle with a recipe of your own.
    """
    if check:
        return _check(recipe, out, as_json, options)
    from edgeres.rows import load_rows

    rows = load_rows(recipe, _overrides(options))
    if rows is not None:
        return _matrix(rows, out, as_json, options["cluster"])
    report = _run(recipe, out, as_json, "validate", options).report
    return FAILED if report is not None and report.verdict == "fail" else OK


def _stage(name: str, until: str, text: str) -> None:
    """Add a command that runs the pipeline up to one stage."""

    @cli.command(name, help=text, short_help=text.split(".")[0] + ".")
    @click.argument("recipe", metavar="[RECIPE|BUNDLE]", required=False, shell_complete=paths(".toml"))
    @build_options
    @cluster_option
    def command(recipe: Optional[str], out: Optional[Path], as_json: bool, **options: Any) -> int:
        _run(recipe, out, as_json, until, options)
        return OK


_BUNDLE = " A bundle is continued in place: stages whose inputs are the same are reused, flags change its recipe."
_stage("export", "export", "Write the FP32 ONNX, checked against torch." + _BUNDLE)
_stage("calibrate", "calibrate", "Find the range of every tensor that will be quantized." + _BUNDLE)
_stage("quantize", "quantize", "Write the model in the wanted precision." + _BUNDLE)


@cli.command("compile")
@click.argument("bundle", required=False, type=click.Path(path_type=Path), shell_complete=paths())
@engine_options
@key_option
@click.option(
    "--list-targets",
    is_flag=True,
    help="Name the targets, and what of each can be compiled and run here; compile nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on stdout.")
def compile_(bundle: Optional[Path], list_targets: bool, as_json: bool, **options: Any) -> int:
    """Make an engine of a bundle's model for a device, and keep it in the bundle.

    Needs neither torch nor onnx: a bundle from a host is compiled on the robot that will run it. Engines for other
    targets stay.
    """
    from edgeres import targets
    from edgeres.terminal import show_rows

    if list_targets:
        found = targets.list_targets()
        with answered():
            if as_json:
                print_json(found)
            else:
                rows = [[x["target"], x["backend"], x["what"], targets.here(x)] for x in found]
                show_rows(["target", "backend", "what", "here"], rows)
        return OK
    if bundle is None:
        raise click.UsageError("name the bundle to compile, such as build/digits-int8")
    return _compile(bundle, as_json, options)


@cli.command()
@click.argument("bundle", shell_complete=paths())
@click.option(
    "--backend",
    default="auto",
    shell_complete=targets,
    help="Which of the bundle's engines, or its target; default: the first.",
)
@click.option("--validation", metavar="PATH", help="Other samples than the bundle was built with.")
@click.option(
    "--max-drop", type=click.FloatRange(0, 100), metavar="PP", help="Accuracy budget; default: the bundle's own."
)
@click.option("--policy", type=click.Choice(["ci", "point"]), help="Default: the bundle's own.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="REPORT.json", help="An accepted report to beat.")
@click.option(
    "--update-baseline", is_flag=True, help="Write --baseline anew instead of comparing. By hand, never in CI."
)
@latency_options
@cluster_option
@click.option("--junit", type=OUTPUT, metavar="FILE", help="Write the verdict as JUnit XML too.")
@click.option(
    "--code-quality", type=OUTPUT, metavar="FILE", help="Write what was found as GitLab's code quality report too."
)
@key_option
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object on stdout.")
def validate(bundle: str, baseline: Optional[Path], as_json: bool, **options: Any) -> int:
    """The gate: the bundle's engine against FP32 on the same samples, and against the last one that was accepted.

    Exit code 0: passes; 1: fails; 3: cannot be decided with so few samples, or without labels. The bundle is not
    changed. On GitHub (GITHUB_ACTIONS=true) the run shows the verdict as annotations and in the step's summary. A limit
    on the latency is judged where it is asked for, by measuring here for some twenty seconds; it fails, or is open, by
    the 95 % interval of this run. It is on the engine alone, its input prepared: preprocessing is not in it.
    """
    from edgeres import ci
    from edgeres.bundle import read_manifest
    from edgeres.inspection import repairs
    from edgeres.terminal import show_report

    update = options.pop("update_baseline")
    outputs = ci.Outputs(options.pop("junit"), options.pop("code_quality"))
    _check_baseline(baseline, Path(bundle), update)
    _check_outputs(outputs, Path(bundle), baseline)
    ci.make_way(outputs)
    begun = time.monotonic()
    try:
        report = _judge(bundle, None if update else baseline, **options)
    except EdgeresError as problem:
        _annotate(ci.stopped(problem, bundle, outputs), as_json)
        raise
    seconds = time.monotonic() - begun
    hints: Hints = ((), "")
    with contextlib.suppress(EdgeresError):  # of a bundle that was changed meanwhile there are none, but a verdict
        hints = repairs(Path(bundle), read_manifest(bundle, options["trusted_keys"]))
    with answered():
        if as_json:
            print_json(_report_json(report))
        else:
            show_report(report, *hints)
    _annotate(ci.judged(report, bundle, hints), as_json)
    ci.write(outputs, report, bundle, seconds, hints)  # what cannot be written must not hide the verdict
    if baseline is not None and update:
        _accept(report, baseline)
    return VERDICT_CODES[report.outcome()]


def _judge(bundle: str, baseline: Optional[Path], **options: Any) -> Report:
    """Return the report on a bundle, with its comparison with a baseline where there is one."""
    from edgeres.gate import gate
    from edgeres.judge import read_baseline
    from edgeres.terminal import TerminalProgress

    limits = _limits(options)
    accepted = None if baseline is None else read_baseline(baseline)
    validation = _absolute(options.pop("validation"))
    progress = TerminalProgress(unrest=not limits.asked)
    progress.stage("validate", bundle)
    options.update(baseline=accepted, watch=progress.advance, warn=progress.warn)
    try:
        return gate(bundle, validation, limits=limits, **options)
    finally:
        progress.stop()


def _limits(options: Dict[str, Any]) -> Limits:
    """Take the limits on the latency out of a command's options."""
    from edgeres.validation import Limits

    return Limits(options.pop("max_latency_ms"), options.pop("min_speedup"))


def _accept(report: Report, baseline: Path) -> None:
    """Write a report as the baseline: what it says of itself is what the next one is compared with."""
    from edgeres.artifacts import to_json
    from edgeres.files import write_atomic

    if report.outcome() != "pass":
        raise BundleError(
            f"{baseline} stays as it was: the verdict is {report.outcome()}, and only an engine that passes is a "
            "baseline. Make it pass first, or choose another --max-drop."
        )
    write_atomic(baseline, to_json(report))


def _annotate(lines: List[str], as_json: bool) -> None:
    """Print commands for GitHub, whose runner reads both streams."""
    with answered():
        for line in lines:
            order(sys.stderr if as_json else sys.stdout, line)


def _check_outputs(outputs: Outputs, bundle: Path, baseline: Optional[Path]) -> None:
    known = {} if baseline is None else {baseline.resolve(): "--baseline"}
    for option, file in outputs.named:
        if _within(file, bundle):
            raise click.UsageError(
                f"{option} {file} lies in the bundle, whose manifest binds all its files. Name another"
            )
        other = known.setdefault(file.resolve(), option)
        if other != option:
            raise click.UsageError(f"{option} and {other} are both {file}. Give each a name of its own")


def _within(path: Path, bundle: Path) -> bool:
    """Tell whether a path leads into a bundle, also through a link, or is a link that lies there."""
    place = bundle.resolve()
    return place in path.resolve().parents or place in (path.parent.resolve() / path.name).parents


def _check_baseline(baseline: Optional[Path], bundle: Path, update: bool) -> None:
    if update and baseline is None:
        raise click.UsageError("--update-baseline needs to know which file: --baseline REPORT.json")
    if update and os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise click.UsageError(
            "a baseline that CI accepts for itself gates nothing. Write it by hand, look at it, and commit it"
        )
    if update and baseline is not None and _within(baseline, bundle):
        raise click.UsageError(
            f"--baseline {baseline} lies in the bundle, which holds what its manifest binds alone: --update-baseline "
            "would damage it. Name another file"
        )


@cli.command()
@click.argument("bundle", shell_complete=paths())
@click.option(
    "--backend",
    default="auto",
    shell_complete=targets,
    help="Which of the bundle's engines, or its target; default: the first.",
)
@click.option("--batch", "batches", type=Sizes(), help="Batch sizes. Default: 1,8,32, as far as the engine takes them.")
@click.option("--seconds", type=Seconds(0, min_open=True), default=5.0, help="For each batch size. Default: 5.")
@click.option("--runs", type=click.IntRange(1), help="Calls of each model that count, in place of --seconds.")
@click.option("--warmup", type=Seconds(0), default=0.5, help="Seconds for each model and batch size. Default: 0.5.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of the CPU's engines. Default: one per core.")
@click.option("--frames", type=Size(), help="Also from uint8 camera frames of this size, with preprocessing.")
@click.option(
    "--against",
    metavar="BUNDLE",
    shell_complete=paths(),
    help="Another bundle's engine for the same backend, to compare with.",
)
@click.option("--cuda-graphs", is_flag=True, help="On a GPU: record each engine's work, and launch it in one piece.")
@key_option
@click.option("--alone", is_flag=True, help="Without the float twin: clocks and power are then the engine's alone.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Keep the result there, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on stdout.")
def bench(bundle: str, frames: Optional[List[int]], out: Optional[Path], as_json: bool, **options: Any) -> int:
    """Latency, throughput, memory, clocks and power of a bundle's engine, beside its float twin.

    The models take turns, so that both meet the same load, and INT8 is called faster only where the whole 95 % interval
    of the ratio says so. The bundle is not changed. Exit code 0 also where INT8 does not pay.
    """
    from edgeres.artifacts import to_data, to_json
    from edgeres.benchmark import Pace
    from edgeres.files import write_atomic
    from edgeres.terminal import TerminalProgress, show_benchmark
    from edgeres.twins import Settings, bench_bundle

    if out is not None and _within(out, Path(bundle)):
        raise click.UsageError(f"--out {out} lies in the bundle, which holds what its manifest binds and nothing else")
    pace = Pace(options.pop("seconds"), options.pop("runs"), options.pop("warmup"))
    settings = Settings(pace=pace, frames=(frames[0], frames[1]) if frames else None, **options)
    progress = TerminalProgress(unrest=False)
    progress.stage("bench", bundle)
    try:
        measured = bench_bundle(bundle, settings, progress.advance)
    finally:
        progress.stop()
    with answered():
        if as_json:
            print_json(to_data(measured))
        else:
            show_benchmark(measured)
    if out is not None:
        write_atomic(out, to_json(measured))
    return OK


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path), shell_complete=paths())
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it there; the bundle stays as it is."
)
@click.option("--bench", type=click.Path(path_type=Path), help="What `bench --out` kept. Default: BUNDLE.bench.json.")
@latency_options
@key_option
@click.option("--open", "show", is_flag=True, help="Show it in the browser.")
def report(bundle: Path, out: Optional[Path], bench: Optional[Path], show: bool, **options: Any) -> int:
    """The page about a bundle, report.html: verdict, changed answers, layers, latency; one file, no network, no script.

    A build writes it; this makes it anew, for the samples' pictures, a benchmark or an older bundle, and binds it.
    Limits on the latency are held against the benchmark, of the machine that it was measured on; so they go with --out
    alone, and not into a bundle that other machines load.
    """
    from edgeres.files import PAGE, write_atomic
    from edgeres.reporting import page_of, report_bundle

    limits, keys = _limits(options), options.pop("trusted_keys")
    if out is None and limits.asked:
        raise click.UsageError("a limit on the latency is of one machine, and a bundle's page of all: add --out FILE")
    if out is None:
        report_bundle(bundle, bench, lambda text: click.echo(f"warning: {text}", err=True), keys)
    elif _within(out, bundle):
        raise click.UsageError(f"--out {out} lies in the bundle. Without --out the page goes there, and is bound.")
    else:
        write_atomic(out, page_of(bundle, bench, limits, keys))
    place = (out or bundle / PAGE).absolute()
    with answered():
        click.echo(printable(str(place)))
    if show and click.launch(str(place)):
        click.echo("there is no browser that this machine can open it with", err=True)
    return OK


@cli.command()
@click.argument("first", type=click.Path(path_type=Path), shell_complete=paths())
@click.argument("second", type=click.Path(path_type=Path), shell_complete=paths())
@key_option
@click.option(
    "--json", "as_json", is_flag=True, help="As one JSON object on stdout, with every tensor, layer and sample."
)
def diff(first: Path, second: Path, trusted_keys: Optional[Tuple[str, ...]], as_json: bool) -> int:
    """How two bundles differ: recipe, ranges, layers, accuracy (paired by sample), latency, answers.

    It informs and is no gate: exit code 0 however different they are. The gate is `validate --baseline`.
    """
    from edgeres.difference import difference, tables, words
    from edgeres.terminal import show_rows
    from edgeres.validation.cases import one_line

    found = difference(first, second, trusted_keys)
    with answered():
        if as_json:
            print_json(found)
            return OK
        click.echo(f"first:  {one_line(str(first))}\nsecond: {one_line(str(second))}")
        for table in tables(found):
            show_rows(table.columns, table.rows, table.title)
        for text in words(found):
            click.echo(one_line(text))
    return OK


@cli.command()
@click.argument(
    "path", metavar="FILE|BUNDLE", type=click.Path(path_type=Path), shell_complete=paths(".onnx", ".edgeres")
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object on stdout.")
@click.option("--sbom", is_flag=True, help="A bundle's files and the tools that made it, as CycloneDX 1.5 (JSON).")
@key_option
def inspect(path: Path, as_json: bool, sbom: bool, trusted_keys: Optional[Tuple[str, ...]]) -> int:
    """What is inside: layers and the reason for each, ranges, engines, provenance."""
    if sbom:
        return _bill(path, trusted_keys)
    from edgeres.inspection import inspect_file, inspect_packed, read_and_inspect
    from edgeres.packed import is_packed
    from edgeres.tables import show_inside

    manifest = None
    if is_packed(path):
        manifest, facts = inspect_packed(path, trusted_keys)
    elif path.is_file() or path.suffix.lower() == ".onnx":
        if trusted_keys:
            raise click.UsageError(f"--key is for bundles: nobody signs a file such as {path}")
        facts = inspect_file(path)
    else:
        manifest, facts = read_and_inspect(path, trusted_keys)
    with answered():
        if as_json:
            print_json(facts)
        else:
            show_inside(path, manifest, facts)
    return OK


def _bill(bundle: Path, trusted_keys: Optional[Tuple[str, ...]]) -> int:
    from edgeres.bundle import verify
    from edgeres.sbom import bill_of_materials

    bill = bill_of_materials(verify(bundle, trusted_keys))
    with answered():
        print_json(bill)
    return OK


@cli.command()
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
@click.option("--ci", type=click.Choice(["github", "gitlab", "none"]), default="github", help="Default: github.")
@click.option("--json", "as_json", is_flag=True, help="The files written, as a JSON list on stdout.")
def init(folder: Path, ci: str, as_json: bool) -> int:
    """A starter: calibration/ with a recipe to edit, and a CI workflow that builds and gates.

    Nothing is overwritten: where one of its files exists already, none is written. The recipe is that of the embedded
    default, and builds as it stands. The workflow installs edgeres by its name, which nobody owns before it is
    published: until then put the URL of your git repository, or a wheel of your own, in that line.
    """
    from edgeres.starter import begin

    written = begin(folder, ci)
    with answered():
        if as_json:
            print_json([str(path) for path in written])
            return OK
        for path in written:
            click.echo(printable(f"written: {path}"))
        click.echo(printable(f"next: edgeres build {written[0]}, and then edit that recipe"))
    return OK


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As a JSON list on stdout.")
def models(as_json: bool) -> int:
    """The architectures it knows, with parameters and multiply-accumulates (MACs) per image."""
    from edgeres.catalog import catalog
    from edgeres.terminal import show_rows

    entries = catalog()
    rows = [
        [
            x["name"],
            f"{x['parameters'] / 1e6:.3f} M",
            f"{x['macs'] / 1e9:.3f} G",
            f"{x['size']}×{x['size']}",
            str(x["classes"]),
            x["source"],
        ]
        for x in entries
    ]
    with answered():
        if as_json:
            print_json(entries)
        else:
            show_rows(["model", "parameters", "MACs", "input", "classes", "source"], rows)
    return OK


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object on stdout.")
def doctor(as_json: bool) -> int:
    """What this machine can build and run, and what to install for more."""
    from edgeres.doctor import examine
    from edgeres.tables import show_health

    facts = examine()
    with answered():
        if as_json:
            print_json(facts)
        else:
            show_health(facts)
    return OK


def _run(source: Optional[str], out: Optional[Path], as_json: bool, until: str, options: Dict[str, Any]) -> Bundle:
    """Run the pipeline up to a stage, show what it did, and return the bundle."""
    from edgeres.matrix import terms_of
    from edgeres.pipeline import build as run
    from edgeres.recipe import load_recipe
    from edgeres.terminal import TerminalProgress, show_build

    recipe = load_recipe(source, _overrides(options))
    if out is None and source is not None and Path(source).is_dir():
        out = Path(source)  # a bundle is continued where it is
    progress = TerminalProgress()
    try:
        # A user's own model may print; the answer on stdout stays one JSON object.
        with contextlib.redirect_stdout(sys.stderr):
            bundle = run(recipe, out, until, progress, options["cluster"], terms_of(source, recipe))
    finally:
        progress.stop()
    with answered():
        if as_json:
            print_json(_build_json(bundle, progress.lines))
        else:
            show_build(bundle, progress.lines)
    return bundle


def _matrix(rows: Sequence[Planned], out: Optional[Path], as_json: bool, cluster: Optional[str]) -> int:
    """Build the bundles of a matrix, and show one table of them."""
    from edgeres.artifacts import to_data
    from edgeres.matrix import build_rows
    from edgeres.tables import show_matrix
    from edgeres.terminal import TerminalProgress

    progress = TerminalProgress()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            matrix = build_rows(rows, out, progress, cluster)
    finally:
        progress.stop()
    with answered():
        if as_json:
            print_json(to_data(matrix))
        else:
            show_matrix(matrix)
    return OK if matrix.good else FAILED


def _check(source: Optional[str], out: Optional[Path], as_json: bool, options: Dict[str, Any]) -> int:
    """Build a bundle's recipe again, with the flags on top, and tell what came out otherwise."""
    from edgeres.recipe import load_recipe
    from edgeres.reproduction import reproduce, rows
    from edgeres.terminal import TerminalProgress, show_rows

    bundle = out or (Path(source) if source is not None and Path(source).is_dir() else None)
    if bundle is None:
        raise click.UsageError("name the bundle to check: --out BUNDLE")
    if source is None and options["model"] is None:
        source = str(bundle)
    recipe = load_recipe(source, _overrides(options))
    progress = TerminalProgress()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = reproduce(bundle, recipe, progress, options["cluster"])
    finally:
        progress.stop()
    with answered():
        if as_json:
            print_json({"bundle": str(bundle), "same": found.same, **found._asdict()})
        else:
            show_rows(["", "then", "now"], rows(found), f"{bundle}, built again")
            click.echo("all that was compared is the same" if found.same else "NOT the same")
    return OK if found.same else FAILED


def _overrides(options: Dict[str, Any]) -> Dict[str, Any]:
    """Return the flags of a build as keys of the recipe, of which a cluster is no part."""
    given = {**options, "keep_float": list(options["keep_float"]) or None}
    return {edgeres.OPTIONS[name]: value for name, value in given.items() if name != "cluster"}


def _compile(bundle: Path, as_json: bool, options: Dict[str, Any]) -> int:
    """Compile a bundle's model with the bundle's own engine settings and the flags on top."""
    from edgeres.artifacts import to_data
    from edgeres.bundle import read_manifest
    from edgeres.compilation import compile_bundle, engine_words
    from edgeres.recipe import engine_section
    from edgeres.terminal import TerminalProgress, show_engine

    keys = options.pop("trusted_keys")
    given = {edgeres.OPTIONS[name].partition(".")[2]: value for name, value in options.items()}
    section = engine_section(read_manifest(bundle, keys).recipe.get("engine", {}), given)
    progress = TerminalProgress()
    progress.stage("compile", str(bundle))
    try:
        watch = progress.advance
        made, engine, warnings = compile_bundle(bundle, section, lambda _, done, total: watch(done, total), keys)
    finally:
        progress.stop()
    for text in warnings:
        progress.warn(text)
    with answered():
        if as_json:
            print_json({"bundle": made.path, **to_data(engine), "warnings": list(warnings)})
        else:
            show_engine(made.path, engine, engine_words(engine))
    return OK


def _build_json(bundle: Bundle, lines: List[Tuple[str, str, str]]) -> Dict[str, Any]:
    from edgeres.artifacts import to_data
    from edgeres.inspection import layer_errors, worst_errors

    manifest, climb = bundle.manifest, bundle.manifest.climb
    reused = {name for name, _, time in lines if time == "reused"}
    return {
        "bundle": str(bundle.path),
        "name": manifest.name,
        "precision": manifest.precision,
        "stages": {
            name: {"seconds": record.seconds, "reused": name in reused, "files": [ref.path for ref in record.files]}
            for name, record in manifest.stages.items()
        },
        "files": {ref.path: ref.sha256 for ref in manifest.files},
        "warnings": list(manifest.warnings),
        "errors": worst_errors(layer_errors(Path(bundle.path), manifest)),
        "ladder": [to_data(rung) for rung in climb.rungs] if climb is not None else [],
        "given_back": [to_data(cost) for cost in climb.taken_layers] if climb is not None else [],
        "validation": _report_json(manifest.report) if manifest.report is not None else None,
    }


def _report_json(report: Report) -> Dict[str, Any]:
    """Return a report with its outcome, which the exit code follows; its ``verdict`` is against FP32 alone."""
    from edgeres.artifacts import to_data

    return {**to_data(report), "outcome": report.outcome()}


def _absolute(path: Optional[str]) -> Optional[str]:
    from edgeres.files import is_url

    return path if path is None or is_url(path) else str(Path(path).absolute())


for _command in (verify, keygen, sign, pack, unpack, completion, manual):
    cli.add_command(_command)


def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command line and exit with its code: the one door from exception to exit code."""
    guard()
    sys.exit(exit_code(cli, arguments))
