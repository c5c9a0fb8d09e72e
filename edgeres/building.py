"""The commands that make a bundle, whole or up to a stage, and engines for it: flags become one call."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import click

import edgeres
from edgeres.answers import answered, print_json
from edgeres.completion import paths
from edgeres.exits import FAILED, OK
from edgeres.judging import report_json
from edgeres.options import build_options, cluster_option, engine_options, key_option

if TYPE_CHECKING:
    from edgeres.artifacts import Bundle
    from edgeres.rows import Planned


@click.command()
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


def _stage(name: str, until: str, text: str) -> click.Command:
    """Return a command that runs the pipeline up to one stage."""

    @click.command(name, help=text, short_help=text.split(".")[0] + ".")
    @click.argument("recipe", metavar="[RECIPE|BUNDLE]", required=False, shell_complete=paths(".toml"))
    @build_options
    @cluster_option
    def command(recipe: Optional[str], out: Optional[Path], as_json: bool, **options: Any) -> int:
        _run(recipe, out, as_json, until, options)
        return OK

    return command


_BUNDLE = " A bundle is continued in place: stages whose inputs are the same are reused, flags change its recipe."
export = _stage("export", "export", "Write the FP32 ONNX, checked against torch." + _BUNDLE)
calibrate = _stage("calibrate", "calibrate", "Find the range of every tensor that will be quantized." + _BUNDLE)
quantize = _stage("quantize", "quantize", "Write the model in the wanted precision." + _BUNDLE)


@click.command("compile")
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
        "validation": report_json(manifest.report) if manifest.report is not None else None,
    }
