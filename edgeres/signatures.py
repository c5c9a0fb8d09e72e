"""Who vouches for a bundle: Ed25519 signatures of its manifest, which binds all other files, in a file beside it.

``manifest.sig`` is text: a line that says what it is, and for each key a line ``ed25519 KEY MANIFEST SIGNATURE`` in
lowercase hex, where KEY is the SHA-256 of the public key and MANIFEST that of the manifest that was signed. Both prove
nothing, and yet have to be right: a line counts where a key that is trusted made its signature of the manifest's very
bytes, and all of the line says so. What anybody wrote there is told as what the file says, never as what is.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from edgeres.errors import MissingPackageError, SignatureError, SigningKeyError, few, numbered
from edgeres.files import SIGNATURES, open_inside, read_at_most, read_bounded, sha256_bytes

if TYPE_CHECKING:
    from edgeres.keys import PublicKey

Key = Union[str, bytes, "os.PathLike[str]"]
"""A public key: the path of its PEM file, the PEM itself, or the 32 bytes of the key (``bytes``, never a file)."""
Keys = Union[Key, Iterable[Key]]

HEADER = b"edgeres signatures 1"
LINE = re.compile(rb"ed25519 ([0-9a-f]{64}) ([0-9a-f]{64}) ([0-9a-f]{128})")
MOST = 32  # keys; more than anybody rotates through
LARGEST = len(HEADER) + 1 + MOST * len(b"ed25519 " + bytes(64 + 1 + 64 + 1 + 128 + 1))  # bytes
LARGEST_KEY = 64 << 10  # bytes
CONTEXT = b"edgeres manifest v1\0"
"""Stands in front of what is signed, so that no signature of anything else can be taken for one of a manifest."""


class Signature(NamedTuple):
    """One line of the file: the key's id, the SHA-256 of the manifest that was signed, and the signature, 64 bytes."""

    key: str
    manifest: str
    value: bytes


def message(manifest: bytes) -> bytes:
    """Return what is signed of a manifest's bytes."""
    return CONTEXT + manifest


def read_signatures(folder: Union[str, os.PathLike[str]]) -> Tuple[Signature, ...]:
    """Return the signatures beside a manifest, none of them checked; none where there is no such file.

    Raises:
        SignatureError: the file is something else.
    """
    place = f"{os.fspath(folder)}/{SIGNATURES}"
    try:
        with open_inside(folder, SIGNATURES) as stream:
            content = read_at_most(stream, LARGEST + 1)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as problem:
        raise SignatureError(f"{place} cannot be read: {getattr(problem, 'strerror', problem)}. {_AGAIN}") from None
    return signatures_of(content, place)


def signatures_of(content: bytes, place: str) -> Tuple[Signature, ...]:
    """Return the signatures that the bytes of such a file hold, none of them checked; ``place`` names it in messages.

    Raises:
        SignatureError: they hold something else.
    """
    header, *lines = content.split(b"\n")
    found = [LINE.fullmatch(line) for line in lines[:-1]]
    signatures = tuple(
        Signature(one[1].decode(), one[2].decode(), bytes.fromhex(one[3].decode())) for one in found if one is not None
    )
    whole = len(content) <= LARGEST and header == HEADER and lines[-1:] == [b""] and None not in found and found
    if not whole or len({one.key for one in signatures}) != len(signatures):
        raise SignatureError(f"{place} does not hold signatures as edgeres writes them: it is damaged. {_AGAIN}")
    return signatures


def signatures_content(signatures: Sequence[Signature]) -> bytes:
    """Return the file that :func:`read_signatures` reads; a key's order is that of its id."""
    lines = [f"ed25519 {one.key} {one.manifest} {one.value.hex()}".encode("ascii") for one in sorted(signatures)]
    return b"\n".join([HEADER, *lines, b""])


def check(
    folder: Union[str, os.PathLike[str]], manifest: bytes, trusted: Keys
) -> Tuple[Tuple[Signature, ...], Tuple[str, ...]]:
    """Return the signatures of a bundle, read once, and the ids of the trusted keys that by them vouch for a manifest's
    bytes; one is enough.

    Raises:
        SignatureError: there is none.
        SigningKeyError: what is to be trusted is no public key, or nothing.
        MissingPackageError: cryptography is not installed.
    """
    keys = public_keys(trusted)
    found = read_signatures(folder)
    return found, vouching(os.fspath(folder), found, manifest, keys)


def vouching(place: str, found: Sequence[Signature], manifest: bytes, trusted: Sequence[PublicKey]) -> Tuple[str, ...]:
    """Return the ids of those keys that made one of the signatures found of a manifest's bytes; one is enough.

    Raises:
        SignatureError: there is none; ``place`` is what they were found at.
    """
    keys = {key.id: key for key in trusted}
    known = [one for one in found if one.key in keys]
    of_this = [one for one in known if one.manifest == sha256_bytes(manifest)]
    good = tuple(one.key for one in of_this if keys[one.key].made(one.value, message(manifest)))
    if good:
        return good
    if not found:
        problem = f"it is not signed: there is no {SIGNATURES}"
    elif not known:
        problem = (
            f"it says to be signed by {few([one.key for one in found])}, and you trust {few(list(keys))} (name that "
            "key too, where it is of somebody whom you trust)"
        )
    elif not of_this:
        problem = f"its signature by {known[0].key} says to be for another manifest: one of the two was changed since"
    else:
        problem = f"the signature by {of_this[0].key} is not of this manifest: it is forged or damaged"
    raise SignatureError(f"{place}: {problem}. This manifest was not parsed. {_AGAIN}")


def key_list(trusted: Optional[Keys]) -> Optional[Tuple[Key, ...]]:
    """Return trusted keys such that they can be asked more than once, whatever they were told as; None stays None."""
    if trusted is None:
        return None
    return (trusted,) if isinstance(trusted, (str, bytes, os.PathLike)) else tuple(trusted)


def public_keys(trusted: Keys) -> Tuple[PublicKey, ...]:
    """Return the public keys of PEM files, PEMs, or bytes.

    Raises:
        SigningKeyError: with everything that is no public key; or there is nothing, which would trust nobody.
        MissingPackageError: cryptography is not installed.
    """
    try:
        from edgeres.keys import public_key
    except ImportError:
        raise MissingPackageError.for_extra("cryptography", "checking a signature", "sign") from None
    sources = key_list(trusted)
    if not sources:
        raise SigningKeyError("the list of trusted keys is empty. Name a public key, or leave the list out (None)")
    keys: List[PublicKey] = []
    problems: List[str] = []
    for number, source in enumerate(sources, 1):
        try:
            keys.append(public_key(*_content(source, number)))
        except SigningKeyError as problem:
            problems.append(str(problem))
    if problems:
        raise SigningKeyError(problems[0] if len(problems) == 1 else numbered("trusted keys", problems))
    return tuple(keys)


def _content(source: Key, number: int) -> Tuple[bytes, str, bool]:
    """Return the bytes of a key, what to call it, and whether they may be the key without any wrapping."""
    if isinstance(source, str) and source.lstrip().startswith("-----BEGIN"):
        return source.encode(), f"trusted key {number}", False
    if isinstance(source, bytes):
        return source, f"trusted key {number}", True
    try:
        return read_bounded(os.fspath(source), LARGEST_KEY), os.fspath(source), False
    except (OSError, ValueError, TypeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise SigningKeyError(
            f"the key {source} cannot be read: {reason}. Name a public key, the FILE.pub of edgeres keygen FILE"
        ) from None


_AGAIN = "Copy it again from where it was built, and sign it there if need be: edgeres sign BUNDLE --key PRIVATE"
