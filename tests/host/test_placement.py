"""Where int8 goes: exactly the tensors that TensorRT fuses, named by the modules that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeres.artifacts import TensorRange
from edgeres.errors import QuantizationError
from edgeres.export import export_module
from edgeres.quantize import Placement, plan, write_int8
from edgeres.quantize.graph import Graph as Index

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
NETS = ("cifar", "basic", "bottleneck")
POOL = "GlobalAveragePool"
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
        ("layer1", {"layer1.0.conv1", "layer1.0.conv2"}),
        ("layer[13]", {"layer1.0.conv1", "layer1.0.conv2", "layer3.0.conv1", "layer3.0.conv2"}),
        ("layer2.0", {"layer2.0.conv1", "layer2.0.conv2"}),
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


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["CONV1"], r"'CONV1' \(did you mean conv1"),
        (["layer1.0.con1"], r"'layer1\.0\.con1' \(did you mean .*layer1\.0\.conv1"),
        (["layer1.0.conv"], r"'layer1\.0\.conv' \(did you mean"),
        (["1.0.conv1"], "'1.0.conv1'"),
        (["layer"], "'layer'"),
        ([""], "''"),
        (["zzz", "fc", "yyy.*"], r"in the model: 'zzz'; 'yyy\.\*'\. Patterns"),
    ],
)
def test_patterns_that_name_nothing_are_refused_with_what_is_close(
    patterns: list[str], words: str, net: Callable[[str], Any]
) -> None:
    found = net("cifar")
    with pytest.raises(QuantizationError, match=words) as caught:
        plan(found.fp32, found.exported.modules, patterns)
    assert "'fc'" not in str(caught.value)


def test_a_kept_pool_stays_in_float_between_int8_layers(net: Callable[[str], Any]) -> None:
    placement, precisions = replanned(net("cifar"), ["avgpool"])
    pool = next(layer for layer in placement.layers if layer.op == "GlobalAveragePool")
    assert (pool.precision, pool.reason) == ("float", "the recipe keeps 'avgpool' in float")
    assert set(precisions.values()) == {"int8"}
    assert placement.kept == (pool.node,)


def test_a_kept_block_keeps_its_addition_too(net: Callable[[str], Any]) -> None:
    placement, _ = replanned(net("cifar"), ["layer2.0"])
    addition = {layer.module: layer.precision for layer in placement.layers if layer.op == "Add"}
    assert addition == {"layer1.0": "int8 skip", "layer2.0": "float", "layer3.0": "int8 skip"}


@pytest.mark.parametrize("name", NETS)
def test_a_skip_is_not_quantized_where_its_branch_ends_in_float(name: str, net: Callable[[str], Any]) -> None:
    """A builder adds in the type of the convolution in front; what was rounded for it would be read in float again."""
    last = "conv3" if name == "bottleneck" else "conv2"
    placement, _ = replanned(net(name), [f"layer2.0.{last}"])
    additions = {layer.module: layer for layer in placement.layers if layer.op == "Add"}
    assert additions["layer2.0"].precision == "float"
    assert "that is in float" in additions["layer2.0"].reason
    assert {each.precision for module, each in additions.items() if module != "layer2.0"} == {"int8 skip"}
    assert additions["layer2.0"].node not in {name for point in placement.points for name, _ in point.readers}


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
    floats = {layer.module for layer in placement.layers if layer.op in ("Conv", "Gemm") and layer.precision != "int8"}
    assert floats == ({"reduce", "expand"} if make is SqueezeExcite else set())  # the gate
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
        ("c = Conv (x, w) s = Clip (c, zero, six) y = GlobalAveragePool (s)", "Clip", "follows", "fused like a ReLU"),
        ("c = Conv (x, w) d = Concat <axis = 1> (c, c) y = GlobalAveragePool (d)", "Concat", "follows", "neighbours"),
        ("p = Pad (x, pads) c = Conv (p, w) y = GlobalAveragePool (c)", "Pad", "follows", "moves"),
        ("p = Pad (x, pads, zero) c = Conv (p, w) y = GlobalAveragePool (c)", "Pad", "follows", "moves"),
        ("p = Pad (x, pads, six) c = Conv (p, w) y = GlobalAveragePool (c)", "Pad", "float", "does not pad with zeros"),
        ("p = GlobalAveragePool (x) c = Conv (p, u) y = Relu (c)", POOL, "int8", "both sides"),
        (
            "p = GlobalAveragePool (x) s = Shape (p) r = Expand (six, s) c = Conv (p, u) y = Add (c, r)",
            POOL,
            "int8",
            "",
        ),
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
        "u": np.ones((4, 3, 1, 1), np.float32),
        "zero": np.float32(0),
        "six": np.float32(6),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
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


def test_depths_are_computed_once(graph: Graph) -> None:
    index = Index(graph("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu (x) }"))
    assert index.convolutions_above is index.convolutions_above


def test_pools_in_a_row_are_all_int8(graph: Graph) -> None:
    body = """{
        c = Conv (x, w)
        p = AveragePool <kernel_shape = [2, 2]> (c)
        q = AveragePool <kernel_shape = [2, 2]> (p)
        m = ReduceMean <axes = [2, 3], keepdims = 1> (q)
        f = Flatten (m)
        y = Gemm <transB = 1> (f, k)
    }"""
    weights = {"w": np.ones((4, 3, 3, 3), np.float32), "k": np.ones((5, 4), np.float32)}
    model = graph(f"net (float[N,3,8,8] x) => (float[N,5] y) {body}", weights)
    placement = plan(model, {})
    assert [point.tensor for point in placement.points] == ["x", "c", "p", "q", "f"]
    pools = [layer.precision for layer in placement.layers if layer.op in ("AveragePool", "ReduceMean")]
    assert pools == ["int8"] * 3
    write_int8(model, placement, dict.fromkeys(placement.tensors, SOME_RANGE))


@pytest.mark.parametrize("behind", ["f = Flatten (p)", "r = Squeeze (p, plane) f = Flatten (r)"])
def test_a_network_output_reads_in_float(behind: str, graph: Graph) -> None:
    weights = {"w": np.ones((4, 3, 3, 3), np.float32), "k": np.ones((5, 4), np.float32), "plane": np.array([2, 3])}
    body = f"c = Conv (x, w) p = GlobalAveragePool (c) {behind} y = Gemm <transB = 1> (f, k)"
    model = graph(f"net (float[N,3,8,8] x) => (float[N,5] y, float[N,4] f) {{ {body} }}", weights)
    placement = plan(model, {})
    (pool,) = [layer for layer in placement.layers if layer.op == "GlobalAveragePool"]
    assert pool.precision == "float"
    assert "the network's output" in pool.reason
    write_int8(model, placement, dict.fromkeys(placement.tensors, SOME_RANGE))


def test_a_pool_whose_readers_are_all_quantized_behind_two_reshapes_is_int8(graph: Graph) -> None:
    weights = {"w": np.ones((4, 3, 3, 3), np.float32), "k": np.ones((5, 4), np.float32)}
    body = """{
        c = Conv (x, w) p = GlobalAveragePool (c)
        f = Flatten (p) g = Flatten (p)
        a = Gemm <transB = 1> (f, k) b = Gemm <transB = 1> (g, k) y = Mul (a, b)
    }"""
    model = graph(f"net (float[N,3,8,8] x) => (float[N,5] y) {body}", weights)
    placement = plan(model, {})
    assert next(layer.precision for layer in placement.layers if layer.op == "GlobalAveragePool") == "int8"
    write_int8(model, placement, dict.fromkeys(placement.tensors, SOME_RANGE))


def sqnr_db(net: Any, exact: Exact) -> float:
    """Return signal over noise of the int8 logits, on random images that were not calibrated on."""
    x = np.random.default_rng(99).standard_normal((16, 3, 32, 32)).astype(np.float32)
    wanted = exact(net.fp32, x).astype(np.float64)
    return float(10 * np.log10(np.square(wanted).sum() / np.square(exact(net.int8, x) - wanted).sum()))


class Viewed(nn.Module):
    """The usual ending of a hand-written net: a view by the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1)
        y: Tensor = self.fc(x.view(x.size(0), -1))
        return y


