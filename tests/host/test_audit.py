"""The linter on shifted graphs: what is not given back, or given back wrongly, is found, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeres.errors import LintError
from edgeres.quantize import lint, write_int8, write_mixed
from edgeres.quantize.graph import Graph
from edgeres.quantize.lint import check

NETS = ("cifar", "basic", "bottleneck")
Damage = Callable[[onnx.ModelProto], None]


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (node for node in model.graph.node if node.name == name)
    return found


def change(model: onnx.ModelProto, name: str, by: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = (one for one in model.graph.initializer if one.name == name)
    tensor.CopyFrom(numpy_helper.from_array(by(numpy_helper.to_array(tensor)).astype(np.float32), name))


def conv(stem: str) -> str:
    return f"/{stem.split('.')[0]}/{stem.rpartition('.')[0]}/{stem.rpartition('.')[2]}/Conv"


def map_of(model: onnx.ModelProto, stem: str) -> str:
    """Return the name of the map that is added behind a convolution."""
    return node_of(model, f"{conv(stem)}_Shift").input[1]


def without_map(model: onnx.ModelProto) -> None:
    added = node_of(model, f"{conv('layer1.0.conv1')}_Shift")
    node_of(model, conv("layer1.0.conv1")).output[0] = added.output[0]
    model.graph.node.remove(added)


def turned_map(model: onnx.ModelProto) -> None:
    change(model, map_of(model, "layer1.0.conv2"), lambda values: values[:, :, ::-1])


def small_map(model: onnx.ModelProto) -> None:
    change(model, map_of(model, "layer2.0.conv2"), lambda values: values * 0.999)


def one_pixel(model: onnx.ModelProto) -> None:
    def by(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[0, -1, -1, -1] += 0.01
        return changed

    change(model, map_of(model, "layer1.0.conv2"), by)


def another_zero(model: onnx.ModelProto) -> None:
    pad = next(node for node in model.graph.node if node.op_type == "Pad")
    change(model, pad.input[2], np.zeros_like)


def another_scale(model: onnx.ModelProto) -> None:
    change(model, "/relu/Relu_output_0_scale", lambda values: values * 1.01)


def behind_the_pool(model: onnx.ModelProto) -> None:
    change(model, "/Flatten_output_0_shift", lambda values: values * 0.9)


def another_shift(model: onnx.ModelProto) -> None:
    (entry,) = model.metadata_props
    shifts = json.loads(entry.value)
    shifts["/relu/Relu_output_0_QuantizeLinear"] *= 1.5
    entry.value = json.dumps(shifts)


def another_name(model: onnx.ModelProto) -> None:
    (entry,) = model.metadata_props
    entry.value = json.dumps({**json.loads(entry.value), "nobody": 1.0})


def unaware(model: onnx.ModelProto) -> None:
    """A layer that needs a true value reads a shifted one; its answer goes nowhere, but it is there."""
    model.graph.node.append(helper.make_node("Sigmoid", ["/relu/Relu_output_0_dequantized"], ["h"], name="gate"))


def shifted_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("/relu/Relu_output_0_dequantized", 1, ["N", 16, 32, 32]))


FOUND: dict[str, tuple[Damage, str]] = {
    "no map": (without_map, "layer1.0/relu1/Relu_output_0_QuantizeLinear: .* is off by"),
    "map turned round": (turned_map, "layer1.0/relu2/Relu_output_0_QuantizeLinear: .* is off by"),
    "map too small": (small_map, "layer2.0/relu2/Relu_output_0_QuantizeLinear: .* is off by"),
    "map with a fault": (one_pixel, "is off by 0.01:"),
    "padding": (another_zero, "it pads with another number than its input's zero, -"),
    "scale": (another_scale, "is shifted by .*, which is not 128 steps of its scale"),
    "constant behind the pool": (behind_the_pool, "/Flatten_output_0_QuantizeLinear: .* is off by"),
    "shift": (another_shift, "is shifted by .*, which is not 128 steps of its scale"),
    "name": (another_name, "nobody: is said to be shifted, but is no QuantizeLinear"),
    "reader": (unaware, "gate: /relu/Relu_output_0_dequantized is off by"),
    "output": (shifted_output, "output /relu/Relu_output_0_dequantized: .* is off by"),
}


@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_is_found_in_the_graph_alone(fault: str, shifted: Callable[[str], Any]) -> None:
    damage, words = FOUND[fault]
    model = onnx.ModelProto()
    model.CopyFrom(shifted("cifar").int8)
    damage(model)
    problems = lint(model)
    with pytest.raises(LintError, match=words):
        check(model, "model.int8.onnx")
    assert 0 < len(problems) <= 4


def original_bias(model: onnx.ModelProto) -> None:
    node_of(model, "/fc/Gemm").input[2] = "fc.bias"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10, np.float32), "fc.bias"))


def stem_bias(model: onnx.ModelProto) -> None:
    change(model, node_of(model, "/conv1/Conv").input[2], lambda values: values + np.float32(0.01))


def skip_forgotten(model: onnx.ModelProto) -> None:
    change(model, map_of(model, "layer1.0.conv2"), lambda values: values - np.float32(0.5))


@pytest.mark.parametrize("damage", [original_bias, stem_bias, skip_forgotten])
def test_a_wrong_constant_per_channel_is_found_beside_the_fp32_model(
    damage: Damage, shifted: Callable[[str], Any]
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(shifted("cifar").int8)
    damage(model)
    assert lint(model) == []  # a bias may be anything, as far as this graph tells
    problems = lint(model, (), shifted("cifar").fp32)
    assert len(problems) == 1
    assert "what a shift takes away must be given back exactly" in problems[0]


@pytest.mark.parametrize("name", NETS)
def test_what_we_write_adds_up(name: str, shifted: Callable[[str], Any], net: Callable[[str], Any]) -> None:
    assert lint(shifted(name).int8) == []
    assert lint(shifted(name).int8, (), shifted(name).fp32) == []
    assert lint(write_mixed(shifted(name).int8)) == []
    assert lint(net(name).int8, (), net(name).fp32) == []
    # and would not, for another model
    assert lint(shifted(name).int8, (), _other_biases(shifted(name).fp32)) != []


def _other_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    index = Graph(other)
    for node in index.nodes:
        if node.op_type == "Conv":
            change(other, node.input[2], lambda values: values + np.float32(0.1))
    return other


def test_what_write_int8_writes_was_checked_against_its_source(
    shifted: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shifted("cifar")

    def forgets(model: onnx.ModelProto, shifts: Any) -> onnx.ModelProto:
        written = onnx.ModelProto()
        written.CopyFrom(found.int8)
        stem_bias(written)
        return written

    monkeypatch.setattr("edgeres.quantize.insert.write_shifted", forgets)
    with pytest.raises(LintError, match="must be given back exactly"):
        write_int8(found.fp32, found.placement, found.ranges)
