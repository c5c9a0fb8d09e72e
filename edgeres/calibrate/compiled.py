"""Loops that numba compiles, the same way for all of calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., object])


def compiled(function: Kernel) -> Kernel:
    """Return the function compiled; other threads go on while it runs.

    The compiled code is kept beside the source, so that only the first call after an installation waits for the
    compiler, a second or two. Sums may be added up in any order, and dividing by zero gives infinity as in NumPy:
    without these freedoms no loop over floats is vectorized.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"}}
    try:
        kernel: Kernel = numba.njit(**options, cache=True)(function)
    except RuntimeError:  # neither the source's folder nor the user's cache can be written: compile in each process
        kernel = numba.njit(**options)(function)
    return kernel
