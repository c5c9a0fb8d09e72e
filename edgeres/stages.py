"""The stages of a build: their names, in order, and what each returns."""

from __future__ import annotations

from typing import Any, Tuple

# Where a build may stop. Hygiene is looked at first of all, but an export alone does not need it.
STAGES = (
    "export", "hygiene", "observe", "equalize", "calibrate", "quantize", "compile", "reference", "sensitivity",
    "validate",
)  # fmt: skip
MODEL_STAGES = ("export", "calibrate", "quantize")  # what an engine is compiled from
FORMAT = 11  # part of every key: raise it when a stage's result changes with the same inputs

Made = Tuple[Any, Tuple[str, ...], str]
"""What a stage's work returns: its noun (or plain data), the files it wrote, and a few words on what it made."""


class Reached(Exception):
    """The last stage that was wanted is done, and the next has no earlier result to take over."""
