"""What torch, onnx and onnxruntime raise, in one line: their messages run over many, or say nothing at all."""

from __future__ import annotations


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message; its type's name where there is no message."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
