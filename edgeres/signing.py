"""Make a pair of keys, and sign a bundle: what is done where the private key is, and never on a robot."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Tuple

from edgeres.bundle import Folder, check_files, manifest_bytes, parse_manifest
from edgeres.errors import MissingPackageError, SignatureError, SigningKeyError
from edgeres.files import MANIFEST, SIGNATURES, read_bounded, sha256_bytes, write_atomic
from edgeres.signatures import LARGEST_KEY, MOST, Signature, message, read_signatures, signatures_content

Passphrase = Callable[[], Optional[bytes]]
"""Is asked where a private key is locked."""


class Signed(NamedTuple):
    """What signing did: the id of the key, and what is to be said besides."""

    key: str
    warnings: Tuple[str, ...]


def make_pair(path: Path, passphrase: Optional[bytes] = None) -> Tuple[Path, str]:
    """Write a new private key to ``path``, for its owner's eyes alone, and its public key to ``path.pub``. Return the
    latter's place and the key's id.

    Raises:
        SigningKeyError: one of the files is there already, lies in a bundle, or cannot be written; then neither is new.
        MissingPackageError: cryptography is not installed.
    """
    try:
        from edgeres.keys import new_pair
    except ImportError:
        raise _missing() from None
    if not path.name or "\0" in str(path):
        raise SigningKeyError(f"{str(path)!r} is no name of a file. Name one: edgeres keygen FILE")
    public_path = path.with_name(f"{path.name}.pub")
    folder = Path(os.path.realpath(path.parent))  # a bundle may be behind a link
    if any((place / MANIFEST).is_file() for place in (folder, *folder.parents)):
        raise SigningKeyError(f"{path} lies in a bundle, which is copied to robots. Keep the private key elsewhere.")
    private, public, key = new_pair(passphrase)
    made = []
    try:
        for place, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(place)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
    except OSError as problem:
        for place in made:
            with contextlib.suppress(OSError):
                os.unlink(place)
        there = isinstance(problem, FileExistsError)
        reason = "is there already, and no key is ever overwritten" if there else f"cannot be written: {problem}"
        raise SigningKeyError(f"{path if not made else public_path} {reason}. Name another file.") from None
    return public_path, key


def sign_bundle(bundle: Folder, path: Path, passphrase: Passphrase = lambda: None) -> Signed:
    """Sign a bundle with the private key in a file, after checking every file of the bundle.

    A signature by the same key is replaced. Those by others stay as long as they are of the same manifest.

    Raises:
        BundleError: there is no intact bundle, or it cannot be written.
        SignatureError: the signatures that are there are damaged, or too many.
        SigningKeyError: the file holds no private key, or the passphrase does not open it.
        MissingPackageError: cryptography is not installed.
    """
    try:
        from edgeres.keys import private_key
    except ImportError:
        raise _missing() from None
    try:
        key = private_key(read_bounded(path, LARGEST_KEY), str(path), passphrase)
    except (OSError, ValueError) as problem:
        raise SigningKeyError(
            f"the key {path} cannot be read: {getattr(problem, 'strerror', problem)}. Name the private one of a pair, "
            "the FILE of edgeres keygen FILE"
        ) from None
    content = manifest_bytes(bundle)
    check_files(bundle, parse_manifest(bundle, content))
    own = Signature(key.public.id, sha256_bytes(content), key.sign(message(content)))
    others = [one for one in read_signatures(bundle) if one.key != own.key]
    kept = [one for one in others if one.manifest == own.manifest]
    if len(kept) == MOST:
        raise SignatureError(f"{bundle} has {MOST} signatures already. Remove {SIGNATURES}, and sign it again.")
    write_atomic(Path(bundle) / SIGNATURES, signatures_content([own, *kept]))
    warnings = [
        f"the signature by {one.key} says to be of another manifest, and is gone" for one in others if one not in kept
    ]
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        warnings.append(f"others may read the private key. Keep it to yourself: chmod 600 {path}")
    return Signed(own.key, tuple(warnings))


def _missing() -> MissingPackageError:
    return MissingPackageError.for_extra("cryptography", "signing", "sign")
