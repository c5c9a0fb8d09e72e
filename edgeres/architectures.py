"""The architectures that edgeres knows by name: what differs between them, as data. Nothing here needs torch.

A member is put together of parts: a block, how many of them in how many stages, a stem, a shortcut around each block
(or none), groups of channels, and attention to channels.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385): Table 1 for the
ImageNet nets, section 4.2 for the CIFAR nets. Xie, Girshick, Dollár, Tu, He, "Aggregated Residual Transformations for
Deep Neural Networks", 2017 (arXiv:1611.05431): Table 1 for ResNeXt. Zagoruyko, Komodakis, "Wide Residual Networks",
2016 (arXiv:1605.07146): section 2.3 and Table 8. Hu, Shen, Albanie, Sun, Wu, "Squeeze-and-Excitation Networks", 2018
(arXiv:1709.01507): section 3.3 and Table 1.
"""

from __future__ import annotations

from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import msgspec

from edgeres.errors import ModelError, numbered

EXPANSION = {"basic": 1, "bottleneck": 4}
"""How much wider a block's output is than its stage (He et al. 2015, Figure 5)."""

PARTS = {
    "block": tuple(EXPANSION),
    "stem": ("imagenet", "cifar"),
    "shortcut": ("A", "B", "C", "none"),
    "stride": ("3x3", "1x1"),
    "attention": ("none", "se"),
}

REDUCTION = 16
"""r of Hu et al. 2018, section 3.2; chosen in section 6.1."""


class Architecture(msgspec.Struct, frozen=True):
    """A member of the family.

    Attributes:
        block: ``basic`` (two 3×3 convolutions) or ``bottleneck`` (1×1, 3×3, 1×1, four times as wide at its end).
        depths: blocks per stage.
        widths: channels per stage, of the 3×3 convolutions where nothing is grouped or widened.
        stem: ``imagenet`` (7×7/2 and a 3×3/2 max pool) or ``cifar`` (3×3).
        shortcut: what goes around a block. ``A``: the identity, and zero channels where they become more. ``B``: the
            identity, and a 1×1 convolution where the shape changes. ``C``: a 1×1 convolution everywhere. ``none``:
            nothing, which makes the net a plain one.
        size: height and width of the input, in pixels; ``resize`` is the short side before the crop, in pixels.
        cardinality: groups of a bottleneck's 3×3 convolution; C of Xie et al. 2017.
        group_width: channels of each group in the first stage, d of Xie et al. 2017; they grow as ``widths`` do. None:
            the 3×3 convolution is as wide as its stage.
        stride: the convolution of a bottleneck that halves the image: ``1x1``, the first, as in the paper, or ``3x3``,
            as in torchvision's and timm's nets and NVIDIA's "ResNet V1.5". A basic block has only 3×3.
        attention: ``se`` for squeeze-and-excitation at the end of each block, else ``none``.

    Raises:
        ModelError: parts that do not exist or do not fit together, all of them named.
    """

    name: str
    block: str
    depths: Tuple[int, ...]
    widths: Tuple[int, ...]
    stem: str
    shortcut: str
    num_classes: int
    size: int
    resize: int
    source: str
    cardinality: int = 1
    group_width: Optional[int] = None
    stride: str = "3x3"
    attention: str = "none"

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ModelError(numbered(f"architecture {self.name}", problems))

    def inner(self, width: int) -> int:
        """Return the channels of the 3×3 convolutions in a stage of this width.

        Source: Xie et al. 2017, Table 1 and Figure 3 (c): cardinality × group width, doubled with each stage.
        """
        if self.group_width is None:
            return width
        return self.cardinality * self.group_width * width // self.widths[0]

    def outputs(self, width: int) -> int:
        """Return the channels that the blocks of a stage of this width end with."""
        return width * EXPANSION[self.block]

    def projects(self, inputs: int, outputs: int, stride: int) -> bool:
        """Return whether the shortcut of a block is a 1×1 convolution.

        Source: He et al. 2015, section 3.3 (A and B) and section 4.1 (C).
        """
        changes = stride != 1 or inputs != outputs
        return self.shortcut == "C" or (self.shortcut == "B" and changes)


