"""torch → ONNX: the same numbers for any batch, folded, named after modules, repeatable; and refusals in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgeres import models
from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.errors import ExportError
from edgeres.export import export_module
from edgeres.export.constants import fold_constants
from edgeres.export.exported import Exported
from edgeres.export.fold import drop_identities, drop_unused, fold_batch_norms, name_nodes, simplify

Exact = Callable[[onnx.ModelProto, np.ndarray], np.ndarray]
Graph = Callable[..., onnx.ModelProto]


class Small(nn.Module):
    """Convolution, batch norm, ReLU, nested Sequentials, a reused ReLU, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6)), nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Head(nn.Module):
    """A working classifier that tests break in one place by overriding ``after``."""

    def __init__(self, after: Callable[[Tensor], object] = lambda logits: logits) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.after = after

    def forward(self, x: Tensor) -> object:
        return self.after(self.conv(x).mean((2, 3)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                nn.init.uniform_(part.running_mean, -1, 1)
                nn.init.uniform_(part.running_var, 0.5, 2)
                nn.init.uniform_(part.weight, 0.5, 2)
                nn.init.uniform_(part.bias, -1, 1)
    return module


def tiny(**parts: Any) -> Architecture:
    """Return a net with an ImageNet stem and bottlenecks, in which parts are exchanged."""
    return msgspec.structs.replace(ARCHITECTURES["resnet50"], depths=(2, 1), widths=(8, 16), num_classes=6, **parts)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "small": (lambda: seeded(Small), (9, 12)),
    "option A": (lambda: seeded(lambda: models.create("resnet8_cifar")), (32, 32)),
    "not square": (lambda: seeded(lambda: models.create("resnet8_cifar", 3)), (17, 24)),
    "plain": (lambda: seeded(lambda: models.create("plain8_cifar")), (32, 32)),
    "SE-ResNeXt": (lambda: seeded(lambda: models.create(tiny(cardinality=4, group_width=4, attention="se"))), (33, 40)),
    "V1, option C": (lambda: seeded(lambda: models.create(tiny(shortcut="C", stride="1x1"))), (32, 32)),
    "bottlenecks, option A": (lambda: seeded(lambda: models.create(tiny(shortcut="A"))), (32, 32)),
}


@pytest.fixture(params=NETS, scope="module")
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int], Exported]:
    make, size = NETS[request.param]
    module = make()
    return module, size, export_module(module, size)


def test_it_computes_what_torch_computes_for_any_batch(
    exported: tuple[nn.Module, tuple[int, int], Exported], exact: Exact
) -> None:
    module, size, found = exported
    model = onnx.load_model_from_string(found.content)
    for batch in range(1, 6):
        x = np.random.default_rng(batch).standard_normal((batch, 3, *size)).astype(np.float32)
        with torch.inference_mode():
            wanted = module(torch.from_numpy(x)).numpy()
        got = exact(model, x)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert found.max_relative_error <= 1e-5


def test_the_file_is_plain_onnx_for_every_tensorrt(exported: tuple[nn.Module, tuple[int, int], Exported]) -> None:
    module, size, found = exported
    model = onnx.load_model_from_string(found.content)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert found.opset == 17
    assert (found.input_name, found.output_name) == ("input", "logits")
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert found.input_shape == (3, *size)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch"
    assert [d.dim_value for d in shape][1:] == [3, *size]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    with torch.inference_mode():
        assert found.num_classes == module(torch.zeros(1, 3, *size)).shape[1]


