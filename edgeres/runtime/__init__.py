"""Load a bundle and run it; never torch, never onnx."""

from __future__ import annotations

from edgeres.runtime.engine import LoadedEngine, load

__all__ = ["LoadedEngine", "load"]
