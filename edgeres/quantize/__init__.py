"""ExportedModel + CalibrationTable → QuantizedModel: where int8 goes and why, written as standard ONNX.

``plan`` decides where, ``shiftable`` what may have the full int8 range; ``write_int8``, ``write_mixed``,
``write_integer`` and ``write_fp16`` write, ``lint`` states the rules that every written graph but the integer form
keeps; the rest does it from file to file.
"""

from __future__ import annotations

from edgeres.quantize.documents import (
    activation_range_of,
    fp16_content,
    grouped_in_file,
    int8_content,
    integer_content,
    mixed_content,
    plan_file,
    shiftable_file,
    twin_file,
)
from edgeres.quantize.fewest import fewest
from edgeres.quantize.half import write_fp16
from edgeres.quantize.insert import write_int8
from edgeres.quantize.lint import lint
from edgeres.quantize.mixed import write_mixed
from edgeres.quantize.placement import Placement, Point, plan
from edgeres.quantize.shiftable import shiftable
from edgeres.quantize.solo import Solo

__all__ = [
    "Placement",
    "Point",
    "Solo",
    "activation_range_of",
    "fewest",
    "fp16_content",
    "grouped_in_file",
    "int8_content",
    "integer_content",
    "lint",
    "mixed_content",
    "plan",
    "plan_file",
    "shiftable",
    "shiftable_file",
    "twin_file",
    "write_fp16",
    "write_int8",
    "write_mixed",
]
