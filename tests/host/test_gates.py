"""Squeeze-and-excitation gates are known by what they compute, whoever wrote the graph; and convolutions in groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgeres
from edgeres import compilation, targets
from edgeres.artifacts import QuantizedModel, from_data
from edgeres.compilation import FLOAT_GROUPS, compile_bundle, grouped_precision
from edgeres.files import content_ref
from edgeres.quantize import plan
from edgeres.quantize.gates import gates
from edgeres.quantize.graph import Graph as Index
from edgeres.quantize.grouped import grouped_nodes
from edgeres.recipe import engine_section, load_recipe

Graph = Callable[..., onnx.ModelProto]

CONVOLUTIONS = """
    z = GlobalAveragePool (x)
    a = Conv (z, w1, b1)
    r = Relu (a)
    e = Conv (r, w2, b2)
    s = Sigmoid (e)
    y = Mul (x, s)"""
MATRICES = """
    p = ReduceMean <axes = [2, 3], keepdims = 0> (x)
    a = Gemm <transB = 1> (p, m1, b1)
    r = Relu (a)
    e = Gemm <transB = 1> (r, m2, b2)
    h = HardSigmoid (e)
    s = Reshape (h, shape)
    y = Mul (s, x)"""
SWISH_INSIDE = """
    z = GlobalAveragePool (x)
    a = Conv (z, w1, b1)
    t = Sigmoid (a)
    r = Mul (a, t)
    e = Conv (r, w2, b2)
    s = Sigmoid (e)
    y = Mul (x, s)"""
TWO_POOLS = """
    z = GlobalAveragePool (x)
    a = Conv (z, w1, b1)
    e = Conv (a, w2, b2)
    p = GlobalMaxPool (x)
    r = Conv (p, w1, b1)
    t = Conv (r, w2, b2)
    h = Add (e, t)
    s = Sigmoid (h)
    y = Mul (x, s)"""
NO_GATES = {
    "attention to places": "z = ReduceMean <axes = [1]> (x)\n a = Conv <pads = [3, 3, 3, 3]> (z, w7)\n"
    " s = Sigmoid (a)\n y = Mul (x, s)",
    "a pool that is not global": "z = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)\n"
    " a = Conv (z, w1, b1)\n e = Conv (a, w2, b2)\n s = Sigmoid (e)\n y = Mul (x, s)",
    "bounded in the middle alone": "z = GlobalAveragePool (x)\n a = Conv (z, w1, b1)\n s = Sigmoid (a)\n"
    " e = Conv (s, w2, b2)\n y = Mul (x, e)",
    "a swish": "t = Sigmoid (x)\n y = Mul (x, t)",
    "the pool of another tensor": "v = Relu (x)\n z = GlobalAveragePool (v)\n a = Conv (z, w1, b1)\n"
    " e = Conv (a, w2, b2)\n s = Sigmoid (e)\n y = Mul (x, s)",
    "nothing that bounds it": "z = GlobalAveragePool (x)\n a = Conv (z, w1, b1)\n"
    " e = Conv (a, w2, b2)\n y = Mul (x, e)",
    "another way into it": "z = GlobalAveragePool (x)\n a = Conv (z, w1, b1)\n e = Conv (a, w2, b2)\n o = Add (e, x)\n"
    " s = Sigmoid (o)\n y = Mul (x, s)",
    "two images multiplied": "u = Relu (x)\n y = Mul (x, u)",
    "a constant": "y = Mul (x, scale)",
}


SHAPES = {
    "w0": (4, 3, 3, 3), "w1": (2, 4, 1, 1), "w2": (4, 2, 1, 1), "m1": (2, 4), "m2": (4, 2), "b1": (2,), "b2": (4,),
    "w3": (4, 1, 3, 3), "w7": (1, 1, 7, 7), "fc": (2, 4), "scale": (4, 1, 1),
}  # fmt: skip
WEIGHTS = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
WEIGHTS["shape"] = np.array([-1, 4, 1, 1])


def text_of(body: str) -> str:
    """A net around ``body``, which makes y of x."""
    return f"""
