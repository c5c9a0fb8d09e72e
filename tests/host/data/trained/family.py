"""A small net of each kind, trained: the weights lie beside this file, and README.md says how they were made.

Any tool that takes ``package.module:callable`` takes them from this folder: ``--model family:resnext``.
"""

from __future__ import annotations

from msgspec.structs import replace
from torch import nn

from edgeres import models
from edgeres.architectures import Architecture

SIZE = 32
BASIC = Architecture("plain", "basic", (2, 2, 2), (8, 16, 32), "cifar", "none", 10, SIZE, SIZE, "tests")
BOTTLENECK = Architecture("wide", "bottleneck", (1, 1, 1), (8, 16, 24), "imagenet", "B", 10, SIZE, SIZE, "tests")


def plain() -> nn.Module:
    """Return a plain net of 14 layers."""
    return models.create(BASIC)


def wide() -> nn.Module:
    """Return bottlenecks whose 3×3 convolutions are twice as wide; option B, which projects where the shape changes."""
    return models.create(replace(BOTTLENECK, group_width=16))


def projected() -> nn.Module:
    """Return bottlenecks of option C, which projects everywhere, with the stride in the 1×1 convolution."""
    return models.create(replace(BOTTLENECK, shortcut="C", stride="1x1"))


def resnext() -> nn.Module:
    """Return bottlenecks with 4 groups of 4, 8 and 12 channels."""
    return models.create(replace(BOTTLENECK, cardinality=4, group_width=4))


def se_resnet() -> nn.Module:
    """Return basic blocks of option B with gates."""
    return models.create(replace(BASIC, depths=(1, 1, 1), shortcut="B", attention="se"))


def se_resnext() -> nn.Module:
    """Return the ResNeXt with gates."""
    return models.create(replace(BOTTLENECK, cardinality=4, group_width=4, attention="se"))
