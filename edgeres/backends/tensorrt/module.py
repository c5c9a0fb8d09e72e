"""The TensorRT package that is loaded, and what it really is: bindings, and the library that lies under them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from edgeres.errors import BackendError, MissingPackageError

FLAVOURS: Dict[str, Tuple[str, ...]] = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt")}
"""By flavour, the packages that may speak it, best first."""

JETSON = Path("/etc/nv_tegra_release")
"""Is there on a Jetson, and nowhere else."""

FIRST = (8, 5)
"""The oldest TensorRT that edgeres knows. TensorRT for RTX counts from 1, so what is older is taken for RTX."""


def load_module(flavour: str) -> Any:
    """Return the package of a flavour, ``tensorrt`` or ``tensorrt-rtx``, imported.

    TensorRT's own bindings also speak TensorRT for RTX where they lie over its library, and then nothing else.

    Raises:
        MissingPackageError: it is not installed.
        BackendError: it is installed but does not load, is too old, or is of the other flavour.
    """
    if flavour not in FLAVOURS:
        raise BackendError(f"there is no flavour {flavour!r}. Choose one of: {', '.join(FLAVOURS)}")
    others: List[str] = []
    for name in FLAVOURS[flavour]:
        if not is_installed(name):
            continue
        module = _imported(name)
        if flavour_of(module) == flavour:
            return module
        others.append(f"{name} here is {words(module)}")
    if others and flavour == "tensorrt":
        raise BackendError(f"{others[0]}, not TensorRT. Compile for it: edgeres compile --backend tensorrt-rtx BUNDLE")
    if flavour == "tensorrt":
        raise missing_tensorrt()
    here = f" ({others[0]})" if others else ""
    raise MissingPackageError(
        f"an engine of TensorRT for RTX needs the package tensorrt_rtx{here}. Install it: pip install tensorrt-rtx"
    )


def missing_tensorrt() -> MissingPackageError:
    """Return the error for a machine without TensorRT; on a Jetson it comes with JetPack, and from nowhere else."""
    if JETSON.exists():
        return MissingPackageError(
            "a TensorRT engine needs the package tensorrt, which JetPack brings. Install it: sudo apt install "
            "python3-libnvinfer; and make the virtual environment with --system-site-packages, so that it is seen"
        )
    return MissingPackageError.for_extra("tensorrt", "a TensorRT engine", "tensorrt")


def version(module: Any) -> Tuple[int, ...]:
    """Return the version of the bindings, such as ``(10, 3, 0)``: it says what the interface offers."""
    return _numbers(str(module.__version__))


def library_version(module: Any) -> Tuple[int, ...]:
    """Return the version of the library under the bindings; the bindings' own where the library cannot be asked."""
    stated = version(module)
    if module.__name__ == "tensorrt" and sys.platform.startswith("linux"):
        try:
            number = int(ctypes.CDLL(f"libnvinfer.so.{stated[0]}").getInferLibVersion())
        except (OSError, AttributeError):
            return stated
        # Up to TensorRT 9 the number is 8502, from 10 on (and in RTX) it is 100300.
        found = (number // 10000, number // 100 % 100, number % 100)
        if number < 10000:
            found = (number // 1000, number // 100 % 10, number % 100)
        if found != stated[:3]:
            return found
    return stated


def flavour_of(module: Any) -> str:
    """Return ``tensorrt`` or ``tensorrt-rtx``: whose engines this package really builds and runs."""
    return "tensorrt-rtx" if library_version(module) < FIRST else "tensorrt"


def words(module: Any) -> str:
    """Return the name and version of the engine maker in words: ``TensorRT 10.3.0``, ``TensorRT for RTX 1.7.1``."""
    name = "TensorRT for RTX" if flavour_of(module) == "tensorrt-rtx" else "TensorRT"
    return f"{name} {dotted(library_version(module))}"


def dotted(numbers: Tuple[int, ...]) -> str:
    """Return ``10.3.0`` of ``(10, 3, 0)``."""
    return ".".join(str(number) for number in numbers)


def member(enum: Any, name: str) -> Any:
    """Return a member of one of the package's enumerations by its name; numbers shift between versions.

    Raises:
        BackendError: this version has no such member.
    """
    found = getattr(enum, name, None)
    if found is None:
        raise BackendError(f"this TensorRT has no {getattr(enum, '__name__', enum)}.{name}. Use another version.")
    return found


def is_installed(name: str) -> bool:
    """Whether a package is there; it is not imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def _imported(name: str) -> Any:
    """Return an installed package, or say why it does not load."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as problem:
        raise BackendError(
            f"the package {name} is installed but does not load: {problem}. Its libraries are missing or belong to "
            "another version; see what is there: edgeres doctor"
        ) from problem
    if name == "tensorrt" and version(module) < FIRST:
        raise BackendError(
            f"{name} {module.__version__} is too old: edgeres needs {dotted(FIRST)} or newer. "
            "On a Jetson that is JetPack 5.1 or newer."
        )
    return module


def _numbers(text: str) -> Tuple[int, ...]:
    """Return the leading numbers of a version: ``10.13.3.9.post1`` becomes ``(10, 13, 3, 9)``."""
    numbers: List[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    if not numbers:
        raise BackendError(f"the TensorRT package has no version that can be read: {text!r}. Install it again.")
    return tuple(numbers)
