"""The residual nets of He, Zhang, Ren and Sun, built from :class:`edgeres.architectures.Architecture` records.

Parameters carry torchvision's names (``layer1.0.conv1.weight``, ``layer2.0.downsample.1.bias``, ``fc.weight``), so that
published checkpoints load. Every layer, each ReLU included, is a module of its own: ONNX nodes are named after them.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeres.architectures import Architecture


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the image's size at stride 1; no bias, for a batch norm follows.

    Source: He et al. 2015, section 3.4 (batch normalization right after each convolution).
    """
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class ZeroPadShortcut(nn.Module):
    """Shortcut A: every ``stride``-th pixel, between channels of zeros. It has no parameters.

    Half of the new channels stand in front and half behind (the odd one behind), as the published CIFAR-10 checkpoints
    expect; the paper leaves their place open.

    Source: He et al. 2015, section 3.3, option A.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (outputs - inputs) // 2
        self.behind = outputs - inputs - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, inputs, H, W) as (N, outputs, ⌈H / stride⌉, ⌈W / stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.behind))


def shortcut(option: str, inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the path around a block: the identity where the shape stays, else ``option`` (``A`` or ``B``).

    Option B is a 1×1 convolution and a batch norm, whose names end in ``downsample.0`` and ``downsample.1``.

    Source: He et al. 2015, section 3.2, equations 1 and 2; section 3.3, options A and B.
    """
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if option == "A":
        return ZeroPadShortcut(inputs, outputs, stride)
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them.

    Source: He et al. 2015, Figure 2 and Figure 5 (left).
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(option, inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(F(x) + x): (N, inputs, H, W) becomes (N, width, ⌈H / stride⌉, ⌈W / stride⌉)."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        y: Tensor = self.relu2(residual + self.downsample(x))
        return y


class Bottleneck(nn.Module):
    """A 1×1 convolution that narrows, a 3×3, a 1×1 that widens to 4 × ``width``, and a shortcut around them.

    The stride is on the 3×3, as in torchvision's nets and NVIDIA's "ResNet V1.5"; the paper has it on the first 1×1.

    Source: He et al. 2015, Figure 5 (right).
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(option, inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(F(x) + x): (N, inputs, H, W) becomes (N, 4 × width, ⌈H / stride⌉, ⌈W / stride⌉)."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        y: Tensor = self.relu3(residual + self.downsample(x))
        return y


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """A residual net: a stem, stages of blocks that halve the image and double the channels, a linear classifier.

    Source: He et al. 2015, Figure 3 (right) and Table 1 for ImageNet; section 4.2 for CIFAR-10.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        channels = architecture.widths[0]
        imagenet = architecture.stem == "imagenet"
        self.conv1 = conv(3, channels, 7, stride=2) if imagenet else conv(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

        block = BLOCKS[architecture.block]
        self.stages: list[str] = []
        for number, (depth, width) in enumerate(zip(architecture.depths, architecture.widths, strict=True), start=1):
            # The stem has just halved the image, or the image is as small as CIFAR's: the first stage keeps its size.
            strides = [1 if number == 1 else 2] + [1] * (depth - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(block(channels, width, stride, architecture.shortcut))
                channels = width * block.expansion
            self.stages.append(f"layer{number}")
            self.add_module(self.stages[-1], stage)

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float32 (N, num_classes), for normalized images, float32 (N, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def initialize(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 2 / fan_out): a ReLU net then keeps its gradients' size through depth.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015 (arXiv:1502.01852), section 2.2, equation 14;
    named by the ResNet paper in section 3.4.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