def test_batch_norms_and_constants_are_folded(exported: tuple[nn.Module, tuple[int, int], Exported]) -> None:
    model = onnx.load_model_from_string(exported[2].content)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"BatchNormalization", "Constant", "Identity", "Dropout", "Shape", "Concat"}
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_every_node_knows_its_module(exported: tuple[nn.Module, tuple[int, int], Exported]) -> None:
    module, _, found = exported
    model = onnx.load_model_from_string(found.content)
    known = dict(module.named_modules())
    kinds = {"Conv": nn.Conv2d, "Gemm": nn.Linear, "Relu": nn.ReLU}
    assert found.modules.keys() == {node.name for node in model.graph.node}
    for node in model.graph.node:
        assert found.modules[node.name] in known
        if node.op_type in kinds:
            assert isinstance(known[found.modules[node.name]], kinds[node.op_type]), node.name
    weighted = [path for path, part in known.items() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert sorted(found.modules[n.name] for n in model.graph.node if n.op_type in ("Conv", "Gemm")) == sorted(weighted)


def test_weights_are_named_after_their_modules(exported: tuple[nn.Module, tuple[int, int], Exported]) -> None:
    module, _, found = exported
    model = onnx.load_model_from_string(found.content)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for path, part in module.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            assert tensors[f"{path}.weight"].shape == tuple(part.weight.shape)
            assert tensors[f"{path}.bias"].shape == (part.weight.shape[0],)
        if isinstance(part, nn.Linear):
            np.testing.assert_array_equal(tensors[f"{path}.weight"], part.weight.detach().numpy())


def test_the_map_of_a_residual_net_is_that_of_its_forward() -> None:
    found = export_module(models.create("resnet8_cifar"), (32, 32))
    model = onnx.load_model_from_string(found.content)
    block = [
        (n.op_type, found.modules[n.name]) for n in model.graph.node if found.modules[n.name].startswith("layer2.0")
    ]
    assert sorted(block) == [
        ("Add", "layer2.0"),
        ("Conv", "layer2.0.conv1"),
        ("Conv", "layer2.0.conv2"),
        ("Pad", "layer2.0.downsample"),
        ("Relu", "layer2.0.relu1"),
        ("Relu", "layer2.0.relu2"),
        ("Slice", "layer2.0.downsample"),
        ("Slice", "layer2.0.downsample"),
    ]


def test_the_map_of_a_gate_is_that_of_its_forward() -> None:
    found = export_module(models.create(tiny(attention="se"), seed=0), (32, 32))
    model = onnx.load_model_from_string(found.content)
    gate = {node.name: node for node in model.graph.node if found.modules[node.name].startswith("layer1.1.se")}
    assert [(node.op_type, found.modules[name]) for name, node in gate.items()] == [
        ("GlobalAveragePool", "layer1.1.se.squeeze"),
        ("Conv", "layer1.1.se.fc1"),
        ("Relu", "layer1.1.se.relu"),
        ("Conv", "layer1.1.se.fc2"),
        ("Sigmoid", "layer1.1.se.gate"),
        ("Mul", "layer1.1.se"),
    ]
    # The gate weighs the residual: what is squeezed is what is multiplied, and only then comes the addition.
    squeeze, *_, gated = gate.values()
    assert squeeze.input[0] in gated.input
    (reader,) = [node for node in model.graph.node if gated.output[0] in node.input]
    assert (reader.op_type, found.modules[reader.name]) == ("Add", "layer1.1")


@pytest.mark.parametrize("name", NETS)
def test_two_exports_are_the_same_file(name: str) -> None:
    make, size = NETS[name]
    module = make()
    first = export_module(module, size)
    export_module(make(), (size[0] + 8, size[1]))  # whatever happens in between
    again = export_module(module, size, seed=5)
    assert again.content == first.content
    assert again.modules == first.modules
    assert str(torch.__path__[0]).encode() not in first.content


def test_a_model_that_is_a_single_layer_or_a_sequential_is_exported(exact: Exact) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    found = export_module(module, (8, 8))
    assert sorted(found.modules.values()) == ["0", "1"]
    assert found.num_classes == 4


def test_export_leaves_the_model_in_eval_mode() -> None:
    module = seeded(Small).train()
    export_module(module, (9, 9))
    assert not module.training


def crash(logits: Tensor) -> Tensor:
    raise RuntimeError("first line\nsecond line")


def crash_silently(logits: Tensor) -> Tensor:
    raise AssertionError


def crash_when_traced(logits: Tensor) -> Tensor:
    assert not torch.onnx.is_in_onnx_export()
    return logits


def fix_the_batch(logits: Tensor) -> Tensor:
    return logits.reshape(2, 5) * 1.0


def mix_the_batch(logits: Tensor) -> Tensor:
    return logits - logits.mean(0, keepdim=True)


BROKEN: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "feature map": (lambda y: y[:, :, None, None], r"logits of shape \(N, classes\), not \(2, 5, 1, 1\)"),
    "flat": (lambda y: y.reshape(-1), r"logits of shape \(N, classes\), not \(10,\)"),
    "other batch": (lambda y: y[:1], r"not \(1, 5\)"),
    "tuple": (lambda y: (y, y), "not tuple"),
    "dict": (lambda y: {"out": y}, "not dict"),
    "nothing": (lambda y: None, "not NoneType"),
    "raises": (crash, "first line"),
    "raises without a word": (crash_silently, "AssertionError"),
    "raises when traced": (crash_when_traced, "cannot export"),
    "random": (lambda y: y + torch.rand_like(y), "differ"),
    "random scale": (lambda y: y * torch.rand(1), "differ"),
    "dropout": (lambda y: nn.functional.dropout(y, 0.5, training=True), "differ|cannot export"),
    "fixed batch": (fix_the_batch, "batch"),
    "mixed batch": (mix_the_batch, "differ"),
    "NaN": (lambda y: y * torch.nan, "NaN or infinite"),
    "infinite": (lambda y: y / 0.0, "NaN or infinite"),
    "integers": (lambda y: y.argmax(1), "logits"),
    "no ONNX operator": (lambda y: torch.special.bessel_j0(y), "cannot export"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_what_is_no_classifier_is_refused_in_one_line(defect: str) -> None:
    after, words = BROKEN[defect]
    with pytest.raises(ExportError, match=words) as caught:
        export_module(seeded(lambda: Head(after)), (8, 8))
    assert "\n" not in str(caught.value)


def test_nan_weights_are_refused() -> None:
    module = seeded(Small)
    assert isinstance(module, Small)
    module.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"NaN or infinite .* check its weights"):
        export_module(module, (9, 9))


class Foreign(torch.autograd.Function):
    """An operator that exports into a domain of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        return g.op("their.domain::Fancy", x).setType(x.type())


def test_operators_outside_standard_onnx_are_refused_by_name() -> None:
    model = seeded(lambda: Head(lambda y: Foreign.apply(y)))
    with pytest.raises(ExportError, match=r"the exported model has operators .* their\.domain::Fancy\. Export it"):
        export_module(model, (8, 8))


class Ending(nn.Module):
    """A global pool, and one of the many ways to write what comes after it."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.flatten(self.pool(torch.relu(self.norm(self.conv(x))))))
        return y


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], 6),
        lambda x: x.view(x.shape[0], x.shape[1]),
        lambda x: torch.flatten(x, 1),
    ],
    ids=["view", "reshape", "both sizes", "flatten"],
)
def test_flattening_by_the_batch_is_a_flatten(flatten: Callable[[Tensor], Tensor], exact: Exact) -> None:
    module = seeded(lambda: Ending(flatten)).eval()
    model = onnx.load_model_from_string(export_module(module, (8, 8)).content)
    assert operators(model) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 8, 8)).astype(np.float32)
        with torch.inference_mode():
            np.testing.assert_allclose(exact(model, x), module(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [lambda x: x.shape[0], lambda x: x.size(0)])
def test_a_channel_shuffle_has_constant_shapes(size: Callable[[Tensor], int], exact: Exact) -> None:
    def shuffle(x: Tensor) -> Tensor:
        grouped = x.view(size(x), 2, 3, x.shape[2], x.shape[3]).transpose(1, 2).reshape(size(x), 6, 1, 1)
        return grouped.flatten(1)

    module = seeded(lambda: Ending(shuffle)).eval()
    model = onnx.load_model_from_string(export_module(module, (8, 8)).content)
    assert not {"Shape", "Gather", "Concat"} & set(operators(model))
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        np.testing.assert_allclose(exact(model, x), module(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 9), (1, 1)])
def test_an_input_size_that_does_not_fit_is_refused(size: tuple[int, int]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 6, 4))
    with pytest.raises(ExportError, match="--input-size") as caught:
        export_module(module, size)
    assert "\n" not in str(caught.value)


