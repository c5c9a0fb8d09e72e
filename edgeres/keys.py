"""Ed25519 keys: made, and read from PEM files; the one place that knows the package cryptography.

Source: Bernstein et al. 2012, "High-speed high-security signatures"; RFC 8032; the files are those of RFC 8410.
"""

from __future__ import annotations

from typing import Callable, Optional, Tuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edgeres.errors import SigningKeyError
from edgeres.files import sha256_bytes

RAW = 32  # bytes of a public key without any wrapping
PRIVATE_MARK, ENCRYPTED_MARK = b"PRIVATE KEY-----", b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


class PublicKey:
    """What signatures are checked with. ``id`` is the SHA-256 of its 32 bytes, as 64 hex digits."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.id = sha256_bytes(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))

    def made(self, signature: bytes, message: bytes) -> bool:
        """Whether the private half of this key made a signature of exactly this message."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """What signatures are made with. It shows itself nowhere, in messages neither."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message, 64 bytes."""
        return self._key.sign(message)


def new_pair(passphrase: Optional[bytes] = None) -> Tuple[bytes, bytes, str]:
    """Return a new private key (PEM, PKCS #8, encrypted where there is a passphrase), its public key (PEM), and the
    key's id."""
    key = Ed25519PrivateKey.generate()
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        lock = serialization.BestAvailableEncryption(passphrase)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public, PublicKey(key.public_key()).id


def public_key(content: bytes, where: str) -> PublicKey:
    """Return the public key that a PEM file, or its 32 bytes alone, hold.

    Raises:
        SigningKeyError: it is none, or the private one of its pair.
    """
    if PRIVATE_MARK in content:
        raise SigningKeyError(
            f"{where} is a private key, and signatures are checked with the public one (FILE.pub). Keep the private "
            "one off the robot; where it has been there, make a new pair: edgeres keygen"
        )
    try:
        if len(content) == RAW:
            return PublicKey(Ed25519PublicKey.from_public_bytes(content))
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise SigningKeyError(f"{where} is not a public key: neither PEM nor 32 bytes. {_HOW}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SigningKeyError(f"{where} is a public key of another kind than Ed25519. {_HOW}")
    return PublicKey(key)


def private_key(content: bytes, where: str, passphrase: Callable[[], Optional[bytes]]) -> PrivateKey:
    """Return the private key that a PEM file holds; ``passphrase`` is asked for where it is locked.

    Raises:
        SigningKeyError: it is none, or the public one of its pair, or the passphrase does not open it.
    """
    if PRIVATE_MARK not in content:
        raise SigningKeyError(f"{where} is not a private key, which is what signs. {_HOW}")
    locked = ENCRYPTED_MARK in content
    try:
        key = serialization.load_pem_private_key(content, passphrase() if locked else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # whose messages are not shown: they may quote the file
        reason = "does not open with this passphrase, or is damaged" if locked else "is damaged, or of an unknown kind"
        raise SigningKeyError(f"the private key {where} {reason}. {_HOW}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(f"{where} is a private key of another kind than Ed25519. {_HOW}")
    return PrivateKey(key)


_HOW = "Make a pair: edgeres keygen FILE"