net (float[N, 3, 8, 8] input) => (float[N, 2] logits)
{{
    c = Conv <pads = [1, 1, 1, 1]> (input, w0)
    x = Relu (c)
    {body}
    d = Conv <pads = [1, 1, 1, 1], group = 4> (y, w3)
    g = GlobalAveragePool (d)
    f = Flatten (g)
    logits = Gemm <transB = 1> (f, fc)
}}"""


@pytest.mark.parametrize(
    "body", [CONVOLUTIONS, MATRICES, SWISH_INSIDE, TWO_POOLS], ids=["1x1", "matrices", "swish inside", "two pools"]
)
def test_a_gate_stays_in_float_and_what_it_scales_does_not(body: str, graph: Graph) -> None:
    model = graph(text_of(body), WEIGHTS, 13)
    inside = {node.name for node in model.graph.node if node.output[0] in "zparetshy"}
    assert set(gates(Index(model))) == inside
    planned = {layer.node: layer for layer in plan(model, {}).layers}
    assert {planned[name].precision for name in inside} == {"float"}
    assert all("gate" in planned[name].reason for name in inside)
    around = [planned[node.name].precision for node in model.graph.node if node.output[0] in ("c", "d", "logits")]
    assert around == ["int8"] * 3
    quantized = {point.tensor for point in plan(model, {}).points}
    assert "x" not in quantized  # nobody reads it in int8
    assert "y" in quantized


@pytest.mark.parametrize("body", NO_GATES.values(), ids=[*NO_GATES])
def test_what_only_looks_like_a_gate_is_none(body: str, graph: Graph) -> None:
    assert gates(Index(graph(text_of(body), WEIGHTS, 13))) == {}


def test_the_skip_around_a_gated_branch_is_int8() -> None:
    exported, fp32 = exported_net("se_resnext")
    placement = plan(fp32, exported.modules)
    planned = {layer.module: layer for layer in placement.layers if layer.op in ("Add", "Conv", "Gemm")}
    assert planned["layer1.0"].precision == "int8 skip"
    assert "multiplication" in planned["layer1.0"].reason
    assert {module for module, layer in planned.items() if layer.precision == "float"} == {
        f"layer{i}.0.se.fc{j}" for i in (1, 2) for j in (1, 2)
    }
    gated = [node.input[0] for node in fp32.graph.node if node.op_type == "Mul"]
    assert not {point.tensor for point in placement.points} & set(gated)


def exported_net(kind: str) -> tuple[Any, onnx.ModelProto]:
    from edgeres.export import export_module

    exported = export_module(make(kind), (16, 16))
    return exported, onnx.load_from_string(exported.content)


def make(kind: str) -> Any:
    """A net of two stages: ``resnext`` or ``se_resnext``, 4 groups."""
    from edgeres.architectures import Architecture
    from edgeres.models.resnet import ResNet

    attention = "se" if kind.startswith("se_") else "none"
    return ResNet(
        Architecture(kind, "bottleneck", (1, 1), (8, 16), "cifar", "B", 4, 16, 16, "this test", 4, 4, "3x3", attention),
        4,
    ).eval()


def resnext() -> Any:
    """For ``package.module:callable``."""
    return make("resnext")


GROUPED = {"/layer1/layer1.0/conv2/Conv", "/layer2/layer2.0/conv2/Conv"}


def test_grouped_convolutions_are_found() -> None:
    fp32 = exported_net("resnext")[1]
    found = grouped_nodes(Index(fp32))
    assert set(found) == GROUPED
    assert all("in 4 groups" in reason for reason in found.values())
    assert not grouped_nodes(Index(exported_net("se_resnext")[1])).keys() - GROUPED


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"engine.backend": "cpu"}, "int8"),
        ({"engine.target": "rtx"}, "int8"),
        ({"engine.target": "dla0"}, "int8"),
        ({"engine.target": "gpu"}, "float"),
        ({"engine.backend": "tensorrt"}, "float"),
    ],
    ids=str,
)
def test_auto_takes_what_suits_the_target(flags: dict[str, Any], wanted: str) -> None:
    assert grouped_precision(load_recipe(None, flags)) == wanted
    for said in ("int8", "float"):
        assert grouped_precision(load_recipe(None, {**flags, "quantization.grouped": said})) == said


def test_auto_follows_the_backend_that_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, wanted in ((True, "float"), (False, "int8")):
        monkeypatch.setattr(targets, "gpu_is_usable", lambda *_, usable=usable: usable)
        assert grouped_precision(load_recipe(None, {"engine.backend": "auto"})) == wanted


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (48, 16, 16, 3), np.uint8), labels=np.arange(48) % 4)
    return path


def build(out: Path, samples: Path, **options: Any) -> QuantizedModel:
    made = edgeres.build(
        model="test_gates:resnext", calibration=samples, validation=samples, input_size=(16, 16), num_classes=None,
        seed=1, recovery="none", backend="cpu", policy="point", max_drop=100.0, out=out, **options,
    )  # fmt: skip
    return from_data(made.manifest.stages["quantize"].facts, QuantizedModel, "quantize")


@pytest.mark.filterwarnings("ignore")
def test_a_build_leaves_groups_in_float_where_asked(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    out = tmp_path / "bundle"
    model = build(out, samples)
    precisions = {layer.node: layer.precision for layer in model.layers}
    assert {precisions[node] for node in GROUPED} == {"int8"}
    assert model.grouped_int8 == 2
    model = build(out, samples, grouped="float")
    layers = {layer.node: layer for layer in model.layers}
    assert {layers[node].precision for node in GROUPED} == {"float"}
    assert all("4529" in layers[node].reason for node in GROUPED)
    assert model.grouped_int8 == 0
    others = {layer.precision for node, layer in layers.items() if layer.op == "Conv" and node not in GROUPED}
    assert others == {"int8"}
    written = onnx.load(out / "model.int8.onnx").graph
    made = {output: node for node in written.node for output in node.output}
    for node in (node for node in written.node if node.name in GROUPED):
        assert node.input[0] not in made or made[node.input[0]].op_type != "DequantizeLinear"


def test_int8_groups_on_a_gpu_are_a_warning(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    out = tmp_path / "bundle"
    build(out, samples, activation_range="symmetric")

    def built(source: compilation.Source, section: Any, watch: Any) -> tuple[edgeres.artifacts.Engine, tuple[str, ...]]:
        (source.folder / "engines").mkdir(exist_ok=True)
        (source.folder / "engines/gpu.engine").write_bytes(b"plan")
        ref = content_ref("engines/gpu.engine", b"plan")
        return edgeres.artifacts.Engine("gpu", "tensorrt", "int8", ref, {}, {}), ()

    monkeypatch.setattr(compilation, "_tensorrt_engine", built)
    warnings = compile_bundle(out, engine_section({}, {"target": "gpu"}), lambda *_: None)[2]
    assert [text for text in warnings if FLOAT_GROUPS in text]
    build(out, samples, activation_range="symmetric", grouped="float")
    assert not compile_bundle(out, engine_section({}, {"target": "gpu"}), lambda *_: None)[2]
