"""The nets of the family: plain, ResNet, ResNeXt, wide and with attention, from one description of what they are.

Parameters carry torchvision's names (``layer1.0.conv1.weight``, ``layer2.0.downsample.1.bias``, ``fc.weight``), so that
published checkpoints load. Every layer, each ReLU included, is a module of its own: ONNX nodes are named after them.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeres.architectures import Architecture
from edgeres.models.blocks import BLOCKS, conv


class ResNet(nn.Module):
    """A stem, stages of blocks that halve the image and double the channels, a linear classifier.

    Source: He et al. 2015, Figure 3 (right; the plain net in the middle) and Table 1 for ImageNet; section 4.2 for
    CIFAR-10. Xie et al. 2017, Table 1, and Hu et al. 2018, Table 1, keep this frame and change the blocks.
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
                stage.append(block(architecture, channels, width, stride))
                channels = architecture.outputs(width)
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
