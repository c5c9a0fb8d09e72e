"""State dicts as torchvision, timm and akamaster save them: they load unchanged, and mean what they mean there.

None of them is needed. How each lays its tensors out, and what it computes from them, is written down here in its
own terms (planes, base width, groups), without the code under test.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeres import models
from edgeres.architectures import ARCHITECTURES
from edgeres.errors import CheckpointError


class Published(NamedTuple):
    """A net in the words of ``torchvision.models.resnet.ResNet`` and ``timm.models.resnet.ResNet``."""

    layers: tuple[int, ...]
    bottleneck: bool = True
    groups: int = 1
    base_width: int = 64
    se: bool = False
    first: bool = False  # the stride on the 1x1, as in the papers and in Caffe's files
    plain: bool = False


NETS = {
    "resnet18": Published((2, 2, 2, 2), bottleneck=False),
    "resnet34": Published((3, 4, 6, 3), bottleneck=False),
    "resnet50": Published((3, 4, 6, 3)),
    "resnet101": Published((3, 4, 23, 3)),
    "resnet152": Published((3, 8, 36, 3)),
    "resnext50_32x4d": Published((3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": Published((3, 4, 23, 3), groups=32, base_width=8),
    "wide_resnet50_2": Published((3, 4, 6, 3), base_width=128),
    "se_resnet50": Published((3, 4, 6, 3), se=True),
    "se_resnext50_32x4d": Published((3, 4, 6, 3), groups=32, base_width=4, se=True),
    "resnet50_v1": Published((3, 4, 6, 3), first=True),
    "plain34": Published((3, 4, 6, 3), bottleneck=False, plain=True),
}

CIFAR = {"resnet20_cifar": 3, "resnet110_cifar": 18, "plain20_cifar": 3}

Shapes = dict[str, tuple[int, ...]]


def norm(name: str, channels: int) -> Shapes:
    shapes: Shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def imagenet_layout(net: Published) -> Shapes:
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    inplanes, expansion = 64, 4 if net.bottleneck else 1
    for stage, blocks in enumerate(net.layers):
        planes = 64 * 2**stage
        width, outplanes = planes * net.base_width // 64 * net.groups, planes * expansion
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            convs = [(planes, inplanes, 3), (planes, planes, 3)]
            if net.bottleneck:
                convs = [(width, inplanes, 1), (width, width // net.groups, 3), (outplanes, width, 1)]
            for i, (outputs, inputs, k) in enumerate(convs, start=1):
                shapes |= {f"{at}.conv{i}.weight": (outputs, inputs, k, k), **norm(f"{at}.bn{i}", outputs)}
            if net.se:
                reduced = outplanes // 16
                shapes |= {f"{at}.se.fc1.weight": (reduced, outplanes, 1, 1), f"{at}.se.fc1.bias": (reduced,)}
                shapes |= {f"{at}.se.fc2.weight": (outplanes, reduced, 1, 1), f"{at}.se.fc2.bias": (outplanes,)}
            if not net.plain and block == 0 and (stage > 0 or inplanes != outplanes):
                shapes |= {f"{at}.downsample.0.weight": (outplanes, inplanes, 1, 1)}
                shapes |= norm(f"{at}.downsample.1", outplanes)
            inplanes = outplanes
    return {**shapes, "fc.weight": (1000, inplanes), "fc.bias": (1000,)}


def cifar_layout(n: int) -> Shapes:
    """Return akamaster's layout, whose classifier is called ``linear``."""
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3), **norm("bn1", 16)}
    inputs = 16
    for stage in range(3):
        for block in range(n):
            at, planes = f"layer{stage + 1}.{block}", 16 * 2**stage
            shapes |= {f"{at}.conv1.weight": (planes, inputs, 3, 3), **norm(f"{at}.bn1", planes)}
            shapes |= {f"{at}.conv2.weight": (planes, planes, 3, 3), **norm(f"{at}.bn2", planes)}
            inputs = planes
    return {**shapes, "linear.weight": (10, 64), "linear.bias": (10,)}


def layout(name: str) -> Shapes:
    return cifar_layout(CIFAR[name]) if name in CIFAR else imagenet_layout(NETS[name])