# The passes over a graph, each compared before and after.

FOLDABLE = {
    "w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32),
    "b": np.random.default_rng(1).standard_normal(4).astype(np.float32),
    "g": np.random.default_rng(2).uniform(-2, 2, 4).astype(np.float32),
    "beta": np.random.default_rng(3).standard_normal(4).astype(np.float32),
    "mu": np.random.default_rng(4).standard_normal(4).astype(np.float32),
    "var": np.random.default_rng(5).uniform(0.1, 3, 4).astype(np.float32),
}
HEAD = "net (float[N,3,6,6] x) => (float[N,4,h,w0] y)"
X = np.random.default_rng(6).standard_normal((2, 3, 6, 6)).astype(np.float32)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def unchanged(model: onnx.ModelProto, fold: Callable[[onnx.ModelProto], None], exact: Exact) -> None:
    before = exact(model, X)
    fold(model)
    drop_unused(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(exact(model, X), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [13, 15, 17])
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("c = Conv (x, w) y = BatchNormalization (c, g, beta, mu, var)", ["Conv"]),
        ("c = Conv (x, w, b) y = BatchNormalization <epsilon = 0.3> (c, g, beta, mu, var)", ["Conv"]),
        (
            "c = Conv (x, w) n = BatchNormalization (c, g, beta, mu, var) y = BatchNormalization (n, beta, g, mu, var)",
            ["Conv"],
        ),
        (
            "c = Conv (x, w, b) n = BatchNormalization (c, g, beta, mu, var) d = Conv (x, w, b) y = Add (n, d)",
            ["Conv", "Conv", "Add"],
        ),
        # what must stay: something else reads the convolution, or there is none in front
        (
            "c = Conv (x, w, b) n = BatchNormalization (c, g, beta, mu, var) y = Add (n, c)",
            ["Conv", "BatchNormalization", "Add"],
        ),
        (
            "c = Conv (x, w) r = Relu (c) y = BatchNormalization (r, g, beta, mu, var)",
            ["Conv", "Relu", "BatchNormalization"],
        ),
        (
            "k = Relu (w) c = Conv (x, k) y = BatchNormalization (c, g, beta, mu, var)",
            ["Relu", "Conv", "BatchNormalization"],
        ),
    ],
    ids=["plain", "bias and epsilon", "twice", "shared weights", "also read", "behind a ReLU", "computed weights"],
)
def test_batch_norms_fold_where_nothing_else_reads(
    body: str, left: list[str], opset: int, graph: Graph, exact: Exact
) -> None:
    model = graph(f"{HEAD} {{ {body} }}", FOLDABLE, opset)
    unchanged(model, fold_batch_norms, exact)
    assert operators(model) == left


