"""Train a net on handwritten digits; write its weights and images. Without options: make the embedded default.

Run from anywhere: ``python scripts/train_digits.py [--out calibration/digits] [--epochs 50]``. It needs scikit-learn
and takes a minute or two on two cores. The split and the images are the same everywhere; rounding differs between
processors, torch versions and numbers of threads, and training amplifies it: accuracy may differ by a few images.

Any other net goes elsewhere: ``python scripts/train_digits.py --model NAME --out FOLDER``, or ``--out
FILE.safetensors`` for the weights alone. ``NAME`` is a member of the family, which gets an output for each digit, or
``package.module:callable``, looked for in the current folder first. Large nets take hours on a CPU.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from edgeres import models
from edgeres.artifacts import Preprocessing
from edgeres.errors import ModelError
from edgeres.preprocess import prepare_batch

MODEL = "resnet8_cifar"
PREPROCESSING = Preprocessing(size=(32, 32), resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
VALIDATION = 1000
CALIBRATION = 200
DIGITS = 10
SEED = 0

COMMAND = "python scripts/train_digits.py"
EPOCHS = 50
BATCH = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
# Label smoothing keeps every image well away from a decision border, so that INT8's noise changes no prediction.
SMOOTHING = 0.1
# Weights are averaged over the last share of the epochs: a flatter minimum, which bears rounding better.
AVERAGED = 0.2
WANTED = 0.985

README = """# Handwritten digits: {title}

{what}: `{model}` on 1,797 handwritten digits.

| what | how much |
| --- | --- |
| `weights.safetensors` | float32 weights, names as torchvision's; top-1 {accuracy:.4f} on the validation images |
| `calibration/<class>/<index>.png` | {calibration} of the {train} training images; ranges are found on these |
| `validation/<class>/<index>.png` | {validation} images that training never saw; INT8 is judged on these |

Images are 8-bit greyscale PNG, 8 x 8 pixels: the source's values 0 to 16 times 255 / 16, rounded. `<class>` is the
digit and `<index>` the image's place in the source. The network sees them resized to 32 x 32, bilinear, as RGB / 255,
mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5).

**Split.** Seeded, and stratified by digit: {validation} images for validation, {train} for training, {calibration} of
the latter for calibration as well. The training's settings were chosen on another random split of the same images,
which overlaps this one: the top-1 above is slightly optimistic.

**Source.** E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository,
1998, <https://doi.org/10.24432/C50P49>, licence [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Taken from
scikit-learn's copy (`sklearn.datasets.load_digits`), which is that data set's test part. Changed: the values' scale and
the file format.

**Make it again.** `{command}`. The images come out the same; the weights differ a little
between processors, torch versions and numbers of threads.
"""


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of the training, calibration and validation images, int64, ascending."""
    everything = np.arange(len(labels))
    validation = stratified(everything, labels, VALIDATION)
    training = np.setdiff1d(everything, validation)
    return training, stratified(training, labels, CALIBRATION), validation


