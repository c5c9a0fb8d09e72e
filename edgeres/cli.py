"""The command line: flags become one call, exceptions become exit codes.

What the codes mean stands in :mod:`edgeres.exits`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, List, Optional, Tuple

import click

import edgeres
from edgeres.answers import answered, print_json
from edgeres.building import build, calibrate, compile_, export, quantize
from edgeres.completion import paths
from edgeres.errors import printable
from edgeres.exits import OK, exit_code
from edgeres.guide import Taught, completion, manual
from edgeres.judging import limits_of, validate, within
from edgeres.options import Seconds, Size, Sizes, backend_option, key_option, latency_options
from edgeres.shipping import keygen, pack, sign, unpack, verify
from edgeres.streams import guard


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
@click.argument("bundle", shell_complete=paths())
@backend_option
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

    if out is not None and within(out, Path(bundle)):
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

    limits, keys = limits_of(options), options.pop("trusted_keys")
    if out is None and limits.asked:
        raise click.UsageError("a limit on the latency is of one machine, and a bundle's page of all: add --out FILE")
    if out is None:
        report_bundle(bundle, bench, lambda text: click.echo(f"warning: {text}", err=True), keys)
    elif within(out, bundle):
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


for _command in (
    *(build, export, calibrate, quantize, compile_, validate),
    *(verify, keygen, sign, pack, unpack, completion, manual),
):
    cli.add_command(_command)


def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command line and exit with its code: the one door from exception to exit code."""
    guard()
    sys.exit(exit_code(cli, arguments))
