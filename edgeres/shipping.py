"""The commands that ship a bundle, into one file and out of it again; and what is told of one that was checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

import click

from edgeres.answers import answered, print_json
from edgeres.errors import printable
from edgeres.exits import OK
from edgeres.options import key_option

if TYPE_CHECKING:
    from edgeres.artifacts import Manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Default: BUNDLE.edgeres, beside the bundle.",
)
@key_option
@click.option("--json", "as_json", is_flag=True, help="As one JSON object on stdout.")
def pack(bundle: Path, out: Optional[Path], trusted_keys: Optional[Tuple[str, ...]], as_json: bool) -> int:
    """A bundle as one file to ship: a tar with its manifest in front, checked before and while it is written.

    The same bundle gives the same bytes, wherever and whenever it is packed. Files in its folder that the manifest does
    not list are named and left out. Signatures go along: sign first, then pack.
    """
    from edgeres.packing import pack as run
    from edgeres.validation.cases import one_line

    made = run(bundle, out, trusted_keys)
    with answered():
        if as_json:
            signatures = [{"key": one.key} for one in made.signatures]
            print_json({"bundle": str(bundle), **made._asdict(), "signatures": signatures})
            return OK
        click.echo(one_line(f"{made.path}: {made.files} files, {made.bytes:,} bytes, SHA-256 {made.sha256}"))
        for path in made.unlisted:
            click.echo(one_line(f"not part of the bundle, not packed: {path}"))
        click.echo(printable(f"next, where it goes: edgeres unpack {Path(made.path).name}"))
    return OK


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="The bundle's folder. Default: FILE's name without its ending, in the current folder.",
)
@key_option
@click.option("--json", "as_json", is_flag=True, help="As one JSON object on stdout.")
def unpack(file: Path, out: Optional[Path], trusted_keys: Optional[Tuple[str, ...]], as_json: bool) -> int:
    """A packed bundle's folder again, whole or not at all.

    The manifest (and with --key who signed it) is checked before anything else is read, and every file against its hash
    while it is written, in a folder beside; then that one is put in place. An earlier bundle there is replaced, with
    the engines that were compiled for it; your own files in it stay. Whoever loads it meanwhile gets the one or the
    other.
    """
    from edgeres.inspection import signatures_found
    from edgeres.packing import unpack as run

    bundle, contents, warnings = run(file, out, trusted_keys)
    for text in warnings:
        click.echo(printable(f"warning: {text}"), err=True)
    show_verified(bundle.manifest, signatures_found(bundle.path, contents, trusted_keys is not None), as_json)
    return OK


def show_verified(manifest: Manifest, facts: Dict[str, Any], as_json: bool) -> None:
    """Print what was verified of a bundle, ``facts`` as of :func:`edgeres.inspection.verify_bundle`, and which of its
    engines fit this machine."""
    from edgeres.inspection import signature_words
    from edgeres.targets import misfits
    from edgeres.validation.cases import one_line

    place = facts["bundle"]
    fits = [(engine, misfits(engine, place)) for engine in manifest.engines]
    with answered():
        if as_json:
            engines = [{"target": x.target, "backend": x.backend, "fits": not why, "problems": why} for x, why in fits]
            print_json({**facts, "engines": engines})
            return
        click.echo(f"{one_line(place)}: all {len(manifest.files)} files are as they were built")
        for words in [signature_words(one) for one in facts["signatures"]] or ["not signed"]:
            click.echo(words)
        for engine, why in fits:
            said = f"does not run here: {'; '.join(why)}" if why else "fits this machine"
            click.echo(one_line(f"the engine for {engine.target} {said}"))
        if not manifest.engines:
            click.echo(one_line(f"it has no engine yet. Make one for this machine: edgeres compile {place}"))
        for path in facts["unlisted"]:
            click.echo(one_line(f"not part of the bundle, not checked: {path}"))