def trained(shapes: Shapes) -> dict[str, Tensor]:
    """Return a state dict of these shapes, its values like those after training: no mean is 0 and no variance 1."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values = torch.rand(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1:
            state[name] = (values - 0.5) * (12 * 2 / values[0].numel()) ** 0.5
        else:
            state[name] = values + 0.5 if name.endswith(("running_var", "weight")) else values - 0.5
    return state


class Reading:
    """What a state dict computes, by functions alone."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def normed(self, x: Tensor, conv: str, bn: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight, s = self.state[f"{conv}.weight"], self.state
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        shift, scale = s[f"{bn}.running_mean"], s[f"{bn}.weight"] / torch.sqrt(s[f"{bn}.running_var"] + 1e-5)
        return (x - shift[:, None, None]) * scale[:, None, None] + s[f"{bn}.bias"][:, None, None]

    def gated(self, x: Tensor, at: str) -> Tensor:
        z = x.mean((2, 3), keepdim=True)
        z = F.conv2d(z, self.state[f"{at}.fc1.weight"], self.state[f"{at}.fc1.bias"]).relu()
        return x * F.conv2d(z, self.state[f"{at}.fc2.weight"], self.state[f"{at}.fc2.bias"]).sigmoid()

    def imagenet(self, x: Tensor, net: Published) -> Tensor:
        x = F.max_pool2d(self.normed(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
        for stage, blocks in enumerate(net.layers, start=1):
            for block in range(blocks):
                at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                strides = (stride, 1, 1) if net.first or not net.bottleneck else (1, stride, 1)
                y = self.normed(x, f"{at}.conv1", f"{at}.bn1", strides[0]).relu()
                y = self.normed(y, f"{at}.conv2", f"{at}.bn2", strides[1], net.groups)
                if net.bottleneck:
                    y = self.normed(y.relu(), f"{at}.conv3", f"{at}.bn3")
                y = self.gated(y, f"{at}.se") if net.se else y
                if f"{at}.downsample.0.weight" in self.state:
                    x = self.normed(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
                x = (y if net.plain else y + x).relu()
        return F.linear(x.mean((2, 3)), self.state["fc.weight"], self.state["fc.bias"])

    def cifar(self, x: Tensor, n: int, plain: bool) -> Tensor:
        x = self.normed(x, "conv1", "bn1").relu()
        for stage in range(1, 4):
            for block in range(n):
                at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = self.normed(x, f"{at}.conv1", f"{at}.bn1", stride).relu()
                y = self.normed(y, f"{at}.conv2", f"{at}.bn2")
                more = (y.shape[1] - x.shape[1]) // 2
                around = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more, more))
                x = (y if plain else y + around).relu()
        return F.linear(x.mean((2, 3)), self.state["linear.weight"], self.state["linear.bias"])


@pytest.mark.parametrize("name", [*NETS, *CIFAR])
def test_names_and_shapes_are_the_publishers_in_their_order(name: str) -> None:
    with torch.device("meta"):
        state = models.create(name).state_dict()
    wanted = {key.replace("linear.", "fc."): shape for key, shape in layout(name).items()}
    assert [(key, tuple(tensor.shape)) for key, tensor in state.items()] == list(wanted.items())


@pytest.mark.parametrize("name", [name for name in (*NETS, *CIFAR) if "101" not in name and "152" not in name])
def test_a_published_state_dict_means_what_it_means_there(name: str, tmp_path: Path) -> None:
    state = trained(layout(name))
    torch.save(state, tmp_path / "published.pth")
    model = models.create(name)
    models.load_weights(model, tmp_path / "published.pth")
    # In double precision a difference of meaning cannot be taken for rounding, which random weights amplify.
    x = torch.randn((2, 3, 32, 32) if name in CIFAR else (2, 3, 64, 80), generator=torch.Generator().manual_seed(2))
    x, reading = x.double(), Reading({name: tensor.double() for name, tensor in state.items()})
    with torch.inference_mode():
        got = model.double()(x)
        wanted = reading.cifar(x, CIFAR[name], "plain" in name) if name in CIFAR else reading.imagenet(x, NETS[name])
    assert float((got - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())
    assert float((got[0] - got[1]).abs().max()) > 1e-2 * float(wanted.abs().max()), "the answer depends on the image"


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        ("resnet34", "resnet18", "; it fits --model resnet34: "),
        ("se_resnet50", "resnet50", "; it fits --model se_resnet50: "),
        ("resnext50_32x4d", "resnet50", "; it fits --model resnext50_32x4d: "),
        ("plain34", "resnet34", "; it fits --model plain34: "),
        # Names and shapes cannot tell these apart.
        ("resnet50", "resnet101", "; it fits --model resnet50 or resnet50_v1: "),
        ("resnet20_cifar", "resnet18", "; it fits --model resnet20_cifar or plain20_cifar: "),
    ],
)
def test_weights_of_another_member_are_recognized(file: str, model: str, words: str, tmp_path: Path) -> None:
    weights = {f"module.{name}": torch.zeros(shape) for name, shape in layout(file).items()}
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    with torch.device("meta"):
        wrong = models.create(model)
    with pytest.raises(CheckpointError) as caught:
        models.load_weights(wrong, tmp_path / "w.pth")
    assert f"{tmp_path / 'w.pth'} does not fit the model{words}" in str(caught.value)


def test_weights_for_other_classes_are_recognized(tmp_path: Path) -> None:
    shapes = layout("resnet18") | {"fc.weight": (7, 512), "fc.bias": (7,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="it fits --model resnet18 --num-classes 7: 2 problems"):
        models.load_weights(models.create("resnet18"), tmp_path / "w.pth")


def test_nothing_is_recognized_where_nothing_fits(tmp_path: Path) -> None:
    shapes = layout("resnet18")
    shapes["layer3.1.conv2.weight"] = (256, 128, 3, 3)
    damaged = {name: torch.full(shape, torch.nan) for name, shape in layout("resnet18").items()}
    for content in ({name: torch.zeros(shape) for name, shape in shapes.items()}, damaged):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError) as caught:
            models.load_weights(models.create("resnet18"), tmp_path / "w.pth")
        assert "it fits" not in str(caught.value)


def test_every_name_of_the_contract_is_there() -> None:
    assert {*NETS, *CIFAR} <= ARCHITECTURES.keys()
