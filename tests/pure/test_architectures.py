"""The family as data: sizes as published, told without torch, and descriptions that make no net."""

from __future__ import annotations

from typing import Any, Dict, List

import msgspec
import pytest

from edgeres.architectures import ARCHITECTURES, Architecture, squeezed
from edgeres.catalog import catalog, count
from edgeres.errors import ModelError

# Parameters and multiply-accumulates of torchvision's documentation.
PUBLISHED = {
    "resnet18": (11_689_512, "1.814"),
    "resnet34": (21_797_672, "3.664"),
    "resnet50": (25_557_032, "4.089"),
    "resnet101": (44_549_160, "7.801"),
    "resnet152": (60_192_808, "11.514"),
    "resnext50_32x4d": (25_028_904, "4.230"),
    "resnext101_32x8d": (88_791_336, "16.414"),
    "wide_resnet50_2": (68_883_240, "11.398"),
}


def test_the_catalog_lists_every_name_with_its_published_size() -> None:
    entries = {entry["name"]: entry for entry in catalog()}
    assert list(entries) == list(ARCHITECTURES)
    for name, (parameters, macs) in PUBLISHED.items():
        assert entries[name]["parameters"] == parameters
        assert f"{entries[name]['macs'] / 1e9:.3f}" == macs
        assert (entries[name]["size"], entries[name]["classes"]) == (224, 1000)


def test_gates_cost_what_their_paper_says() -> None:
    """Hu et al. 2018, section 4: 2/r times the sum over blocks of their channels' squares, "2.5 million" (equation 5).

    The papers' strides are V1's: 3.86 GFLOPs without gates, and 0.26 % more with them.
    """
    blocks = [(3, 256), (4, 512), (6, 1024), (3, 2048)]
    gates = sum(2 * number * channels**2 // 16 for number, channels in blocks)
    biases = sum(number * (channels + channels // 16) for number, channels in blocks)
    assert f"{gates / 1e6:.1f}" == "2.5"
    for name, without in (("se_resnet50", "resnet50"), ("se_resnext50_32x4d", "resnext50_32x4d")):
        assert count(ARCHITECTURES[name])[0] - count(ARCHITECTURES[without])[0] == gates + biases
    assert f"{count(ARCHITECTURES['resnet50_v1'])[1] / 1e9:.2f}" == "3.86"


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_a_plain_net_is_as_large_as_the_residual_one(depth: int) -> None:
    """He et al. 2015, section 4.2: option A's shortcuts have no parameters and multiply nothing."""
    assert count(ARCHITECTURES[f"plain{depth}_cifar"]) == count(ARCHITECTURES[f"resnet{depth}_cifar"])


def test_an_imagenet_net_without_its_projections_is_plain() -> None:
    """What option B adds to 18 and 34 layers: three 1×1 convolutions with their batch norms."""
    projections = sum(inputs * 2 * inputs + 2 * 2 * inputs for inputs in (64, 128, 256))
    for depth in (18, 34):
        residual, plain = count(ARCHITECTURES[f"resnet{depth}"])[0], count(ARCHITECTURES[f"plain{depth}"])[0]
        assert residual - plain == projections


@pytest.mark.parametrize(
    ("channels", "width"), [(256, 16), (512, 32), (1024, 64), (2048, 128), (16, 8), (192, 16), (320, 24)]
)
def test_a_gates_width_is_a_sixteenth_in_eights(channels: int, width: int) -> None:
    assert squeezed(channels) == width


FLAWS: List[Any] = [
    ({"block": "dense", "shortcut": "D", "stem": "vgg"}, ["'dense'", "'D'", "'vgg'", "3 problems"]),
    ({"attention": "eca"}, ["attention: 'eca' is none of none, se"]),
    ({"stride": "7x7"}, ["stride: '7x7'"]),
    ({"depths": (1, 2)}, ["one of each per stage"]),
    ({"depths": (), "widths": ()}, ["one of each per stage"]),
    ({"depths": (3, 0, 6, 3)}, ["at least 1"]),
    ({"size": 0}, ["at least 1"]),
    ({"group_width": 0}, ["at least 1"]),
    ({"cardinality": 24}, ["24 does not divide the widths"]),
    ({"widths": (64, 100, 120, 130), "group_width": 3}, ["does not grow by whole channels"]),
    ({"widths": (64, 32, 16, 8), "shortcut": "A"}, ["A can add channels"]),
    ({"block": "basic", "cardinality": 32}, ["block: a basic one has neither groups"]),
    ({"block": "basic", "stride": "1x1"}, ["nor a 1×1 convolution"]),
]


@pytest.mark.parametrize(("changes", "words"), FLAWS)
def test_parts_that_do_not_fit_are_named_all_at_once(changes: Dict[str, Any], words: List[str]) -> None:
    with pytest.raises(ModelError, match="architecture resnet50") as caught:
        Architecture(**{**msgspec.structs.asdict(ARCHITECTURES["resnet50"]), **changes})
    assert all(word in str(caught.value) for word in words)
