"""The timing cache on disk: what TensorRT measured, with the name of where it measured it.

Timings hold for one TensorRT on one device with one CUDA. TensorRT itself refuses a foreign cache only where it
notices, so the file carries its own key and hash, and what does not fit is named and ignored.
"""

from __future__ import annotations

import hashlib
import json
from typing import Dict, NamedTuple, Optional

from edgeres.errors import BackendError, BundleError
from edgeres.files import read_bounded, write_atomic

LARGEST = 1 << 30  # bytes
MAGIC = b"edgeres timing cache 1\n"
KEY = ("flavour", "tensorrt", "platform", "cuda", "compute_capability", "device")
"""The facts of ``built_for`` that a timing depends on."""


class Found(NamedTuple):
    """What a file held: ``content`` for TensorRT (empty for none), why not, and whether it may be overwritten."""

    content: bytes
    warning: Optional[str]
    ours: bool


def key_of(built_for: Dict[str, str]) -> Dict[str, str]:
    """Return the part of ``built_for`` that a timing cache is valid for."""
    return {name: built_for.get(name, "") for name in KEY}


def load(path: str, key: Dict[str, str]) -> Found:
    """Return the cached timings of a file if they were measured under ``key``; a file that is not there is empty.

    Raises:
        BackendError: the file is there and cannot be read.
    """
    try:
        raw = read_bounded(path, LARGEST)
    except FileNotFoundError:
        return Found(b"", None, True)
    except OSError as problem:
        raise BackendError(f"the timing cache {path} cannot be read: {problem.strerror}. Name another file.") from None
    if not raw:
        return Found(b"", None, True)
    if not raw.startswith(MAGIC):
        return Found(b"", f"{path} is not a timing cache of edgeres: it is ignored and left as it is", False)
    head, _, content = raw[len(MAGIC) :].partition(b"\n")
    try:
        facts = json.loads(head.decode("utf-8"))
        stated, digest = facts["key"], facts["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return Found(b"", f"the timing cache {path} is damaged: it is ignored and written anew", True)
    if hashlib.sha256(content).hexdigest() != digest:
        return Found(b"", f"the timing cache {path} is damaged: it is ignored and written anew", True)
    if stated != key:
        return Found(
            b"",
            f"the timing cache {path} was measured with {_words(stated)}; this is {_words(key)}: it is ignored and "
            "written anew. Keep one file per device to keep both.",
            True,
        )
    return Found(content, None, True)


def save(path: str, key: Dict[str, str], content: bytes) -> Optional[str]:
    """Write the timings; return what to warn of where that fails, for the engine is good without them."""
    head = json.dumps({"key": key, "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True)
    try:
        write_atomic(path, MAGIC + head.encode("utf-8") + b"\n" + content)
    except BundleError as problem:
        return f"the timing cache was not kept: {problem}"
    return None


def _words(key: object) -> str:
    if not isinstance(key, dict):
        return "something unknown"
    return ", ".join(f"{name} {key[name]}" for name in KEY if key.get(name)) or "something unknown"
