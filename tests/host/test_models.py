"""The ResNet family: sizes and names as published, what a block computes, and models that users bring."""

from __future__ import annotations

import os
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from edgeres import models
from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.artifacts import Preprocessing
from edgeres.catalog import count
from edgeres.errors import ModelError
from edgeres.models.blocks import BLOCKS, SqueezeExcitation, ZeroPadShortcut
from edgeres.preprocess import prepare

DIGITS = Path(__file__).resolve().parents[2] / "calibration" / "digits"

# Millions of parameters: torchvision's documentation; timm's results for SE nets; He et al. 2015, Table 6, for
# CIFAR-10, where plain nets have as many (section 4.2).
PARAMETERS = {
    "resnet18": "11.690",
    "resnet34": "21.798",
    "resnet50": "25.557",
    "resnet101": "44.549",
    "resnet152": "60.193",
    "resnext50_32x4d": "25.029",
    "resnext101_32x8d": "88.791",
    "wide_resnet50_2": "68.883",
    "se_resnet50": "28.09",
    "se_resnext50_32x4d": "27.56",
    **{
        f"{kind}{depth}_cifar": published
        for kind in ("resnet", "plain")
        for depth, published in ((20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7"))
    },
}

# Milliards of multiply-accumulates at 224 x 224: torchvision's documentation; for V1 and plain nets He et al. 2015,
# Table 1 and section 3.3 (where 3.86 is cut to 3.8), for SE nets Hu et al. 2018, Table 2, of V1's strides.
MACS = {
    "resnet18": "1.814",
    "resnet34": "3.664",
    "resnet50": "4.089",
    "resnet101": "7.801",
    "resnet152": "11.514",
    "resnext50_32x4d": "4.230",
    "resnext101_32x8d": "16.414",
    "wide_resnet50_2": "11.398",
    "plain34": "3.6",
    "resnet101_v1": "7.6",
    "resnet152_v1": "11.3",
}


def variant(name: str, **changes: object) -> Architecture:
    """Return a member of the family with other parts."""
    return msgspec.structs.replace(ARCHITECTURES[name], **changes)


def shown(architecture: Architecture) -> nn.Module:
    """Return a net without memory behind its weights."""
    with torch.device("meta"):
        return models.create(architecture)


def in_units(count: int, unit: float, published: str) -> str:
    """Return a count with as many decimals as the published one has."""
    return f"{count / unit:.{len(published.partition('.')[2])}f}"


@pytest.mark.parametrize("name", sorted({*PARAMETERS, *MACS}))
def test_sizes_are_as_published(name: str) -> None:
    """Measured on the module; what `edgeres models` lists without one is the same."""
    net = ARCHITECTURES[name]
    parameters, macs = models.count(shown(net), (net.size, net.size))
    for measured, unit, published in ((parameters, 1e6, PARAMETERS), (macs, 1e9, MACS)):
        if name in published:
            assert in_units(measured, unit, published[name]) == published[name]
    assert count(net) == (parameters, macs)


def test_a_net_without_a_name_is_as_large_as_published() -> None:
    """Xie et al. 2017, Table 7: ResNeXt-29, 8 × 64d, for CIFAR; shortcuts are B (section 4)."""
    net = Architecture("", "bottleneck", (3, 3, 3), (64, 128, 256), "cifar", "B", 10, 32, 32, "", 8, group_width=64)
    parameters, macs = models.count(shown(net), (32, 32))
    assert in_units(parameters, 1e6, "34.4") == "34.4"
    assert count(net) == (parameters, macs)


def test_every_part_can_be_exchanged() -> None:
    """What a description says of its size is what the module has, also where no published net has these parts."""
    nets = [
        variant("resnet50", depths=(1, 2), widths=(24, 40), size=31, shortcut=shortcut, attention=attention, **groups)
        for shortcut in ("A", "B", "C", "none")
        for attention in ("none", "se")
        for groups in ({}, {"cardinality": 4}, {"cardinality": 2, "group_width": 36}, {"stride": "1x1"})
    ]
    nets += [
        variant("resnet18", depths=(2, 1), widths=(8, 12), stem=stem, size=33, shortcut=shortcut, attention="se")
        for shortcut in ("A", "B", "C", "none")
        for stem in ("imagenet", "cifar")
    ]
    for net in nets:
        assert models.count(shown(net), (net.size, net.size)) == count(net), net
        model = models.create(net, num_classes=3, seed=0)
        assert model(torch.zeros(2, 3, net.size, net.size)).shape == (2, 3)
        projections = [name for name in model.state_dict() if name.endswith("downsample.0.weight")]
        wanted = {"A": 0, "none": 0, "B": 2 if net.block == "bottleneck" else 1, "C": sum(net.depths)}
        assert len(projections) == wanted[net.shortcut], net


def test_count_leaves_the_model_alone() -> None:
    model = models.create("resnet8_cifar", seed=0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert models.count(model, (32, 32)) == (75290, 12239488)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_count_refuses_a_size_that_the_model_does_not_take() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    assert models.count(model, (8, 8)) == (3 * 8 * 8 * 2 + 2, 3 * 8 * 8 * 2)
    with pytest.raises(ModelError, match=r"\(1, 3, 9, 8\).*choose the input size"):
        models.count(model, (9, 8))


@pytest.mark.parametrize(("name", "halving"), [("resnet50", "conv2"), ("resnet50_v1", "conv1")])
def test_shapes_of_resnet50(name: str, halving: str) -> None:
    """The stages' sizes of Table 1; V1 halves the image with the first convolution, V1.5 with the 3x3."""
    model = shown(ARCHITECTURES[name])
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer2.0.conv1", "layer2.0.conv2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert seen == {
        "conv1": (64, 112, 112),
        "maxpool": (64, 56, 56),
        "layer1": (256, 56, 56),
        "layer2": (512, 28, 28),
        "layer2.0.conv1": (128, 28, 28) if halving == "conv1" else (128, 56, 56),
        "layer2.0.conv2": (128, 28, 28),
        "layer3": (1024, 14, 14),
        "layer4": (2048, 7, 7),
    }


@given(
    inputs=st.integers(1, 5),
    new=st.integers(0, 7),
    stride=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_shortcut_a_is_a_slice_between_zeros(inputs: int, new: int, stride: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, inputs, *size) + 1
    y = ZeroPadShortcut(inputs, inputs + new, stride)(x)
    kept = x[:, :, ::stride, ::stride]
    before, behind = torch.zeros(2, new // 2, *kept.shape[2:]), torch.zeros(2, new - new // 2, *kept.shape[2:])
    assert torch.equal(y, torch.cat([before, kept, behind], dim=1))


@pytest.mark.parametrize(("kind", "last"), [("basic", "bn2"), ("bottleneck", "bn3")])
@pytest.mark.parametrize("attention", ["none", "se"])
@pytest.mark.parametrize("shortcut", ["A", "B", "none"])
def test_a_block_without_residual_is_its_shortcut(kind: str, last: str, attention: str, shortcut: str) -> None:
    """F(x) = 0 leaves ReLU(x): the identity path adds nothing of its own, and a plain block has none."""
    net = Architecture("", kind, (1,), (8,), "cifar", shortcut, 2, 8, 8, "", attention=attention)
    outputs = net.outputs(8)
    made = BLOCKS[kind](net, outputs, 8, 1).eval()
    nn.init.zeros_(made.get_submodule(last).weight)
    x = torch.randn(2, outputs, 5, 5)
    assert torch.equal(made(x), torch.zeros_like(x) if shortcut == "none" else x.relu())


def test_squeeze_and_excitation_is_the_papers_formula() -> None:
    """Hu et al. 2018, equations 2 to 4, image by image: x̃ = σ(W₂ δ(W₁ z)) x with z the means of the channels."""
    block = SqueezeExcitation(32).double()
    w1, w2 = block.fc1.weight.detach()[..., 0, 0].numpy(), block.fc2.weight.detach()[..., 0, 0].numpy()
    b1, b2 = (layer.bias.detach().numpy() for layer in (block.fc1, block.fc2))
    x = torch.randn(3, 32, 4, 7, dtype=torch.float64)
    for image, got in zip(x.numpy(), block(x).detach().numpy(), strict=True):
        hidden = np.maximum(w1 @ image.mean((1, 2)) + b1, 0)
        gate = 1 / (1 + np.exp(-(w2 @ hidden + b2)))
        np.testing.assert_allclose(got, image * gate[:, None, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "se_resnext50_32x4d", "resnet20_cifar", "plain20_cifar"])
def test_initial_weights_follow_fan_out(name: str) -> None:
    for module in models.create(name, seed=3).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_create_makes_an_eval_model_with_the_classes_asked_for() -> None:
    model = models.create("resnet8_cifar", num_classes=7)
    assert not any(module.training for module in model.modules())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert models.create("resnet8_cifar")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_seed_repeats_and_leaves_the_global_state() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second, other = (models.create("resnet8_cifar", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_without_a_seed_the_global_state_draws() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn += [models.create("resnet8_cifar").state_dict()["conv1.weight"] for _ in range(2)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_an_unknown_name_gets_close_ones() -> None:
    with pytest.raises(ModelError, match=r"'resnet5O'.*resnet50.*`edgeres models`"):
        models.create("resnet5O")
    with pytest.raises(ModelError, match=r"'xyz'\. `edgeres models`"):
        models.create("xyz")


@given(st.integers(max_value=0))
def test_fewer_classes_than_one_are_refused(num_classes: int) -> None:
    with pytest.raises(ModelError, match=f"at least one class, not {num_classes};"):
        models.create("resnet8_cifar", num_classes=num_classes)


def test_the_digits_network_reads_its_own_held_out_images() -> None:
    """What ships: the weights, the images and the recipe's preprocessing agree."""
    preprocessing = Preprocessing(size=(32, 32), resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = models.create("resnet8_cifar")
    models.load_weights(model, DIGITS / "weights.safetensors")
    paths = sorted((DIGITS / "validation").rglob("*.png"))
    calibration = {path.name for path in (DIGITS / "calibration").rglob("*.png")}
    assert (len(paths), len(calibration)) == (1000, 200)
    assert calibration.isdisjoint(path.name for path in paths)
    images = np.stack([prepare(np.asarray(Image.open(path).convert("RGB")), preprocessing) for path in paths])
    labels = torch.tensor([int(path.parent.name) for path in paths])
    with torch.inference_mode():
        correct = model(torch.from_numpy(images)).argmax(dim=1) == labels
    assert correct.float().mean() >= 0.985


BUILDERS = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes), nn.Dropout())

def headed(num_classes=4):
    return net(num_classes)

def fixed():
    return net(5)

def passing(**options):
    return net(options.get("num_classes", 6))

def positional(num_classes=3, /):
    return net(num_classes)

class Zoo:
    small = staticmethod(headed)

def failing():
    raise OSError("no weights here\\nand more")

def leaving():
    raise SystemExit(0)

def text():
    return "a net"

number = 3
"""


@pytest.fixture
def builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the name of a module in the current directory, and forget all modules imported meanwhile."""
    (tmp_path / "our_nets").mkdir()
    sources = {
        "our_nets/builders.py": BUILDERS,
        "our_nets/broken.py": "1 / 0",
        "our_nets/script.py": "raise SystemExit(0)",
        "our_nets/hungry.py": "import a_package_that_nobody_has",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(textwrap.dedent(source))
    monkeypatch.chdir(tmp_path)
    before: dict[str, types.ModuleType] = dict(sys.modules)
    yield "our_nets.builders"
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("attribute", "num_classes", "outputs"),
    [
        ("headed", None, 4),
        ("headed", 9, 9),
        ("fixed", 9, 5),
        ("passing", None, 6),
        ("passing", 9, 9),
        ("positional", 9, 3),
        ("Zoo.small", 9, 9),
    ],
)
def test_a_callable_gives_a_model(builders: str, attribute: str, num_classes: int | None, outputs: int) -> None:
    path = list(sys.path)
    model = models.from_callable(f"{builders}:{attribute}", num_classes)
    assert not any(module.training for module in model.modules())
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, outputs)
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("our_nets.builders", "package.module:callable"),
        (":headed", "package.module:callable"),
        ("our_nets.builders:", "package.module:callable"),
        ("our_nets.absent:net", "there is no module our_nets.absent .*install it, or run from the folder"),
        ("absent_package.nets:net", "there is no module absent_package .*run from the folder"),
        ("our_nets.hungry:net", "a_package_that_nobody_has.*install what it needs"),
        ("our_nets.broken:net", "ZeroDivisionError.*mend that module"),
        ("our_nets.script:net", "SystemExit.*mend that module"),
        ("our_nets.builders:haeded", "no haeded; did you mean headed"),
        ("our_nets.builders:qqq", "no qqq; name a function"),
        ("our_nets.builders:number", "is a int, not a callable"),
        ("our_nets.builders:failing", r"raised OSError: no weights here when called as failing\(\)"),
        ("our_nets.builders:leaving", "raised SystemExit"),
        ("our_nets.builders:net", "raised TypeError.*defaults for its parameters"),
        ("our_nets.builders:text", "returned an object of type str; let it return a torch.nn.Module"),
    ],
)
def test_a_callable_that_gives_no_model_is_explained(builders: str, spec: str, words: str) -> None:
    path = list(sys.path)
    with pytest.raises(ModelError, match=words) as caught:
        models.from_callable(spec)
    assert "\n" not in str(caught.value)
    assert sys.path == path


def test_a_callable_is_not_asked_for_no_classes(builders: str) -> None:
    with pytest.raises(ModelError, match="at least one class, not 0"):
        models.from_callable(f"{builders}:headed", 0)
    assert builders not in sys.modules, f"nothing is imported from {os.getcwd()} for a request that cannot be met"


def misfit() -> nn.Module:
    """For ``package.module:callable``: parts that do not fit together, two of them."""
    return models.create(msgspec.structs.replace(ARCHITECTURES["resnet18"], shortcut="Z", stem="none"))


def test_what_an_architecture_says_of_itself_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(ModelError, match=r"2 problems") as caught:
        models.from_callable(f"{Path(__file__).stem}:misfit")
    assert "shortcut" in str(caught.value)
    assert "make it callable so" not in str(caught.value)