class Padded(nn.Module):
    """A shortcut that subsamples, and fills the new channels with something that its input never is."""

    def __init__(self, value: float, mode: str) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv2, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        self.value, self.mode = value, mode

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        small = x[:, :, ::2, ::2]
        if self.mode == "constant":
            skip = F.pad(small, (0, 0, 0, 0, 4, 4), value=self.value)
        else:
            skip = F.pad(torch.cat([small, small], 1)[..., 1:-1, 1:-1], (1, 1, 1, 1), mode=self.mode)
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))) + skip)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def depthwise(channels: int, stride: int, expand: int) -> nn.Sequential:
    """MobileNetV2's inverted residual: expand, depthwise, and a linear projection."""
    wide = channels * expand
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        nn.Conv2d(wide, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


class Mobile(nn.Module):
    """A small MobileNetV2: ReLU6, depthwise convolutions, linear bottlenecks with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.ModuleList([depthwise(8, 1, 4), depthwise(8, 1, 4), depthwise(8, 2, 4)])
        self.head, self.fc = nn.Sequential(nn.Conv2d(8, 32, 1), nn.ReLU6()), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            branch = block(x)
            x = x + branch if branch.shape == x.shape else branch
        y: Tensor = self.fc(self.head(x).mean((2, 3)))
        return y


class Dense(nn.Module):
    """DenseNet: each layer reads all before it, through batch norm and ReLU; an average pool between the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 + 4 * i) for i in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(4)])
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
            x = F.avg_pool2d(x, 2) if i == 1 else x
        y: Tensor = self.fc(torch.relu(x).mean((2, 3)))
        return y


