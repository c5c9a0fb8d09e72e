"""Does a plan fit this machine? Asked before TensorRT sees it: a plan is executable code, and fits where it was built.

``built_for`` and the facts of a machine are the same dictionary of words; "" is a fact that nobody knew:

==========================  ==================================================================
``flavour``                 ``tensorrt`` or ``tensorrt-rtx``
``tensorrt``                the library's version, ``10.3.0``
``compute_capability``      ``8.7``
``device``                  the driver's name of the GPU, ``NVIDIA L4``
``module``                  on a Jetson the module's name, ``NVIDIA Jetson Orin Nano Developer Kit``
``cuda``                    the newest CUDA that the driver serves, ``12.6``
``platform``                ``Linux aarch64``
``version_compatible``      of a plan only: ``yes`` if newer TensorRT may run it
``hardware_compatible``     of a plan only: the level's name, ``AMPERE_PLUS``, if other GPUs may run it
``lean_runtimes``           of a machine only: the versions of its lean runtimes, ``8.6.1, 10.3.0``
==========================  ==================================================================

Which TensorRT runs which plan: its own version runs any. A version-compatible plan also runs on a newer one, of the
same major version or from 8 on 10 and from 10 on 11, if the lean runtime of the plan's version is installed there
(:mod:`edgeres.backends.tensorrt.lean`). Nothing runs on an older one, and no plan of TensorRT for RTX on another
version of it.

Source: NVIDIA TensorRT documentation, "Engine Compatibility".
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from edgeres.backends.tensorrt.device import Device
from edgeres.backends.tensorrt.lean import name_of
from edgeres.backends.tensorrt.module import dotted, flavour_of, library_version
from edgeres.backends.tensorrt.versions import FORWARD

TREE = Path("/proc/device-tree")
"""Where Linux tells what board this is."""

NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
NO = ("", "no", "none", "false")

AMPERE = (8, 0)
"""The least that a plan of hardware compatibility AMPERE_PLUS runs on."""


class _Fact(NamedTuple):
    """A pair that does not fit, in words."""

    built: str
    here: str


def this_machine(trt: Any, device: Optional[Device]) -> Dict[str, str]:
    """Return what plans built here fit, or what a plan must fit to run here.

    Args:
        trt: the loaded package.
        device: the GPU, or None where there is none; its facts are then "".
    """
    facts = {
        "flavour": flavour_of(trt),
        "tensorrt": dotted(library_version(trt)),
        "platform": f"{platform.system()} {platform.machine()}",
        "compute_capability": "",
        "device": "",
        "cuda": "",
        "module": jetson_module(TREE),
    }
    if device is not None:
        facts["compute_capability"] = dotted(device.compute_capability)
        facts["device"] = device.name
        facts["cuda"] = dotted(device.driver)
    return facts


def jetson_module(tree: Path) -> str:
    """Return the name of the Jetson module that this is, or an empty string on any other machine."""
    try:
        if b"nvidia,tegra" not in (tree / "compatible").read_bytes():
            return ""
        return (tree / "model").read_bytes().rstrip(b"\0").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def problems(built_for: Mapping[str, str], here: Mapping[str, str], place: str) -> List[str]:
    """Return in sentences why a plan does not fit a machine, each with the command that mends it; empty if it fits.

    Args:
        built_for: the facts of the machine it was built on.
        here: the facts of this one, from :func:`this_machine`.
        place: the bundle to compile again.
    """
    found: List[str] = []
    mend = f"Compile it here: edgeres compile {place}"
    if not built_for.get("tensorrt"):
        found.append(f"nothing says which TensorRT the engine was built for. {mend}")
    unfit = [
        fact
        for fact in (_tensorrt(built_for, here), _capability(built_for, here), *_others(built_for, here))
        if fact is not None
    ]
    if unfit:
        built, now = (", ".join(side) for side in zip(*unfit))
        found.append(f"engine was built for {built}; this machine has {now}. {mend}")
    return found


def lean_version(built_for: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return the version (three numbers) whose lean runtime runs a plan here; empty where none does, or is needed."""
    was, now = built_for.get("tensorrt", ""), here["tensorrt"]
    old, new = _numbers(was), _numbers(now)
    if was == now or new < old or (old[:1] + new[:1]) not in FORWARD:
        return ""
    return dotted(old[:3]) if _yes(built_for.get("version_compatible", "")) else ""


def _tensorrt(built_for: Mapping[str, str], here: Mapping[str, str]) -> Optional[_Fact]:
    was, now = built_for.get("tensorrt", ""), here["tensorrt"]
    flavour, flavour_now = built_for.get("flavour", "") or here["flavour"], here["flavour"]
    if flavour != flavour_now:
        return _Fact(f"{NAMES.get(flavour, flavour)} {was}", f"{NAMES.get(flavour_now, flavour_now)} {now}")
    if not was or was == now:
        return None
    lean = lean_version(built_for, here)
    if lean and lean in here.get("lean_runtimes", "").split(", "):
        return None
    if lean:
        now = f"{now} and no {name_of(lean)}, the lean runtime that this engine needs there"
    return _Fact(f"{NAMES.get(flavour, flavour)} {was}", now)


def _capability(built_for: Mapping[str, str], here: Mapping[str, str]) -> Optional[_Fact]:
    was, now = built_for.get("compute_capability", ""), here["compute_capability"]
    if not was or was == now or here["flavour"] == "tensorrt-rtx":  # those plans are finished on the GPU they run on
        return None
    if built_for.get("hardware_compatible", "").upper() == "AMPERE_PLUS" and _numbers(now) >= AMPERE:
        return None
    return _Fact(_sm(was), _sm(now) if now else "no GPU")


def _others(built_for: Mapping[str, str], here: Mapping[str, str]) -> List[_Fact]:
    """Return what else does not fit: the module of a Jetson, a driver for an older CUDA, the operating system."""
    found: List[_Fact] = []
    module, module_now = built_for.get("module", ""), here["module"]
    if module and module_now and module != module_now:  # a container hides it
        found.append(_Fact(module, module_now))
    cuda, cuda_now = built_for.get("cuda", ""), here["cuda"]
    if _numbers(cuda_now)[:1] < _numbers(cuda)[:1]:  # a newer driver runs what an older one does
        found.append(_Fact(f"CUDA {cuda}", f"CUDA {cuda_now}" if cuda_now else "no CUDA"))
    system, system_now = built_for.get("platform", ""), here["platform"]
    if system and system != system_now:
        found.append(_Fact(system, system_now))
    return found


def _yes(word: str) -> bool:
    return word.lower() not in NO


def _sm(capability: str) -> str:
    """Return ``sm_87`` of ``8.7``."""
    return "sm_" + capability.replace(".", "")


def _numbers(version: str) -> Tuple[int, ...]:
    """Return the leading numbers of a version, none of an empty one."""
    numbers: List[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
