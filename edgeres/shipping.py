"""The commands that let a bundle be trusted elsewhere: verify, keys and signatures, and one file to ship."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

import click

from edgeres.answers import answered, print_json
from edgeres.completion import paths
from edgeres.errors import SigningKeyError, printable
from edgeres.exits import OK
from edgeres.options import key_option

if TYPE_CHECKING:
    from edgeres.artifacts import Manifest

PASSPHRASE = "EDGERES_PASSPHRASE"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), shell_complete=paths())
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
        if made.missing:
            click.echo(one_line(made.missing))
        click.echo(printable(f"next, where it goes: edgeres unpack {Path(made.path).name}"))
    return OK


@click.command()
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False), shell_complete=paths(".edgeres", bundles=False)
)
@click.option(
    "--out",
    type=click.Path(),  # as text: as a path an empty name would be the current folder
    metavar="FOLDER",
    help="The bundle's folder. Default: FILE's name without its ending, in the current folder.",
)
@key_option
@click.option("--json", "as_json", is_flag=True, help="As one JSON object on stdout.")
def unpack(file: Path, out: Optional[str], trusted_keys: Optional[Tuple[str, ...]], as_json: bool) -> int:
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


@click.command()
@click.argument("bundle", metavar="BUNDLE|FILE", type=click.Path(path_type=Path), shell_complete=paths(".edgeres"))
@key_option
@click.option("--json", "as_json", is_flag=True, help="As one JSON object on stdout.")
def verify(bundle: Path, trusted_keys: Optional[Tuple[str, ...]], as_json: bool) -> int:
    """Check the hash of every file of a bundle, its signatures, and which engines fit this machine. Nothing is
    deserialized or run.

    Hashes find damage, not forgery: whoever can change a file can change the manifest. Forgery is found where you name
    the key of whom you trust. Exit code 0 says that the files are as they were built (with --key: by whom you trust),
    also where an engine is for another machine.
    """
    from edgeres.inspection import verify_bundle

    show_verified(*verify_bundle(bundle, trusted_keys), as_json)
    return OK


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--passphrase", is_flag=True, help=f"Lock the private key; asks, or takes {PASSPHRASE}.")
def keygen(path: Path, passphrase: bool) -> int:
    """A new pair of Ed25519 keys: FILE, the private one, to sign with, and FILE.pub for robots and everybody else.

    Nothing is overwritten. Whoever has the private key can sign in your name: it stays where bundles are built.
    """
    from edgeres.signing import make_pair

    public, key = make_pair(path, _passphrase(new=True) if passphrase else None)
    with answered():
        click.echo(printable(f"private key, for nobody else: {path}\npublic key, for every robot: {public}\nid: {key}"))
    return OK


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), shell_complete=paths())
@click.option(
    "--key", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="PRIVATE", help="See keygen."
)
def sign(bundle: Path, key: Path) -> int:
    """Sign a bundle, after checking all of it: its manifest.sig then holds a signature of the manifest.

    Several keys may sign one bundle; the same one again replaces its signature. Whatever changes the bundle later
    (build, compile, report) takes the signatures away.
    """
    from edgeres.signing import sign_bundle

    signed = sign_bundle(bundle, key, _passphrase)
    for text in signed.warnings:
        click.echo(printable(f"warning: {text}"), err=True)
    with answered():
        click.echo(printable(f"{bundle}: signed by {signed.key}"))
    return OK


def _passphrase(new: bool = False) -> bytes:
    """Return the passphrase of a private key, asked for where the environment does not tell it."""
    told = os.environ.get(PASSPHRASE)
    if not told and not sys.stdin.isatty():
        why = "a new passphrase is to be set" if new else "the private key is locked"
        raise SigningKeyError(f"{why}, and there is nobody to ask: set {PASSPHRASE}")
    # As bytes of the environment, which need not be UTF-8.
    return os.fsencode(told or str(click.prompt("passphrase", hide_input=True, confirmation_prompt=new, err=True)))


def show_verified(manifest: Manifest, facts: Dict[str, Any], as_json: bool) -> None:
    """Print what was verified of a bundle, ``facts`` as of :func:`edgeres.inspection.verify_bundle`, and which of its
    engines fit this machine."""
    from edgeres.inspection import missing_engine, signature_words
    from edgeres.packed import unpacked_name
    from edgeres.targets import misfits
    from edgeres.validation.cases import one_line

    place = facts["bundle"]
    folder = (unpacked_name(place) or "FOLDER") if os.path.isfile(place) else place  # for what is advised
    fits = [(engine, misfits(engine, folder)) for engine in manifest.engines]
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
        lacking = missing_engine(manifest, folder)
        if lacking:
            click.echo(one_line(lacking))
        for path in facts["unlisted"]:
            click.echo(one_line(f"not part of the bundle, not checked: {path}"))