def test_a_batch_norm_behind_an_output_stays(graph: Graph) -> None:
    text = "net (float[N,3,6,6] x) => (float[N,4,4,4] c, float[N,4,4,4] y)"
    model = graph(f"{text} {{ c = Conv (x, w) y = BatchNormalization (c, g, beta, mu, var) }}", FOLDABLE)
    fold_batch_norms(model)
    assert operators(model) == ["Conv", "BatchNormalization"]


def test_a_batch_norm_in_training_mode_stays(graph: Graph) -> None:
    body = "c = Conv (x, w) y, m, v = BatchNormalization <training_mode = 1> (c, g, beta, mu, var)"
    model = graph(f"{HEAD} {{ {body} }}", FOLDABLE)
    fold_batch_norms(model)
    assert operators(model) == ["Conv", "BatchNormalization"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("i = Identity (x) c = Conv (i, w) j = Identity (c) y = Relu (j)", ["Conv", "Relu"]),
        ("i = Identity (w) j = Identity (i) y = Conv (x, j)", ["Conv"]),
        ("c = Conv (x, w) d = Dropout (c) y = Relu (d)", ["Conv", "Relu"]),
        ("c = Conv (x, w) d = Dropout (c, ratio) y = Relu (d)", ["Conv", "Relu"]),
        ("c = Conv (x, w) d = Dropout (c, ratio, off) y = Relu (d)", ["Conv", "Relu"]),
        ("c = Conv (x, w) y = Identity (c)", ["Conv", "Identity"]),
    ],
)
def test_what_does_nothing_is_dropped(body: str, left: list[str], graph: Graph, exact: Exact) -> None:
    model = graph(f"{HEAD} {{ {body} }}", {**FOLDABLE, "ratio": np.float32(0.5), "off": np.array(False)})
    unchanged(model, drop_identities, exact)
    assert operators(model) == left