def stratified(indices: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` of the indices, ascending, each class in its share.

    Sorted by class and shuffled within, they are picked at equal distances. NumPy promises that RandomState's stream
    never changes, unlike a Generator's.
    """
    shuffled = np.random.RandomState(SEED).permutation(indices)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[np.arange(count) * len(indices) // count])


def inputs(images: np.ndarray) -> Tensor:
    """Return greyscale images, uint8 (N, 8, 8), as the network's input, float32 (N, 3, 32, 32)."""
    return torch.from_numpy(prepare_batch(np.repeat(images[..., None], 3, axis=-1), PREPROCESSING))


def augmented(batch: Tensor) -> Tensor:
    """Return the images turned by up to 15 degrees, scaled, sheared and shifted by about a tenth, and with noise."""

    def uniform(reach: float) -> Tensor:
        return (torch.rand(len(batch)) * 2 - 1) * reach

    angle = uniform(math.radians(15))
    cosine, sine = angle.cos(), angle.sin()
    wide, high = 1 + uniform(0.12), 1 + uniform(0.12)
    across = torch.stack([cosine * wide, uniform(0.15) - sine * high, uniform(0.2)], dim=1)
    down = torch.stack([sine * wide, cosine * high, uniform(0.2)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(batch.shape), align_corners=False)
    moved = F.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    return moved + torch.randn_like(moved) * torch.rand(len(batch), 1, 1, 1) * 0.1


def create(name: str) -> nn.Module:
    """Return a fresh net by its name or ``package.module:callable``, with an output for each digit."""
    make = models.from_callable if ":" in name else models.create
    return make(name, num_classes=DIGITS, seed=SEED)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Return the network trained, in eval mode; progress shows on stderr, where that is a terminal."""
    torch.manual_seed(SEED)
    model.train()
    averaged = AveragedModel(model)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    console = Console(stderr=True)
    for epoch in track(range(epochs), "training", console=console, disable=not console.is_terminal):
        for chosen in torch.randperm(len(images)).split(BATCH):
            logits = model(augmented(images[chosen]))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch >= min(epochs - 1, epochs * (1 - AVERAGED)):  # the last one, however few there are
            averaged.update_parameters(model)
    # The running means belong to the weights before they were averaged.
    batches = [augmented(images[chosen]) for _ in range(4) for chosen in torch.randperm(len(images)).split(BATCH * 4)]
    update_bn(batches, averaged)
    result: nn.Module = averaged.module
    return result.eval()


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is their label's."""
    with torch.inference_mode():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
    """Write the chosen images, uint8 (N, 8, 8), as ``<class>/<index>.png``, in place of what the folder held."""
    shutil.rmtree(folder, ignore_errors=True)
    for index in indices:
        path = folder / str(labels[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path, optimize=True)


def readme(name: str, epochs: int, accuracy: float, facts: Mapping[str, int]) -> str:
    """Return the text that goes with weights and images, for people."""
    title, what, command = "the embedded default", "What `edgeres build` builds when nothing else is named", COMMAND
    if name != MODEL:
        command = f"{COMMAND} --model {name} --epochs {epochs} --out FOLDER"
        title, what = name, f"Trained for {epochs} epochs"
    return README.format(title=title, what=what, command=command, model=name, accuracy=accuracy, **facts)


def main() -> None:
    """Train, judge, and write the folder, unless the network is too poor to ship."""
    parser = argparse.ArgumentParser(description="Train a net on the digits and write its weights and images.")
    parser.add_argument("--model", default=MODEL, help="name or package.module:callable (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a folder, or a .safetensors file for the weights alone")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--wanted", type=float, default=WANTED, help="top-1 below which nothing is written")
    options = parser.parse_args()
    if options.out is None and options.model != MODEL:
        parser.error("--model: say where to with --out; calibration/digits is the embedded default's")
    out = options.out or Path(__file__).resolve().parent.parent / "calibration" / "digits"

    try:
        model = create(options.model)
    except ModelError as problem:
        parser.error(f"--model: {problem}")

    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    labels = digits.target
    training, calibration, validation = split(labels)
    pixels, targets = inputs(images), torch.from_numpy(labels)

    trained = train(model, pixels[training], targets[training], options.epochs)
    accuracy = top1(trained, pixels[validation], targets[validation])
    print(f"held-out top-1 {accuracy:.4f} on {len(validation)} images (train {len(training)})")
    if accuracy < options.wanted:
        sys.exit(f"nothing was written: top-1 is below {options.wanted}; train for more --epochs")

    weights = save(trained.state_dict())
    if out.suffix == ".safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(weights)
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "weights.safetensors").write_bytes(weights)
        write_images(out / "calibration", images, labels, calibration)
        write_images(out / "validation", images, labels, validation)
        facts = {"calibration": len(calibration), "train": len(training), "validation": len(validation)}
        (out / "README.md").write_text(readme(options.model, options.epochs, accuracy, facts), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
