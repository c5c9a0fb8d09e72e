"""Nets that are no residual nets: each goes through by the same rules, or is refused by the name of its operator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import version_converter
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from torch import nn

import edgeres
from edgeres.artifacts import Preprocessing
from edgeres.bundle import verify
from edgeres.calibrate import choose, observe
from edgeres.export import adopt_onnx
from edgeres.inspection import inspect_bundle
from edgeres.quantize import lint, plan, shiftable, write_int8
from edgeres.quantize.graph import Graph as Index
from edgeres.recipe import dossier
from edgeres.samples import open_samples

Graph = Callable[..., onnx.ModelProto]
Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
HALF = (0.5, 0.5, 0.5)

NETS = '''
"""Small nets of other kinds, for 32×32 images."""

from torch import nn


def separable(channels, out, stride, act):
    """A depthwise and a pointwise convolution, as MobileNet has them."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels), act(),
        nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), act(),
    )


def mobile(num_classes=10, act=nn.ReLU6):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), act(),
        separable(16, 24, 1, act), separable(24, 32, 2, act), separable(32, 48, 1, act),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(48, num_classes),
    )


def swish(num_classes=10):
    return mobile(num_classes, nn.Hardswish)


def vgg(num_classes=10):
    layers, channels = [], 3
    for width in (16, 24, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.5), nn.Linear(48, num_classes),
    )
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module ``small_nets``, as a user's own module that can be imported."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "small_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    yield __import__("small_nets")
    sys.path.remove(str(folder))
    del sys.modules["small_nets"]


