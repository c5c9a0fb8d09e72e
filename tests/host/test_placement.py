"""Where int8 goes: exactly the tensors that TensorRT fuses, named by the modules that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgeres.artifacts import TensorRange
from edgeres.export import export_module
from edgeres.quantize import Placement, plan, write_int8
from edgeres.quantize.graph import Graph as Index

Graph = Callable[..., onnx.ModelProto]
NETS = ("cifar", "basic", "bottleneck")
SOME_RANGE = TensorRange(12.7, 0.1, "minmax", -12.7, 12.7, 1, 0.0, 0.0, None)


def sources(net: Any) -> list[tuple[str, str]]:
    """Return (module, operator) of whatever makes each quantized activation; the input is ("input", "")."""
    graph = Index(net.fp32)
    made = [graph.producer.get(point.tensor) for point in net.placement.points]
    return [(net.exported.modules[node.name], node.op_type) if node else ("input", "") for node in made]


def test_option_a(net: Callable[[str], Any]) -> None:
    assert sources(net("cifar")) == [
        ("input", ""),
        ("relu", "Relu"),
        ("layer1.0.relu1", "Relu"),
        ("layer1.0.relu2", "Relu"),
        ("layer2.0.relu1", "Relu"),
        ("layer2.0.downsample", "Pad"),
        ("layer2.0.relu2", "Relu"),
        ("layer3.0.relu1", "Relu"),
        ("layer3.0.downsample", "Pad"),
        ("layer3.0.relu2", "Relu"),
        ("", "Flatten"),
    ]


def test_option_b_behind_a_max_pool(net: Callable[[str], Any]) -> None:
    assert sources(net("basic")) == [
        ("input", ""),
        ("maxpool", "MaxPool"),
        ("layer1.0.relu1", "Relu"),
        ("layer1.0.relu2", "Relu"),
        ("layer1.1.relu1", "Relu"),
        ("layer1.1.relu2", "Relu"),
        ("layer2.0.relu1", "Relu"),
        ("layer2.0.downsample.0", "Conv"),
        ("layer2.0.relu2", "Relu"),
        ("", "Flatten"),
    ]


def test_bottlenecks(net: Callable[[str], Any]) -> None:
    found = sources(net("bottleneck"))
    assert [source for source in found if source[1] == "Conv"] == [
        ("layer1.0.downsample.0", "Conv"),
        ("layer2.0.downsample.0", "Conv"),
    ]
    assert [source for source in found if source[1] == "Relu"] == [
        (f"{block}.relu{i}", "Relu") for block in ("layer1.0", "layer1.1", "layer2.0") for i in (1, 2, 3)
    ]
    assert [source for source in found if source[1] not in ("Conv", "Relu")] == [
        ("input", ""),
        ("maxpool", "MaxPool"),
        ("", "Flatten"),
    ]


@pytest.mark.parametrize("name", NETS)
def test_every_weighted_layer_has_both_inputs_quantized_and_no_bias(name: str, net: Callable[[str], Any]) -> None:
    graph = Index(net(name).int8)
    weighted = [node for node in graph.nodes if node.op_type in ("Conv", "Gemm")]
    assert len(weighted) >= 8
    for node in weighted:
        assert [graph.producer[tensor].op_type for tensor in node.input[:2]] == ["DequantizeLinear"] * 2
        assert node.input[2] in graph.initializers


@pytest.mark.parametrize("name", NETS)
def test_of_each_addition_the_skip_alone_is_quantized(name: str, net: Callable[[str], Any]) -> None:
    found = net(name)
    before, after = Index(found.fp32), Index(found.int8)
    for node in (node for node in after.nodes if node.op_type == "Add"):
        made = [after.producer[tensor] for tensor in node.input]
        quantized = [maker.op_type == "DequantizeLinear" for maker in made]
        assert sorted(quantized) == [False, True]
        branch = made[quantized.index(False)]
        module = found.exported.modules[branch.name]
        assert branch.op_type == "Conv"
        assert "downsample" not in module
        assert module.rsplit(".", 1)[-1] in ("conv2", "conv3")
        skip = made[quantized.index(True)]
        source = after.producer[skip.input[0]].input[0]
        assert source in [before.producer[tensor].output[0] for tensor in _additions(before)[node.name]]


def _additions(graph: Index) -> dict[str, list[str]]:
    return {node.name: list(node.input) for node in graph.nodes if node.op_type == "Add"}


@pytest.mark.parametrize("name", NETS)
def test_an_identity_skip_shares_its_pair_with_the_first_convolution(name: str, net: Callable[[str], Any]) -> None:
    found = net(name)
    graph = Index(found.int8)
    modules = found.exported.modules
    readers = [
        {modules[reader.name] for reader in graph.readers(n.output[0])}
        for n in graph.nodes
        if n.op_type == "DequantizeLinear"
    ]
    block = "layer1.0" if name == "cifar" else "layer1.1"
    assert {block, f"{block}.conv1"} in readers
    quantized = [node.input[0] for node in graph.nodes if node.op_type == "QuantizeLinear"]
    assert len(quantized) == len(set(quantized))


@pytest.mark.parametrize("name", NETS)
def test_nothing_stands_in_front_of_a_relu_or_a_max_pool(name: str, net: Callable[[str], Any]) -> None:
    graph = Index(net(name).int8)
    for node in graph.nodes:
        if node.op_type in ("Relu", "MaxPool"):
            assert graph.producer[node.input[0]].op_type in ("Conv", "Add", "Relu")


@pytest.mark.parametrize("name", NETS)
def test_the_global_pool_has_int8_on_both_sides(name: str, net: Callable[[str], Any]) -> None:
    graph = Index(net(name).int8)
    pool = next(node for node in graph.nodes if node.op_type == "GlobalAveragePool")
    assert graph.producer[pool.input[0]].op_type == "DequantizeLinear"
    (flatten,) = graph.readers(pool.output[0])
    (quantize,) = graph.readers(flatten.output[0])
    assert (flatten.op_type, quantize.op_type) == ("Flatten", "QuantizeLinear")


def test_option_a_moves_int8_values(net: Callable[[str], Any]) -> None:
    found = net("cifar")
    graph = Index(found.int8)
    slices = [node for node in graph.nodes if node.op_type == "Slice"]
    first = [node for node in slices if graph.producer[node.input[0]].op_type != "Slice"]
    assert [graph.producer[node.input[0]].op_type for node in first] == ["DequantizeLinear"] * 2
    moved = [point for point in found.placement.points if point.range_of != point.tensor]
    assert len(moved) == 2
    for point in moved:
        assert point.range_of in found.placement.tensors
        assert point.tensor not in found.placement.tensors
        scales = [graph.constant(f"{tensor}_scale") for tensor in (point.tensor, point.range_of)]
        assert scales[0] == scales[1]


def test_the_second_rounding_behind_a_moved_tensor_changes_no_bit(
    net: Callable[[str], Any], exact: Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
) -> None:
    found = net("cifar")
    shorter = onnx.ModelProto()
    shorter.CopyFrom(found.int8)
    moved = {f"{p.tensor}_dequantized": p.tensor for p in found.placement.points if p.range_of != p.tensor}
    removed = 0
    for node in shorter.graph.node:
        for i, tensor in enumerate(node.input):
            if tensor in moved:
                node.input[i] = moved[tensor]
                removed += 1
    assert removed == 2
    x = np.random.default_rng(9).standard_normal((16, 3, 32, 32)).astype(np.float32) * 2
    np.testing.assert_array_equal(exact(shorter, x), exact(found.int8, x))


@pytest.mark.parametrize("name", NETS)
def test_weights_are_quantized_along_their_output_channels(name: str, net: Callable[[str], Any]) -> None:
    found = net(name)
    graph = Index(found.fp32)
    weighted = {node.input[1] for node in graph.nodes if node.op_type in ("Conv", "Gemm")}
    assert {weight.tensor for weight in found.placement.weights} == weighted
    assert {weight.axis for weight in found.placement.weights} == {0}


@pytest.mark.parametrize("name", NETS)
def test_every_node_has_a_decision_and_a_reason(name: str, net: Callable[[str], Any]) -> None:
    found = net(name)
    layers = {layer.node: layer for layer in found.placement.layers}
    assert list(layers) == [node.name for node in found.fp32.graph.node]
    wanted = {"Conv": "int8", "Gemm": "int8", "Add": "int8 skip", "GlobalAveragePool": "int8", "Relu": "follows"}
    for node in found.fp32.graph.node:
        layer = layers[node.name]
        assert layer.module == found.exported.modules[node.name]
        assert layer.reason
        assert layer.precision == wanted.get(node.op_type, layer.precision)


def replanned(net: Any, keep: list[str]) -> tuple[Placement, dict[str, str]]:
    placement = plan(net.fp32, net.exported.modules, keep)
    ranges = {name: net.ranges.get(name, SOME_RANGE) for name in placement.tensors}
    assert write_int8(net.fp32, placement, ranges)  # what is left is legal, too
    return placement, {layer.module: layer.precision for layer in placement.layers if layer.op in ("Conv", "Gemm")}


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("conv1", {"conv1"}),
        ("fc", {"fc"}),
        ("layer1.*", {"layer1.0.conv1", "layer1.0.conv2"}),
        ("*.conv2", {"layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"}),
        ("/layer3/layer3.0/conv1/Conv", {"layer3.0.conv1"}),
        ("layer?.0.conv[1]", {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}),
        ("nothing.is.called.so", set()),
        ("CONV1", set()),
    ],
)
def test_patterns_keep_layers_in_float(pattern: str, kept: set[str], net: Callable[[str], Any]) -> None:
    placement, precisions = replanned(net("cifar"), [pattern])
    assert {module for module, precision in precisions.items() if precision == "float"} == kept
    for layer in placement.layers:
        if layer.module in kept and layer.op in ("Conv", "Gemm"):
            assert f"the recipe keeps '{pattern}' in float" in layer.reason
    touched = {name for point in placement.points for name, _ in point.readers}
    touched |= {name for weight in placement.weights for name, _ in weight.readers}
    kept_nodes = {layer.node for layer in placement.layers if layer.module in kept and layer.op in ("Conv", "Gemm")}
    assert not touched & kept_nodes


def test_several_patterns_add_up_and_everything_may_be_kept(net: Callable[[str], Any]) -> None:
    _, precisions = replanned(net("cifar"), ["conv1", "fc"])
    assert {module for module, precision in precisions.items() if precision == "float"} == {"conv1", "fc"}
    placement, _ = replanned(net("cifar"), ["*"])
    assert placement.points == ()
    assert placement.weights == ()
    assert placement.tensors == ()


def test_a_moved_skip_gets_a_range_of_its_own_where_nobody_else_quantizes_its_source(net: Callable[[str], Any]) -> None:
    placement, _ = replanned(net("cifar"), ["layer2.0.conv1"])
    pad = next(layer.node for layer in placement.layers if layer.op == "Pad" and layer.module == "layer2.0.downsample")
    (point,) = [p for p in placement.points if p.tensor == f"{pad}_output_0"]
    assert point.range_of == point.tensor
    assert point.tensor in placement.tensors


def test_a_pool_in_front_of_a_float_layer_stays_in_float(net: Callable[[str], Any]) -> None:
    placement, _ = replanned(net("cifar"), ["fc"])
    pool = next(layer for layer in placement.layers if layer.op == "GlobalAveragePool")
    assert pool.precision == "float"
    assert "one side" in pool.reason


def test_a_kept_block_keeps_its_addition_too(net: Callable[[str], Any]) -> None:
    placement, _ = replanned(net("cifar"), ["layer2.0"])
    addition = {layer.module: layer.precision for layer in placement.layers if layer.op == "Add"}
    assert addition == {"layer1.0": "int8 skip", "layer2.0": "float", "layer3.0": "int8 skip"}


class PreActivation(nn.Module):
    """He et al. 2016: the skip is read before batch norm and ReLU, so both read the addition's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        x = x + self.conv3(torch.relu(self.bn3(x)))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class SqueezeExcite(nn.Module):
    """A block whose branch ends in a gate, between 1×1 convolutions on pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        branch = self.body(x)
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(branch.mean((2, 3), keepdim=True)))))
        x = torch.relu(branch * gate + x)
        y: Tensor = self.fc(torch.flatten(nn.functional.avg_pool2d(x, 8), 1))
        return y


@pytest.mark.parametrize(("make", "additions"), [(PreActivation, 2), (SqueezeExcite, 1)])
def test_other_residual_nets_are_quantized_legally(make: type[nn.Module], additions: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exported = export_module(make(), (8, 8))
    model = onnx.load_model_from_string(exported.content)
    placement = plan(model, exported.modules)
    assert [layer.precision for layer in placement.layers if layer.op == "Add"] == ["int8 skip"] * additions
    assert all(layer.precision == "int8" for layer in placement.layers if layer.op in ("Conv", "Gemm"))
    written = Index(write_int8(model, placement, dict.fromkeys(placement.tensors, SOME_RANGE)))
    for node in written.nodes:
        if node.op_type == "Add":
            made = sorted(written.producer[tensor].op_type for tensor in node.input)
            assert made[0] in ("Conv", "DequantizeLinear")
            assert "DequantizeLinear" in made
            assert set(made) & {"Conv", "Mul"}


@pytest.mark.parametrize(
    ("body", "op", "precision", "words"),
    [
        ("k = Relu (w) c = Conv (x, k) y = GlobalAveragePool (c)", "Conv", "float", "computed"),
        ("c = ConvTranspose (x, wt) y = GlobalAveragePool (c)", "ConvTranspose", "float", "transposed"),
        ("c = Conv (x, w) a = Add (c, one) y = GlobalAveragePool (a)", "Add", "float", "adds a constant"),
        ("c = Relu (x) a = Add (c, x) y = GlobalAveragePool (a)", "Add", "float", "not a residual block's"),
        ("c = Conv (x, w) y = GlobalAveragePool (c)", "GlobalAveragePool", "float", "not in int8"),
        ("c = Conv (x, w) s = Sigmoid (c) y = GlobalAveragePool (s)", "Sigmoid", "float", "no int8 form"),
        ("c = Conv (x, w) p = GlobalAveragePool (c) y = Conv (p, v)", "GlobalAveragePool", "int8", "both sides"),
        (
            "c = Conv (x, w) p = GlobalAveragePool (c) d = Conv (p, v) y = Add (d, p)",
            "GlobalAveragePool",
            "int8",
            "both sides",
        ),
        (
            "c = Conv (x, w) p = GlobalAveragePool (c) d = Conv (p, v) s = Sigmoid (p) y = Mul (d, s)",
            "GlobalAveragePool",
            "float",
            "also read in float",
        ),
    ],
)
def test_what_cannot_be_int8_says_why(body: str, op: str, precision: str, words: str, graph: Graph) -> None:
    ones: dict[str, np.ndarray] = {
        "w": np.ones((4, 3, 3, 3), np.float32),
        "wt": np.ones((3, 4, 3, 3), np.float32),
        "v": np.ones((4, 4, 1, 1), np.float32),
        "one": np.ones((4, 1, 1), np.float32),
    }
    model = graph(f"net (float[N,3,8,8] x) => (float[N,C,1,1] y) {{ {body} }}", ones)
    placement = plan(model, {})
    layer = next(layer for layer in placement.layers if layer.op == op)
    assert layer.precision == precision
    assert words in layer.reason
    write_int8(model, placement, dict.fromkeys(placement.tensors, SOME_RANGE))


@pytest.mark.parametrize(("attributes", "shape", "axis"), [("<transB = 1>", (5, 192), 0), ("", (192, 5), 1)])
def test_a_gemm_is_quantized_along_its_outputs(
    attributes: str, shape: tuple[int, int], axis: int, graph: Graph
) -> None:
    body = f"{{ f = Flatten (x) y = Gemm {attributes} (f, k) }}"
    model = graph(f"net (float[N,3,8,8] x) => (float[N,5] y) {body}", {"k": np.ones(shape, np.float32)})
    (weight,) = plan(model, {}).weights
    assert weight.axis == axis
    assert plan(model, {}).points[0].tensor == "f"


def test_a_shared_weight_is_quantized_once(graph: Graph) -> None:
    body = "{ c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu (c) y = Conv (r, w) }"
    model = graph(f"net (float[N,3,8,8] x) => (float[N,3,h,u] y) {body}", {"w": np.ones((3, 3, 3, 3), np.float32)})
    (weight,) = plan(model, {}).weights
    assert weight.readers == (("Conv_0", 1), ("Conv_2", 1))
