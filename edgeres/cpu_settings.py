"""What a CPU's engine may have as settings in a manifest. ONNX Runtime's others name files to read and to write."""

from __future__ import annotations

from typing import List, Mapping

THREADS = "threads"
LEVEL = "graph_optimization_level"
LEVELS = ("extended", "all")
AS_WRITTEN = "session.disable_quant_qdq"
MOST_THREADS = 1024


def strange(options: Mapping[str, str]) -> List[str]:
    """Return those of an engine's settings, as ``key=value``, that edgeres does not write."""
    return [f"{key}={value}"[:100] for key, value in options.items() if not _is_ours(key, value)]


def _is_ours(key: str, value: str) -> bool:
    if key == THREADS:
        return value.isascii() and value.isdigit() and len(value) < 5 and int(value) <= MOST_THREADS
    return value in {LEVEL: LEVELS, AS_WRITTEN: ("0", "1")}.get(key, ())