def images(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return digits, float32 ``(count, 3, 32, 32)``, normalized, and their labels."""
    samples = open_samples(dossier() / "digits" / split, count=count, labelled=True)
    preprocessing = Preprocessing((32, 32), 32, mean=HALF, std=HALF)
    assert samples.labels is not None
    return next(iter(samples.batches(preprocessing, count))), np.asarray(samples.labels)


def fitted(net: nn.Module, epochs: int = 12) -> nn.Module:
    """Return a net fitted to 600 digits in some seconds: good enough that its answers are no accident."""
    x, labels = images("validation", 600)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in net.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
    return net.eval()


@pytest.mark.parametrize(
    ("name", "activation_range"),
    [("mobile", "shifted"), ("swish", "symmetric"), ("vgg", "shifted")],
)
def test_a_users_own_module_keeps_its_answers(
    name: str, activation_range: str, nets: Any, tmp_path: Path, exact: Exact, fits: Callable[[Any, str], Path]
) -> None:
    digits = dossier() / "digits"
    edgeres.build(
        model=f"small_nets:{name}",
        weights=str(fits(nets, name)),
        precision="int8",
        mean=HALF,
        std=HALF,
        input_size=(32, 32),
        calibration=str(digits / "calibration"),
        validation=str(digits / "validation"),
        calibration_count=100,
        activation_range=activation_range,
        out=tmp_path / "bundle",
    )
    manifest = verify(tmp_path / "bundle")
    assert manifest.report is not None
    assert manifest.report.top1_reference is not None
    assert manifest.report.top1_reference > 0.9
    assert manifest.report.agreement >= 0.99
    assert not any("recovery is off" in text for text in manifest.warnings)
    written = onnx.load(tmp_path / "bundle" / "model.int8.onnx")
    assert lint(written) == []
    weighted = [layer for layer in inspect_bundle(tmp_path / "bundle")["plan"] if layer["type"] in ("Conv", "Gemm")]
    assert {layer["precision"] for layer in weighted} == {"int8"}
    assert "HardSwish" not in {node.op_type for node in written.graph.node}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Path]:
    """Return ``fits(nets, name)``: the weights of one of them, fitted once."""
    folder = tmp_path_factory.mktemp("weights")

    def make(nets: Any, name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_file(fitted(getattr(nets, name)()).state_dict(), path)
        return path

    return make


RNG = np.random.default_rng(5)


def some(*shape: int, size: float = 0.3) -> np.ndarray:
    return (size * RNG.standard_normal(shape)).astype(np.float32)


C, TAIL = (
    "c = Conv <pads = [1, 1, 1, 1]> (x, w)",
    "p = GlobalAveragePool (t) f = Flatten (p) y = Gemm <transB = 1> (f, k, b)",
)
HEAD = f"{C} p = GlobalAveragePool (c)"
PIECES = {
    "clip": f"{C} a = Clip (c, zero, six) t = Conv (a, v) {TAIL}",
    "hard swish": f"{C} a = HardSwish (c) t = Conv (a, v) {TAIL}",
    "swish": f"{C} s = Sigmoid (c) a = Mul (c, s) t = Conv (a, v) {TAIL}",
    "leaky": f"{C} a = LeakyRelu (c) t = Conv (a, v) {TAIL}",
    "prelu": f"{C} a = PRelu (c, slope) t = Conv (a, v) {TAIL}",
    "mish": f"{C} s = Softplus (c) h = Tanh (s) a = Mul (c, h) t = Conv (a, v) {TAIL}",
    "gelu": f"{C} s = Erf (c) h = Mul (c, s) a = Add (c, h) t = Conv (a, v) {TAIL}",
    "average pool": f"{C} a = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (c) t = Conv (a, v) {TAIL}",
    "padded average pool": f"{C} a = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c) "
    f"t = Conv (a, v) {TAIL}",
    "dense": f"{C} n = BatchNormalization (c, g, m, m, g) r = Relu (n) d = Conv <pads = [1, 1, 1, 1]> (r, v) "
    "t = Concat <axis = 1> (c, d) p = GlobalAveragePool (t) f = Flatten (p) y = Gemm (f, wide)",
    "inception": f"{C} r = Relu (c) q = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) "
    "d = Conv <pads = [1, 1, 1, 1]> (r, v) e = Conv (q, u) t = Concat <axis = 1> (d, e) "
    "p = GlobalAveragePool (t) f = Flatten (p) y = Gemm (f, wide)",
    "depthwise": f"{C} r = Relu (c) t = Conv <group = 8, pads = [1, 1, 1, 1]> (r, d1) {TAIL}",
    "shuffle": f"{C} r = Reshape (c, s1) q = Transpose <perm = [0, 2, 1, 3, 4]> (r) a = Reshape (q, s2) "
    f"t = Conv (a, v) {TAIL}",
    "split": f"{C} a0, a1 = Split <axis = 1> (c, fours) r = Relu (a0) t = Concat <axis = 1> (r, a1) {TAIL}",
    "resize": f'{C} a = Resize <mode = "nearest"> (c, , double) t = Conv (a, v) {TAIL}',
    "transposed": f"{C} a = ConvTranspose <strides = [2, 2]> (c, wt) t = Conv (a, v) {TAIL}",
    "batch norm in front": f"i = BatchNormalization (x, g3, m3, m3, g3) t = Conv (i, w) {TAIL}",
    "batch norm behind": f"{C} r = Relu (c) t = BatchNormalization (r, g, m, m, g) {TAIL}",
    "instance norm": f"{C} t = InstanceNormalization (c, g, m) {TAIL}",
    "sum": f"{C} d = Conv <pads = [1, 1, 1, 1]> (c, v) t = Sum (c, d) {TAIL}",
    "gemm": f"{HEAD} f = Flatten (p) y = Gemm (f, kt, b)",
    "gemm, scaled": f"{HEAD} f = Flatten (p) y = Gemm <alpha = 0.5, beta = 2.0> (f, kt, b)",
    "matmul and add": f"{HEAD} f = Flatten (p) l = MatMul (f, kt) y = Add (l, b)",
    "reshape": f"{HEAD} f = Reshape (p, flat) y = Gemm (f, kt, b)",
    "squeeze": f"{HEAD} f = Squeeze (p, plane) y = Gemm (f, kt, b)",
    "reduce mean": f"{C} f = ReduceMean <axes = [2, 3], keepdims = 0> (c) y = Gemm (f, kt, b)",
    "global max pool": f"{C} p = GlobalMaxPool (c) f = Flatten (p) y = Gemm (f, kt, b)",
    "convolution at the end": f"{HEAD} l = Conv (p, kc) y = Flatten (l)",
    "softmax at the end": f"{HEAD} f = Flatten (p) l = Gemm (f, kt, b) y = Softmax <axis = 1> (l)",
    "same padding": f'{C} a = MaxPool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"> (c) '
    f't = Conv <auto_pad = "SAME_UPPER"> (a, v) {TAIL}',
    "normalization inside": f"n = Div (x, six) i = Sub (n, three) t = Conv (i, w) {TAIL}",
}  # fmt: skip
WEIGHTS: dict[str, np.ndarray] = {
    "w": some(8, 3, 3, 3), "v": some(8, 8, 3, 3, size=0.15), "u": some(8, 8, 1, 1), "d1": some(8, 1, 3, 3),
    "wt": some(8, 8, 2, 2), "k": some(5, 8), "kt": some(8, 5), "kc": some(5, 8, 1, 1), "wide": some(16, 5),
    "b": some(5),
    "g": RNG.uniform(0.5, 2, 8).astype(np.float32), "m": some(8), "slope": np.abs(some(8, 1, 1)),
    "g3": RNG.uniform(0.5, 2, 3).astype(np.float32), "m3": some(3), "zero": np.float32(0), "six": np.float32(6),
    "three": some(1, 3, 1, 1), "double": np.array([1, 1, 2, 2], np.float32), "flat": np.array([0, -1]),
    "plane": np.array([2, 3]), "s1": np.array([0, 2, 4, 8, 8]), "s2": np.array([0, 8, 8, 8]), "fours": np.array([4, 4]),
}  # fmt: skip
X = RNG.standard_normal((12, 3, 8, 8)).astype(np.float32)


def quantized(model: onnx.ModelProto, folder: Path, shift: bool) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a file's float network and its int8 model, calibrated on images of the same kind."""
    path = folder / "theirs.onnx"
    onnx.save(model, path)
    exported = adopt_onnx(path, None)
    (folder / "fp32.onnx").write_bytes(exported.content)
    fp32 = onnx.load(folder / "fp32.onnx")
    placement = plan(fp32, exported.modules)
    allowed = shiftable(fp32, placement) if shift else ()
    images = np.random.default_rng(9).standard_normal((32, 3, 8, 8)).astype(np.float32)
    ranges = choose(observe(folder / "fp32.onnx", placement.tensors, [images]), "minmax", 99.99, allowed)
    return fp32, write_int8(fp32, placement, ranges)


@pytest.mark.parametrize(("shift", "batch"), [(False, "1"), (True, "N")], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("name", PIECES)
def test_every_piece_goes_through_and_every_reader_agrees(
    name: str, batch: str, shift: bool, graph: Graph, exact: Exact, tmp_path: Path
) -> None:
    """The int8 model is close to FP32, and ONNX Runtime and onnx's reference evaluator read the same in it.

    Some releases of the evaluator have Q/DQ from opset 19 on only; between 17 and 19 their meaning did not change.
    """
    text = f"net (float[{batch},3,8,8] x) => (float[{batch},5] y) {{ {PIECES[name]} }}"
    used = {word for node in onnx.parser.parse_graph(text).node for word in node.input}
    model = graph(text, {key: value for key, value in WEIGHTS.items() if key in used})
    fp32, int8 = quantized(model, tmp_path, shift)
    onnx.checker.check_model(int8, full_check=True)
    assert lint(int8, (), fp32) == []
    wanted, got = exact(fp32, X), exact(int8, X)
    assert 10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum()) > 20
    newer = version_converter.convert_version(int8, 19)
    (referred,) = ReferenceEvaluator(newer).run(None, {int8.graph.input[0].name: X})
    scale = np.abs(wanted).max()
    close = np.abs(referred - got).max(1) <= 1e-5 * scale
    assert close.mean() > 0.7, "more than a rounding that fell to the other side"
    assert np.abs(referred - got).max() <= 0.05 * scale
    weighted = [
        n
        for n in Index(int8).nodes
        if n.op_type in ("Conv", "MatMul") or (n.op_type == "Gemm" and "scaled" not in name)
    ]
    made = {output: node.op_type for node in int8.graph.node for output in node.output}
    assert {made.get(tensor) for node in weighted for tensor in node.input[:2]} == {"DequantizeLinear"}


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 17, 18, 19, 20, 21, 22])
def test_a_mobile_net_of_any_opset(opset: int, graph: Graph, exact: Exact, tmp_path: Path) -> None:
    clip = "a = Clip <min = 0.0, max = 6.0> (c)" if opset < 11 else "a = Clip (c, zero, six)"
    body = f"{C} {clip} e = Conv <group = 8, pads = [1, 1, 1, 1]> (a, d1) t = Conv (e, v) {TAIL}"
    text = f"net (float[1,3,8,8] x) => (float[1,5] y) {{ {body} }}"
    names = ("w", "d1", "v", "k", "b", *(("zero", "six") if opset >= 11 else ()))
    model = graph(text, {name: WEIGHTS[name] for name in names}, opset)
    fp32, int8 = quantized(model, tmp_path, False)
    wanted = np.concatenate([exact(model, X[i : i + 1]) for i in range(len(X))])
    np.testing.assert_allclose(exact(fp32, X), wanted, rtol=1e-4, atol=1e-5)
    assert lint(int8) == []


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck"])
@pytest.mark.parametrize("form", ["net", "shifted"])
def test_residual_nets_read_the_same_everywhere(
    name: str, form: str, request: pytest.FixtureRequest, exact: Exact
) -> None:
    """Also with ONNX Runtime's own optimizations off, in onnx's checker, and in its evaluator."""
    int8 = request.getfixturevalue(form)(name).int8
    onnx.checker.check_model(int8, full_check=True)
    x = np.random.default_rng(3).standard_normal((2, 3, 32, 32)).astype(np.float32)
    (referred,) = ReferenceEvaluator(version_converter.convert_version(int8, 19)).run(None, {"input": x})
    got = exact(int8, x)
    noise = np.square(got - referred).sum()
    assert noise == 0 or 10 * np.log10(np.square(got).sum() / noise) > 30
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(int8.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": x})[0].shape == got.shape


def test_weights_of_the_test_are_used() -> None:
    used = {word for text in PIECES.values() for word in onnx.parser.parse_graph(
        f"net (float[N,3,8,8] x) => (float[N,5] y) {{ {text} }}").node for word in word.input}  # fmt: skip
    assert WEIGHTS.keys() <= used
