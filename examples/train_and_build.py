#!/usr/bin/env python3
"""A training script of one's own that ends with a bundle: train, build, judge; exit code 1 where INT8 loses too much.

    python examples/train_and_build.py        # needs edgeres[host]; the data is the digits that come with edgeres

The network is a plain ``nn.Module``, and edgeres is told how to make it: by this file's name and the function's.
"""

import sys
from pathlib import Path
from typing import Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import edgeres
from edgeres.recipe import dossier
from edgeres.samples import open_samples

SIZE, EPOCHS = 8, 15


class Block(nn.Module):
    """Two convolutions with batch norm, and a skip around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return found


def net(num_classes: int = 10) -> nn.Module:
    """Return the network, with fresh weights."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32),
        Block(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def images(folder: Path) -> Tuple[np.ndarray, np.ndarray]:
    """Return a folder's frames, uint8 (N, H, W, 3), and labels, int64 (N,)."""
    samples = open_samples(folder, labelled=True)
    return np.stack([samples.frame(i) for i in range(len(samples))]), np.asarray(samples.labels)


def inputs(frames: np.ndarray) -> Tensor:
    """Return frames as the network takes them, float32 (N, 3, H, W): what ``mean`` and ``std`` below say, too."""
    return (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def train(module: nn.Module, frames: np.ndarray, labels: np.ndarray) -> None:
    pixels, wanted = inputs(frames), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * -(-len(pixels) // 64))
    module.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(pixels)).split(64):
            optimizer.zero_grad()
            cross_entropy(module(pixels[batch]), wanted[batch]).backward()
            optimizer.step()
            schedule.step()


def main() -> int:
    torch.manual_seed(0)
    frames, labels = images(dossier() / "digits/validation")
    order = np.random.RandomState(0).permutation(len(frames))
    training, held_out = order[:600], order[600:]

    module = net()
    train(module, frames[training], labels[training])

    # What edgeres is given: weights, how to make the network, and images as they came, before any preprocessing.
    work = Path("build/own")
    work.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), work / "net.pth")
    np.save(work / "calibration.npy", frames[training])
    np.savez(work / "validation.npz", images=frames[held_out], labels=labels[held_out])

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    bundle = edgeres.build(
        model="train_and_build:net",
        weights=work / "net.pth",
        input_size=(SIZE, SIZE),
        resize=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        calibration=work / "calibration.npy",
        validation=work / "validation.npz",
        max_drop=2.0,
        out="build/own-int8",
    )
    report = bundle.report
    assert report is not None
    print(f"{bundle.path}: {report.verdict}, INT8 {report.top1_engine:.1%}, FP32 {report.top1_reference:.1%}")
    return 1 if report.verdict == "fail" else 0


if __name__ == "__main__":
    sys.exit(main())
