"""What the nets of the family are built of: convolutions, shortcuts, attention, and the two kinds of block.

Parameters carry torchvision's names (``conv1.weight``, ``downsample.1.bias``), and timm's where torchvision has no such
part (``se.fc1.weight``). Every layer, each ReLU included, is a module of its own: ONNX nodes are named after them.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385); Xie, Girshick,
Dollár, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks", 2017 (arXiv:1611.05431); Hu, Shen,
Albanie, Sun, Wu, "Squeeze-and-Excitation Networks", 2018 (arXiv:1709.01507).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from edgeres.architectures import Architecture, squeezed


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the image's size at stride 1; no bias, for a batch norm follows.

    Source: He et al. 2015, section 3.4 (batch normalization right after each convolution).
    """
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


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


def shortcut(net: Architecture, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """Return the path around a block, by the net's option; None in a plain net, which has none.

    Where neither the size nor the number of channels changes it is the identity, which costs nothing and hands a
    gradient back as it is; option C has a projection there, too. A projection is a 1×1 convolution and a batch norm,
    whose names end in ``downsample.0`` and ``downsample.1``.

    Source: He et al. 2015, section 3.2, equations 1 and 2; section 3.3, options A and B; section 4.1, "Identity vs.
    Projection Shortcuts", option C.
    """
    if net.shortcut == "none":
        return None
    if net.projects(inputs, outputs, stride):
        return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return ZeroPadShortcut(inputs, outputs, stride)


class SqueezeExcitation(nn.Module):
    """Attention to channels: each is multiplied by a number between 0 and 1 that depends on the whole image.

    *Squeeze*: the mean of each channel, z. *Excitation*: s = σ(W₂ ReLU(W₁ z)), through C/16 channels. The two layers
    are 1×1 convolutions with biases, as timm has them.

    Source: Hu et al. 2018, section 3.1, equation 2; section 3.2, equations 3 and 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed(channels), 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed(channels), channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) with each channel of each image scaled."""
        y: Tensor = x * self.gate(self.fc2(self.relu(self.fc1(self.squeeze(x)))))
        return y


def attention(net: Architecture, channels: int) -> nn.Module:
    """Return what weighs the channels at the end of a block's residual, before the addition.

    Source: Hu et al. 2018, section 3.3 and Figure 3: both squeeze and excitation act before the summation.
    """
    return SqueezeExcitation(channels) if net.attention == "se" else nn.Identity()


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them.

    Source: He et al. 2015, Figure 2 and Figure 5 (left); without the shortcut, Figure 3 (middle).
    """

    def __init__(self, net: Architecture, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = attention(net, width)
        self.downsample = shortcut(net, inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(F(x) + x): (N, inputs, H, W) becomes (N, width, ⌈H / stride⌉, ⌈W / stride⌉)."""
        y: Tensor = self.relu1(self.bn1(self.conv1(x)))
        y = self.se(self.bn2(self.conv2(y)))
        if self.downsample is not None:
            y = y + self.downsample(x)
        y = self.relu2(y)
        return y


class Bottleneck(nn.Module):
    """A 1×1 convolution that narrows, a 3×3 in groups, a 1×1 that widens to 4 × ``width``, and a shortcut around them.

    With a cardinality of C the 3×3 is C convolutions of a few channels each, side by side: ResNeXt's aggregated
    transformations. With one group that is twice as wide it is a wide ResNet's.

    Source: He et al. 2015, Figure 5 (right); Xie et al. 2017, section 3.3 and Figure 3 (c).
    """

    def __init__(self, net: Architecture, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        inner, outputs = net.inner(width), net.outputs(width)
        first, second = (stride, 1) if net.stride == "1x1" else (1, stride)
        self.conv1 = conv(inputs, inner, 1, first)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(inner, inner, 3, second, net.cardinality)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.se = attention(net, outputs)
        self.downsample = shortcut(net, inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(F(x) + x): (N, inputs, H, W) becomes (N, 4 × width, ⌈H / stride⌉, ⌈W / stride⌉)."""
        y: Tensor = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.se(self.bn3(self.conv3(y)))
        if self.downsample is not None:
            y = y + self.downsample(x)
        y = self.relu3(y)
        return y


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