def squeezed(channels: int) -> int:
    """Return the width between the two layers of a squeeze-and-excitation gate: C/r, as a multiple of eight.

    Rounding is timm's, and changes no published net: there C/16 is a multiple of eight already.

    Source: Hu et al. 2018, section 3.2.
    """
    return max(8, (channels // REDUCTION + 4) // 8 * 8)


class Layer(NamedTuple):
    """A layer that has weights.

    ``shape`` is that of the weights, the output channels first; ``pixels`` counts those of its output, each of which
    takes every weight once; ``norm`` names the batch norm behind it, whose place a bias takes where there is none.
    """

    name: str
    shape: Tuple[int, ...]
    pixels: int
    norm: str = ""


def layers(net: Architecture) -> Iterator[Layer]:
    """Yield the layers of a net in the order and by the names of its state dict, for square images of its own size.

    This is what ``edgeres.models`` builds, told without building it: sizes and names for those who have no torch, or no
    time. Names are torchvision's, ``se.fc1`` and ``se.fc2`` timm's.
    """
    channels, kernel, side = net.widths[0], 3, net.size
    if net.stem == "imagenet":
        kernel, side = 7, -(-side // 2)
    yield Layer("conv1", (channels, 3, kernel, kernel), side**2, "bn1")
    if net.stem == "imagenet":
        side = -(-side // 2)
    for stage, (depth, width) in enumerate(zip(net.depths, net.widths), start=1):
        for number in range(depth):
            stride = 2 if stage > 1 and number == 0 else 1
            for layer in _block(net, channels, width, (side, stride)):
                norm = f"layer{stage}.{number}.{layer.norm}" if layer.norm else ""
                yield layer._replace(name=f"layer{stage}.{number}.{layer.name}", norm=norm)
            channels, side = net.outputs(width), -(-side // stride)
    yield Layer("fc", (net.num_classes, channels), 1)


def _block(net: Architecture, inputs: int, width: int, size: Tuple[int, int]) -> Iterator[Layer]:
    """Yield the layers of one block; ``size`` is the side of its input, in pixels, and its stride."""
    side, stride = size
    before, after = side**2, (-(-side // stride)) ** 2
    inner, outputs, between = net.inner(width), net.outputs(width), squeezed(net.outputs(width))
    if net.block == "basic":
        yield Layer("conv1", (width, inputs, 3, 3), after, "bn1")
        yield Layer("conv2", (width, width, 3, 3), after, "bn2")
    else:
        yield Layer("conv1", (inner, inputs, 1, 1), after if net.stride == "1x1" else before, "bn1")
        yield Layer("conv2", (inner, inner // net.cardinality, 3, 3), after, "bn2")
        yield Layer("conv3", (outputs, inner, 1, 1), after, "bn3")
    if net.attention == "se":
        yield Layer("se.fc1", (between, outputs, 1, 1), 1)
        yield Layer("se.fc2", (outputs, between, 1, 1), 1)
    if net.projects(inputs, outputs, stride):
        yield Layer("downsample.0", (outputs, inputs, 1, 1), after, "downsample.1")


def _problems(net: Architecture) -> List[str]:
    """Return what is wrong with a description."""
    problems = [
        f"{field}: {getattr(net, field)!r} is none of {', '.join(known)}"
        for field, known in PARTS.items()
        if getattr(net, field) not in known
    ]
    if not net.depths or len(net.depths) != len(net.widths):
        problems.append(f"depths and widths: one of each per stage is needed, not {net.depths} and {net.widths}")
    groups = (net.cardinality, 1 if net.group_width is None else net.group_width)
    counts = (*net.depths, *net.widths, net.num_classes, net.size, *groups)
    if any(count < 1 for count in counts):
        problems.append("depths, widths, num_classes, size, cardinality and group_width are at least 1")
    if problems:
        return problems  # what follows reckons with them
    if net.block == "basic" and (net.cardinality, net.group_width, net.stride) != (1, None, "3x3"):
        problems.append(
            "block: a basic one has neither groups nor a 1×1 convolution; take bottleneck "
            "(Xie et al. 2017, section 3.3: a block of depth 2 is only a wider one)"
        )
    if net.group_width is not None and any(net.group_width * width % net.widths[0] for width in net.widths):
        problems.append(f"group_width: {net.group_width} does not grow by whole channels with the widths {net.widths}")
    if net.group_width is None and any(width % net.cardinality for width in net.widths):
        problems.append(f"cardinality: {net.cardinality} does not divide the widths {net.widths}")
    if net.shortcut == "A" and list(net.widths) != sorted(net.widths):
        problems.append(f"shortcut: A can add channels and not remove any, but the widths are {net.widths}")
    return problems


DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PLAIN = "He et al. 2015, section 3.3"
XIE = "Xie et al. 2017, Table 1"
HU = "Hu et al. 2018, Table 1"


def _imagenet(name: str, layers: int, source: str = "He et al. 2015, Table 1") -> Architecture:
    """Return the ImageNet net of so many layers, with option B."""
    block = "basic" if layers < 50 else "bottleneck"
    return Architecture(name, block, DEPTHS[layers], (64, 128, 256, 512), "imagenet", "B", 1000, 224, 256, source)


def _cifar(kind: str, n: int, shortcut: str) -> Architecture:
    """Return the CIFAR net of 6n + 2 layers."""
    name, source = f"{kind}{6 * n + 2}_cifar", "He et al. 2015, section 4.2"
    return Architecture(name, "basic", (n, n, n), (16, 32, 64), "cifar", shortcut, 10, 32, 32, source)


_with = msgspec.structs.replace

ARCHITECTURES: Dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        *(_imagenet(f"resnet{layers}", layers) for layers in DEPTHS),
        *(_with(_imagenet(f"resnet{layers}_v1", layers), stride="1x1") for layers in (50, 101, 152)),
        *(_with(_imagenet(f"plain{layers}", layers, PLAIN), shortcut="none") for layers in (18, 34)),
        _with(_imagenet("resnext50_32x4d", 50, XIE), cardinality=32, group_width=4),
        _with(_imagenet("resnext101_32x8d", 101, "Xie et al. 2017; as in torchvision"), cardinality=32, group_width=8),
        _with(_imagenet("wide_resnet50_2", 50, "Zagoruyko and Komodakis 2016, Table 8"), group_width=128),
        _with(_imagenet("se_resnet50", 50, HU), attention="se"),
        _with(_imagenet("se_resnext50_32x4d", 50, HU), cardinality=32, group_width=4, attention="se"),
        *(_cifar("resnet", n, "A") for n in (1, 3, 5, 7, 9, 18)),
        *(_cifar("plain", n, "none") for n in (1, 3, 5, 7, 9, 18)),
    )
}
