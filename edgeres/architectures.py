"""The architectures that edgeres knows by name: what differs between them, as data. Nothing here needs torch.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385): Table 1 for the
ImageNet nets, section 4.2 for the CIFAR nets (6n + 2 layers, option A shortcuts).
"""

from __future__ import annotations

from typing import Dict, Tuple

import msgspec


class Architecture(msgspec.Struct, frozen=True):
    """A member of the family.

    ``block`` is ``basic`` (two 3×3 convolutions) or ``bottleneck`` (1×1, 3×3, 1×1, four times as wide at its end);
    ``depths`` counts blocks per stage and ``widths`` gives the channels of each stage's 3×3 convolutions; ``stem`` is
    ``imagenet`` (7×7/2 and a 3×3/2 max pool) or ``cifar`` (3×3); ``shortcut`` is what happens where the shape changes:
    ``A`` pads with zero channels, ``B`` projects with a 1×1 convolution. ``size`` and ``resize`` are in pixels.
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


def _imagenet(name: str, block: str, depths: Tuple[int, ...]) -> Architecture:
    source = "He et al. 2015, Table 1"
    return Architecture(name, block, depths, (64, 128, 256, 512), "imagenet", "B", 1000, 224, 256, source)


def _cifar(n: int) -> Architecture:
    depth, source = 6 * n + 2, "He et al. 2015, section 4.2"
    return Architecture(f"resnet{depth}_cifar", "basic", (n, n, n), (16, 32, 64), "cifar", "A", 10, 32, 32, source)


ARCHITECTURES: Dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _imagenet("resnet18", "basic", (2, 2, 2, 2)),
        _imagenet("resnet34", "basic", (3, 4, 6, 3)),
        _imagenet("resnet50", "bottleneck", (3, 4, 6, 3)),
        _imagenet("resnet101", "bottleneck", (3, 4, 23, 3)),
        _imagenet("resnet152", "bottleneck", (3, 8, 36, 3)),
        *(_cifar(n) for n in (1, 3, 5, 7, 9, 18)),
    )
}