@pytest.mark.parametrize(
    "body", ["d = Dropout (c, ratio, on) y = Relu (d)", "d, m = Dropout (c) k = Cast <to = 1> (m) y = Mul (d, k)"]
)
def test_a_dropout_that_does_something_stays(body: str, graph: Graph) -> None:
    model = graph(f"{HEAD} {{ c = Conv (x, w) {body} }}", {**FOLDABLE, "ratio": np.float32(0.5), "on": np.array(True)})
    drop_identities(model)
    assert "Dropout" in operators(model)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("k = Constant <value = float {2.0}> () h = Mul (w, k) y = Conv (x, h)", ["Conv"]),
        ("k = Constant <value_float = 0.5> () c = Conv (x, w) y = Mul (c, k)", ["Conv", "Mul"]),
        ("s = Shape (w) o = ConstantOfShape (s) h = Add (w, o) y = Conv (x, h)", ["Conv"]),
        ("t = Transpose <perm = [0, 1, 3, 2]> (w) y = Conv (x, t)", ["Conv"]),
        ("c = Conv (x, w) s = Shape (c) y = Reshape (c, s)", ["Conv", "Shape", "Reshape"]),
    ],
)
def test_constants_fold_and_nothing_else(body: str, left: list[str], graph: Graph, exact: Exact) -> None:
    model = graph(f"{HEAD} {{ {body} }}", FOLDABLE)
    unchanged(model, fold_constants, exact)
    assert operators(model) == left


SHAPED = "s = Shape (c) n = Gather <axis = 0> (s, zero) u = Unsqueeze (n, one)"


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (f"c = Conv (x, w) {SHAPED} t = Concat <axis = 0> (u, m64) y = Reshape (c, t)", ["Conv", "Flatten"]),
        (f"c = Conv (x, w) {SHAPED} t = Concat <axis = 0> (u, m1) y = Reshape (c, t)", ["Conv", "Flatten"]),
        # half the batch: what looks alike, and is not
        (
            f"c = Conv (x, w) {SHAPED} h = Mul (u, two) t = Concat <axis = 0> (h, m1) y = Reshape (c, t)",
            ["Conv", "Shape", "Gather", "Unsqueeze", "Mul", "Concat", "Reshape"],
        ),
        # the channels in front
        (f"c = Conv (x, w) {SHAPED} t = Concat <axis = 0> (m4, u, m1) y = Reshape (c, t)", None),
    ],
    ids=["size", "rest", "another batch", "batch elsewhere"],
)
def test_only_what_keeps_the_batch_becomes_a_flatten(
    body: str, left: list[str] | None, graph: Graph, exact: Exact
) -> None:
    extra = {
        **{name: np.array([value]) for name, value in (("m64", 64), ("m1", -1), ("m4", 4), ("two", 2))},
        "zero": np.array(0),
        "one": np.array([0]),
    }
    rank = "k0,k1,k2" if left is None else "k0,k1"
    model = graph(f"net (float[N,3,6,6] x) => (float[{rank}] y) {{ {body} }}", {**FOLDABLE, **extra})
    unchanged(model, simplify, exact)
    assert left is None or operators(model) == left
    assert ("Flatten" in operators(model)) == (left is not None and "Flatten" in left)


