"""Nodes that only move or pick values, on bytes with channels last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from edgeres.quantize.accumulate import Codes
from edgeres.quantize.graph import Graph, attribute
from edgeres.quantize.offset import Shape
from edgeres.quantize.sheet import FIRST, LAST, MICROSOFT, Sheet


def moved(graph: Graph, sheet: Sheet, node: onnx.NodeProto, codes: Codes, shapes: Mapping[str, Shape]) -> Codes | None:
    """Write what a node makes of an image's bytes; None, and nothing written, where it does more than move them."""
    shape = shapes.get(node.input[0], ())
    if len(shape) != 4 or len(node.output) != 1:
        return None
    if node.op_type == "MaxPool":
        return replace(codes, name=pooled(sheet, node, codes.name))
    if node.op_type == "Flatten" and flattens_channels(node, shape):
        return replace(codes, name=sheet.copy(node, [codes.name]))
    if node.op_type == "Slice" and len(node.input) > 3:
        return _sliced(graph, sheet, node, codes)
    if node.op_type == "Pad" and len(node.input) < 4:
        return _padded(graph, sheet, node, codes)
    return None


def flattens_channels(node: onnx.NodeProto, shape: Shape) -> bool:
    """Whether a Flatten of an image of one pixel gives ``(N, C)``, wherever channels lie."""
    axis = attribute(node, "axis", 1)
    assert isinstance(axis, int)
    return shape[2:] == (1, 1) and axis % 4 == 1


def pooled(sheet: Sheet, node: onnx.NodeProto, source: str) -> str:
    """Write a maximum pooling of bytes, and return its output's name."""
    known = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "storage_order"}
    return sheet.emit("NhwcMaxPool", [source], node.output[0], MICROSOFT, **known)


def _sliced(graph: Graph, sheet: Sheet, node: onnx.NodeProto, codes: Codes) -> Codes | None:
    axes = graph.constant(node.input[3])
    if axes is None:
        return None
    turned = sheet.constant(f"{node.name}_axes", np.array([FIRST[int(axis) % 4] for axis in axes], np.int64))
    return replace(codes, name=sheet.copy(node, [codes.name, *node.input[1:3], turned, *node.input[4:]]))


def _padded(graph: Graph, sheet: Sheet, node: onnx.NodeProto, codes: Codes) -> Codes | None:
    pads = graph.constant(node.input[1])
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if pads is None or value is None or attribute(node, "mode", b"constant") != b"constant":
        return None
    code = float(value.reshape(())) / float(codes.scale) + codes.zero
    if abs(code - round(code)) > 1e-3 or not 0 <= round(code) <= codes.top:
        return None
    turned = pads.reshape(2, 4)[:, list(LAST)].reshape(-1).astype(np.int64)
    inputs = [sheet.constant(f"{node.name}_pads", turned), sheet.constant(f"{node.name}_code", np.uint8(round(code)))]
    return replace(codes, name=sheet.copy(node, [codes.name, *inputs]))
