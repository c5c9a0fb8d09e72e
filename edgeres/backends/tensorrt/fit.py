"""Does an engine of a bundle fit this machine? Asked by what it was built for; the plan itself is not looked at."""

from __future__ import annotations

from typing import List, Mapping

from edgeres.backends.tensorrt.compat import problems, this_machine
from edgeres.backends.tensorrt.device import open_device
from edgeres.backends.tensorrt.lean import lean_runtimes
from edgeres.backends.tensorrt.module import load_module, words
from edgeres.backends.tensorrt.obstacles import dla_cores
from edgeres.errors import BackendError, MissingPackageError


def misfits(built_for: Mapping[str, str], flavour: str, place: str) -> List[str]:
    """Return in sentences why an engine cannot run here, each with what to do; empty if nothing speaks against it.

    Args:
        built_for: the facts of the machine it was built on; see :mod:`edgeres.backends.tensorrt.compat`.
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        place: the bundle, for the command that messages advise.
    """
    try:
        trt = load_module(flavour)
        device = open_device()
    except (MissingPackageError, BackendError) as problem:
        return [str(problem)]
    try:
        lean = ", ".join(lean_runtimes()) if built_for.get("version_compatible") else ""
        found = problems(built_for, {**this_machine(trt, device), "lean_runtimes": lean}, place)
    finally:
        device.close()
    target = built_for.get("target", "gpu")
    if target.startswith("dla") and dla_cores(trt) <= int(target[len("dla") :]):
        found.append(
            f"engine was built for {target}, which {words(trt)} does not see here. Compile it for the GPU: "
            f"edgeres compile {place} --target gpu"
        )
    return found