class Swish(nn.Module):
    """SiLU between convolutions, and one convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = x + F.silu(self.body(x))
        x = F.silu(self.body(x))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (Viewed, 30),
        (lambda: Padded(0.0, "constant"), 25),
        (lambda: Padded(20.0, "constant"), 25),
        (lambda: Padded(0.0, "reflect"), 25),
        (Mobile, 20),
        (Dense, 25),
        (Swish, 25),
    ],
    ids=["view", "pad 0", "pad 20", "reflect", "MobileNet", "DenseNet", "SiLU"],
)
def test_nets_of_other_kinds_keep_their_answers(
    make: Callable[[], nn.Module], least: float, quantize: Callable[..., Any], exact: Exact
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, (nn.Conv2d, nn.Linear)):
                    part.weight.mul_(2)  # so that no answer is its bias alone
            module(torch.randn(64, 3, 32, 32))  # gives the batch norms statistics
    found = quantize(module)
    weighted = [layer for layer in found.placement.layers if layer.op in ("Conv", "Gemm")]
    assert {layer.precision for layer in weighted} == {"int8"}
    assert sqnr_db(found, exact) >= least


def test_a_pool_behind_which_the_batch_is_asked_for_is_int8(quantize: Callable[..., Any]) -> None:
    found = quantize(Viewed())
    (pool,) = [layer for layer in found.placement.layers if layer.op == "GlobalAveragePool"]
    assert (pool.precision, pool.reason) == ("int8", "int8 on both sides: its input and its output are quantized")
    index = Index(found.int8)
    assert [index.producer[node.input[0]].op_type for node in index.nodes if node.op_type in (POOL, "Gemm")] == [
        "DequantizeLinear",
        "DequantizeLinear",
    ]


def test_the_skips_of_linear_bottlenecks_are_int8(quantize: Callable[..., Any]) -> None:
    found = quantize(Mobile())
    additions = [layer.precision for layer in found.placement.layers if layer.op == "Add"]
    assert additions == ["int8 skip"] * 2
    clips = [layer for layer in found.placement.layers if layer.op == "Clip"]
    assert {layer.precision for layer in clips} == {"follows"}
    index = Index(found.int8)
    assert {index.producer[node.input[0]].op_type for node in index.nodes if node.op_type == "Clip"} == {"Conv"}


def test_a_filled_shortcut_has_a_range_of_its_own(quantize: Callable[..., Any]) -> None:
    found = quantize(Padded(20.0, "constant"))
    pad = next(node.output[0] for node in found.fp32.graph.node if node.op_type == "Pad")
    (point,) = [point for point in found.placement.points if point.tensor == pad]
    assert point.range_of == pad
    assert found.ranges[pad].amax >= 20
