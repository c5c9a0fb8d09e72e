"""The gate's command, validate: its verdict as an exit code, for people, programs and CI systems."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import click

from edgeres.answers import answered, print_json
from edgeres.completion import paths
from edgeres.errors import BundleError, EdgeresError
from edgeres.exits import FAILED, OK, UNDECIDED
from edgeres.options import backend_option, cluster_option, key_option, latency_options
from edgeres.streams import order

if TYPE_CHECKING:
    from edgeres.artifacts import Report
    from edgeres.ci import Hints, Outputs
    from edgeres.validation import Limits

VERDICT_CODES = {"pass": OK, "fail": FAILED, "inconclusive": UNDECIDED, "unlabelled": UNDECIDED, "error": FAILED}
OUTPUT = click.Path(path_type=Path, dir_okay=False, resolve_path=True)


@click.command()
@click.argument("bundle", shell_complete=paths())
@backend_option
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
            print_json(report_json(report))
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

    limits = limits_of(options)
    accepted = None if baseline is None else read_baseline(baseline)
    validation = _absolute(options.pop("validation"))
    progress = TerminalProgress(unrest=not limits.asked)
    progress.stage("validate", bundle)
    options.update(baseline=accepted, watch=progress.advance, warn=progress.warn)
    try:
        return gate(bundle, validation, limits=limits, **options)
    finally:
        progress.stop()


def limits_of(options: Dict[str, Any]) -> Limits:
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
        if within(file, bundle):
            raise click.UsageError(
                f"{option} {file} lies in the bundle, whose manifest binds all its files. Name another"
            )
        other = known.setdefault(file.resolve(), option)
        if other != option:
            raise click.UsageError(f"{option} and {other} are both {file}. Give each a name of its own")


def within(path: Path, bundle: Path) -> bool:
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
    if update and baseline is not None and within(baseline, bundle):
        raise click.UsageError(
            f"--baseline {baseline} lies in the bundle, which holds what its manifest binds alone: --update-baseline "
            "would damage it. Name another file"
        )


def report_json(report: Report) -> Dict[str, Any]:
    """Return a report with its outcome, which the exit code follows; its ``verdict`` is against FP32 alone."""
    from edgeres.artifacts import to_data

    return {**to_data(report), "outcome": report.outcome()}


def _absolute(path: Optional[str]) -> Optional[str]:
    from edgeres.files import is_url

    return path if path is None or is_url(path) else str(Path(path).absolute())