def test_a_convolution_whose_shape_is_asked_for_still_takes_its_batch_norm(graph: Graph, exact: Exact) -> None:
    body = (
        f"c = Conv (x, w) {SHAPED} n0 = BatchNormalization (c, g, beta, mu, var) "
        "t = Concat <axis = 0> (u, m1) y = Reshape (n0, t)"
    )
    extra = {"m1": np.array([-1]), "zero": np.array(0), "one": np.array([0])}
    model = graph(f"net (float[N,3,6,6] x) => (float[k0,k1] y) {{ {body} }}", {**FOLDABLE, **extra})
    unchanged(model, simplify, exact)
    assert operators(model) == ["Conv", "Flatten"]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("r = RandomNormal <shape = [4, 1, 1]> () c = Conv (x, w) y = Mul (c, r)", "RandomNormal"),
        ("r = RandomUniformLike (g) t = Unsqueeze (r, axes) c = Conv (x, w) y = Mul (c, t)", "RandomUniformLike"),
        (
            "n = ConstantOfShape (huge) m = ReduceMax <keepdims = 0> (n) c = Conv (x, w) y = Mul (c, m)",
            "ConstantOfShape",
        ),
        ("q = QuantizeLinear (w, s, z) d = DequantizeLinear (q, s, z) y = Conv (x, d)", "QuantizeLinear"),
    ],
)
def test_what_must_not_become_a_constant_stays(body: str, kept: str, graph: Graph) -> None:
    extra = {
        "axes": np.array([1, 2]),
        "huge": np.array([5000, 5000]),
        "s": np.float32(0.1),
        "z": np.int8(0),
    }
    model = graph(f"{HEAD} {{ {body} }}", {**FOLDABLE, **extra})
    fold_constants(model)
    assert kept in operators(model)


def test_names_become_unique_and_good_ones_stay(graph: Graph) -> None:
    model = graph(f"{HEAD} {{ c = Conv (x, w) d = Relu (c) e = Relu (d) f = Relu (e) y = Relu (f) }}", FOLDABLE)
    for node, name in zip(model.graph.node, ["", "Relu_3", "mine", "", "mine"], strict=True):
        node.name = name
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == 5
    assert all(names)
    assert names[1:3] == ["Relu_3", "mine"]
    model.graph.node[0].name, model.graph.node[2].name = "", "Conv_0"
    name_nodes(model)
    assert model.graph.node[2].name == "Conv_0"


def test_all_passes_together_keep_the_numbers(graph: Graph, exact: Exact) -> None:
    body = """
        i = Identity (x)
        k = Constant <value = float {0.5}> ()
        h = Mul (w, k)
        c = Conv (i, h, b)
        n = BatchNormalization (c, g, beta, mu, var)
        d = Dropout (n)
        r = Relu (d)
        s = Shape (g)
        o = ConstantOfShape <value = float[1] {2.0}> (s)
        u = Unsqueeze (o, axes)
        y = Mul (r, u)"""
    model = graph(f"{HEAD} {{ {body} }}", {**FOLDABLE, "axes": np.array([1, 2]), "unused": np.zeros(3, np.float32)})
    unchanged(model, simplify, exact)
    assert operators(model) == ["Conv", "Relu", "Mul"]
    assert "unused" not in {tensor.name for tensor in model.graph.initializer}
    assert ort.InferenceSession(model.SerializeToString()).get_inputs()[0].name == "x"
