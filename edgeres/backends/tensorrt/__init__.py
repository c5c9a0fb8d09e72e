"""TensorRT and TensorRT for RTX, 8.5 to 11: the only room that speaks ``tensorrt`` or CUDA.

``builder`` makes a plan from ONNX, ``child`` has it made in a process of its own, ``session`` runs one. Importing this
room loads neither ``tensorrt`` nor CUDA.
"""

from __future__ import annotations

from edgeres.backends.tensorrt.child import build_in_child
from edgeres.backends.tensorrt.dla import kept_in_half
from edgeres.backends.tensorrt.fit import misfits
from edgeres.backends.tensorrt.layers import attribute, untold
from edgeres.backends.tensorrt.module import load_module
from edgeres.backends.tensorrt.obstacles import Obstacles, find_obstacles
from edgeres.backends.tensorrt.probe import ask_for_a_gpu, looks_like_nvidia
from edgeres.backends.tensorrt.records import BuildRequest, BuildResult, EngineLayer

__all__ = [
    "BuildRequest",
    "BuildResult",
    "EngineLayer",
    "Obstacles",
    "ask_for_a_gpu",
    "attribute",
    "build_in_child",
    "find_obstacles",
    "kept_in_half",
    "load_module",
    "looks_like_nvidia",
    "misfits",
    "untold",
]
