"""The room's nouns: what is asked of a builder, and what it made. They cross a process border as JSON."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import msgspec

from edgeres.artifacts import EngineLayer, Preprocessing

__all__ = ["BuildRequest", "BuildResult", "EngineLayer"]


class BuildRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine to build.

    ``onnx`` is the file to compile and ``plan`` where the engine goes; ``flavour`` is ``tensorrt`` or ``tensorrt-rtx``.
    ``batch`` is (min, opt, max) of the one optimization profile, ``shape`` one sample's (3, height, width).
    ``workspace`` is in bytes, ``optimization_level`` 0…5 (None: the builder's own). ``timing_cache`` is a file, or None
    for none. ``target`` is ``gpu``, ``dla0`` or ``dla1``. Two are for a DLA on TensorRT up to 10.7 only:
    ``calibration_cache`` is the text of a TensorRT calibration cache, and ``half`` names the ONNX nodes that must stay
    out of int8 although their tensors have scales; with ``strict`` a build that cannot keep them out fails, else it
    warns.

    Where only the builder can tell which form of a model its version reads, ``forms`` has the path of each, by the
    names of :func:`edgeres.backends.tensorrt.versions.graph_for`; one of them takes the place of ``onnx``. ``ranges``
    are the ``amax`` of each tensor, for the cache that goes with the form without Q/DQ; none where they are of another.

    ``input`` is what the engine is to take: ``float32``, as the ONNX file does, ``uint8``, the pixels that
    ``preprocessing`` normalizes, or ``auto``: pixels where the network itself rounds its input to whole ones.
    """

    onnx: str
    plan: str
    input_name: str
    shape: Tuple[int, int, int]
    batch: Tuple[int, int, int] = (1, 8, 32)
    precision: str = "int8"
    flavour: str = "tensorrt"
    target: str = "gpu"
    gpu_fallback: bool = True
    workspace: Optional[int] = None
    optimization_level: Optional[int] = None
    timing_cache: Optional[str] = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    calibration_cache: Optional[str] = None
    half: Tuple[str, ...] = ()
    strict: bool = False
    forms: Dict[str, str] = {}
    ranges: Dict[str, float] = {}
    input: str = "float32"
    preprocessing: Optional[Preprocessing] = None


class BuildResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a build made: the plan's hash and size, what it fits, its layers, and what the user should know; ``source``
    is the ONNX file that it was built from. ``input`` and ``whole_pixels`` as in :class:`edgeres.artifacts.Engine`."""

    plan: str
    sha256: str
    bytes: int
    built_for: Dict[str, str]
    layers: Tuple[EngineLayer, ...]
    warnings: Tuple[str, ...]
    seconds: float
    source: str = ""
    input: str = "float32"
    whole_pixels: bool = False


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line from a build process: exactly one of these is there. ``error`` is a class and what it says."""

    progress: Optional[Tuple[str, int, int]] = None
    result: Optional[BuildResult] = None
    error: Optional[Tuple[str, str]] = None
