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
BLOCK_MARK = b"-----BEGIN "
P = 2**255 - 19  # the field of Curve25519


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
    key's id.

    Raises:
        SigningKeyError: the passphrase is too long, or OpenSSL has no Ed25519 here.
    """
    try:
        key = Ed25519PrivateKey.generate()
    except UnsupportedAlgorithm:
        raise SigningKeyError(f"no key can be made: {_NOT_HERE}") from None
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        lock = serialization.BestAvailableEncryption(passphrase)
    pem = serialization.Encoding.PEM
    try:
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock)
    except ValueError:
        raise SigningKeyError(
            "the passphrase is longer than OpenSSL takes (1023 bytes). Choose a shorter one."
        ) from None
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public, PublicKey(key.public_key()).id


def public_key(content: bytes, where: str, raw: bool = True) -> PublicKey:
    """Return the public key that a PEM, or its 32 bytes alone, hold.

    Args:
        raw: whether it may be the 32 bytes alone. Any file of that size would be a key, so a file may not.

    Raises:
        SigningKeyError: it is none, more than one, the private one of its pair, or one whose signatures anybody makes.
    """
    if PRIVATE_MARK in content:
        raise SigningKeyError(
            f"{where} is a private key, and signatures are checked with the public one (FILE.pub). Keep the private "
            "one off the robot; where it has been there, make a new pair: edgeres keygen"
        )
    _refuse_several(content, where)
    try:
        if raw and len(content) == RAW:
            key: object = Ed25519PublicKey.from_public_bytes(content)
        else:
            key = serialization.load_pem_public_key(content)
    except ValueError:
        kinds = "neither PEM nor 32 bytes" if raw else "it holds no PEM"
        raise SigningKeyError(f"{where} is not a public key: {kinds}. {_HOW}") from None
    except UnsupportedAlgorithm:
        raise SigningKeyError(f"{where} cannot be used: {_NOT_HERE}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SigningKeyError(f"{where} is a public key of another kind than Ed25519. {_HOW}")
    if _has_small_order(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)):
        raise SigningKeyError(f"{where} is a point of small order and nobody's key: anybody can sign for it. {_HOW}")
    return PublicKey(key)


def _has_small_order(encoded: bytes) -> bool:
    """Whether 32 bytes stand for a point of order 1, 2, 4 or 8, whose "signatures" anybody can write down.

    The neutral point has y = 1, that of order 2 y = -1, those of order 4 y = 0. Doubling gives y = 0 just where
    x² = -y², which makes -x² + y² = 1 + dx²y² into dy⁴ + 2y² - 1 = 0, d = -121665/121666: order 8. The bit that tells
    x from -x does not matter, nor whether y is written below P.

    Source: RFC 8032, section 5.1; Bernstein et al. 2008, "Twisted Edwards curves", section 6 (the law of addition).
    """
    y = int.from_bytes(encoded, "little") & ((1 << 255) - 1)
    order_8 = -121665 * y**4 + 2 * 121666 * y**2 - 121666
    return y * (y * y - 1) * order_8 % P == 0


def _refuse_several(content: bytes, where: str) -> None:
    if content.count(BLOCK_MARK) > 1:
        raise SigningKeyError(
            f"{where} holds more than one PEM block, of which one alone would count. Name a file each"
        )


def private_key(content: bytes, where: str, passphrase: Callable[[], Optional[bytes]]) -> PrivateKey:
    """Return the private key that a PEM file holds; ``passphrase`` is asked for where it is locked.

    Raises:
        SigningKeyError: it is none, or the public one of its pair, or the passphrase does not open it.
    """
    if PRIVATE_MARK not in content:
        raise SigningKeyError(f"{where} is not a private key, which is what signs. {_HOW}")
    _refuse_several(content, where)
    locked = ENCRYPTED_MARK in content
    try:
        key = serialization.load_pem_private_key(content, passphrase() if locked else None)
    except UnsupportedAlgorithm:
        raise SigningKeyError(f"the private key {where} cannot be used: {_NOT_HERE}") from None
    except (ValueError, TypeError):  # whose messages are not shown: they may quote the file
        reason = "does not open with this passphrase, or is damaged" if locked else "is damaged, or of an unknown kind"
        raise SigningKeyError(f"the private key {where} {reason}. {_HOW}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(f"{where} is a private key of another kind than Ed25519. {_HOW}")
    return PrivateKey(key)


_HOW = "Make a pair: edgeres keygen FILE"
_NOT_HERE = "the OpenSSL of this Python lacks what it takes; one that is built for FIPS 140-2 has no Ed25519"
