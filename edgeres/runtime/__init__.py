"""Load a bundle, run it, stream frames through it; never torch, never onnx."""

from __future__ import annotations

from edgeres.runtime.engine import LoadedEngine
from edgeres.runtime.loading import load
from edgeres.runtime.profile import Latency, Profile, WarmUp

__all__ = ["Latency", "LoadedEngine", "Profile", "WarmUp", "load"]
