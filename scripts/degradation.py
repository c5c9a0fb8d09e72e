#!/usr/bin/env python3
"""Why residuals: plain and residual nets of growing depth, trained on handwritten digits, and what can be seen of it.

For each depth, with batch norm as in the paper and without any, the script trains the net of He et al. 2015, section
4.2, and its plain counterpart, which differs in nothing but the shortcuts (option A, which has no parameters). It draws
the training error against epochs and against depth, and the gradient that reaches each layer, before training and after
it, as degradation.png and .svg; it prints a Markdown table:

    python scripts/degradation.py [--depths 8 20 32 56] [--epochs 24] [--seeds 0] [--norm batch none] [--out FOLDER]

It needs scikit-learn and matplotlib. The nets are narrow (8, 16 and 32 channels) and see the digits as they are, 8 × 8
pixels, so that all of them take some minutes on two cores. Seeds fix weights, order and augmentation; rounding differs
between processors, torch versions and numbers of threads, and training amplifies it.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385): Figures 1 and 6
(training error), section 4.1 (gradients), section 4.2 and Figure 7 (how little a residual layer changes).
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits import augmented, split

from edgeres import models
from edgeres.architectures import Architecture
from edgeres.artifacts import Preprocessing
from edgeres.models.blocks import BasicBlock
from edgeres.preprocess import prepare_batch

SIZE, WIDTHS = 8, (8, 16, 32)
PREPROCESSING = Preprocessing(size=(SIZE, SIZE), resize=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SHORTCUTS = {"plain": "none", "residual": "A"}
NORMS = {"batch": "with batch norm", "none": "without batch norm"}

# He et al. 2015, section 4.2, but for the batch (128 there) and the rate (0.1), for so few images and epochs.
BATCH = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
LAST_SHARE = 0.25  # of the epochs, at a tenth of the rate
PROBED = 256  # images that gradients are measured on


class Probe(NamedTuple):
    """What is measured of a net: each convolution's gradient, and how much a block changes what it is given."""

    gradients: list[float]
    change: float


class Run(NamedTuple):
    """One net's training: the error in percent of each epoch, what was probed before and after, and the seconds."""

    kind: str
    norm: str
    depth: int
    seed: int
    errors: list[float]
    before: Probe
    after: Probe
    seconds: float


def create(kind: str, norm: str, depth: int, seed: int) -> nn.Module:
    """Return a net of 6n + 2 layers in training mode; the same seed gives both kinds the same weights.

    Where there is no batch norm, weights are drawn as was usual before it, for a unit gain of layers without a ReLU.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010,
    equation 16.
    """
    n = (depth - 2) // 6
    net = Architecture(kind, "basic", (n, n, n), WIDTHS, "cifar", SHORTCUTS[kind], 10, SIZE, SIZE, "section 4.2")
    model = models.create(net, seed=seed)
    if norm == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in list(model.modules()):
                for name, part in list(module.named_children()):
                    if isinstance(part, nn.BatchNorm2d):
                        setattr(module, name, nn.Identity())
                    elif isinstance(part, nn.Conv2d):
                        nn.init.xavier_normal_(part.weight)
    return model.train()


def probe(model: nn.Module, images: Tensor, labels: Tensor) -> Probe:
    """Return what reaches each convolution, and what each block does.

    The gradient is that of an image's loss along a convolution's output: the L2 norm over channels and pixels, as root
    mean square over the images. The change of a block is ‖y − x‖ / ‖x‖ from its input to its output, the median over
    the blocks that keep the shape: 0 for the identity.
    """
    outputs: list[Tensor] = []
    changes: list[float] = []

    def changed(_: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        if made.shape == given[0].shape:
            changes.append(float(((made - given[0]).norm() / given[0].norm()).detach()))

    model = copy.deepcopy(model)  # whose running statistics and hooks are nobody else's
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _, __, made: outputs.append(made))
        elif isinstance(part, BasicBlock):
            part.register_forward_hook(changed)
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    norms = [found.flatten(1).norm(dim=1) for found in torch.autograd.grad(loss, outputs)]
    return Probe([float(norm.square().mean().sqrt()) for norm in norms], float(np.median(changes)))


def train(
    what: tuple[str, str, int, int], images: Tensor, labels: Tensor, epochs: int, told: Callable[[], object]
) -> Run:
    """Return a run of the net ``what``: kind, norm, depth, seed; ``told`` is called after each epoch."""
    began, model, seed = time.perf_counter(), create(*what), what[-1]
    before = probe(model, images[:PROBED], labels[:PROBED])
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    torch.manual_seed(seed)
    errors = []
    for epoch in range(epochs):
        if epoch >= epochs * (1 - LAST_SHARE):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE / 10
        wrong = 0
        for chosen in torch.randperm(len(images)).split(BATCH):
            logits = model(augmented(images[chosen]))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            wrong += int((logits.argmax(dim=1) != labels[chosen]).sum())
        errors.append(100 * wrong / len(images))
        told()
    after = probe(model, images[:PROBED], labels[:PROBED])
    return Run(*what, errors, before, after, time.perf_counter() - began)


def digits() -> tuple[Tensor, Tensor]:
    """Return the training images as train_digits.py splits them, float32 (N, 3, 8, 8), and their labels, int64 (N,)."""
    found = load_digits()
    chosen = split(found.target)[0]
    grey = np.rint(found.images[chosen] * 255 / 16).astype(np.uint8)
    pixels = prepare_batch(np.repeat(grey[..., None], 3, axis=-1), PREPROCESSING)
    return torch.from_numpy(pixels), torch.from_numpy(found.target[chosen])


def table(runs: Sequence[Run]) -> str:
    """Return the runs in Markdown, a line for each net; several seeds as their mean, ratios as the geometric mean."""
    head = ["norm", "net", "layers", "training error %", "gradient, first ÷ last layer: before", "after"]
    head += ["change per block: before", "after", "s"]
    rows = [head, ["---"] * len(head)]
    for key in dict.fromkeys((run.norm, run.kind, run.depth) for run in runs):
        same = [run for run in runs if (run.norm, run.kind, run.depth) == key]
        errors = [run.errors[-1] for run in same]
        error = f"{np.mean(errors):.1f}" + (f" ({min(errors):.1f} to {max(errors):.1f})" if len(same) > 1 else "")
        probes = [[run.before for run in same], [run.after for run in same]]
        gradients = [profile(each)[0] for each in probes]
        changes = [np.mean([found.change for found in each]) for each in probes]
        rows.append([*map(str, key), error, *(f"{ratio:.2g}" for ratio in gradients)])
        rows[-1] += [*(f"{change:.2f}" for change in changes), f"{sum(run.seconds for run in same):.0f}"]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Write degradation.png and degradation.svg: a row for each norm; plain nets dashed, residual ones solid."""
    mpl.rcParams.update({"svg.hashsalt": "edgeres", "svg.fonttype": "none"})  # the same runs give the same file
    mpl.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2})
    norms = list(dict.fromkeys(run.norm for run in runs))
    depths = sorted({run.depth for run in runs})
    figure = Figure(figsize=(13, 0.3 + 3.1 * len(norms)), layout="constrained")
    rows = figure.subplots(len(norms), 4, squeeze=False)
    for row, norm in zip(rows, norms, strict=True):
        for kind, style, color in (("plain", "--", "tab:red"), ("residual", "-", "tab:blue")):
            of_kind = [run for run in runs if (run.norm, run.kind) == (norm, kind)]
            for index, depth in enumerate(depths):
                same = [run for run in of_kind if run.depth == depth]
                look = {"color": mpl.colormaps["viridis"](0.9 * (1 - index / max(1, len(depths) - 1)))}
                look |= {"linestyle": style, "label": f"{kind}, {depth} layers"}
                row[0].plot(range(1, 1 + len(same[0].errors)), np.mean([run.errors for run in same], axis=0), **look)
                for axes, probes in ((row[2], [run.before for run in same]), (row[3], [run.after for run in same])):
                    axes.plot(range(1, depth), profile(probes), **look)
            row[1].plot([run.depth for run in of_kind], [run.errors[-1] for run in of_kind], "o", color=color, ms=3)
            means = [np.mean([run.errors[-1] for run in of_kind if run.depth == depth]) for depth in depths]
            row[1].plot(depths, means, style, color=color, label=kind)
        label(row, NORMS[norm], depths)
    rows[0][1].legend()
    figure.legend(handles=rows[0][0].get_lines(), loc="outside lower center", ncols=2 * len(depths), fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "degradation.svg", metadata={"Date": None})
    figure.savefig(folder / "degradation.png", dpi=90)


def profile(probes: Sequence[Probe]) -> np.ndarray:
    """Return each layer's gradient as a multiple of the last one's, float64 (layers,): geometric means over seeds."""
    logs = np.log([found.gradients for found in probes])
    return np.asarray(np.exp((logs - logs[:, -1:]).mean(axis=0)))


def label(row: Iterable[Axes], norm: str, depths: Sequence[int]) -> None:
    """Name the axes of a row."""
    curve, final, start, end = row
    curve.set(title=f"training error, {norm}", xlabel="epoch", ylabel="%", ylim=(0, 100))
    final.set(title=f"at the end, {norm}", xlabel="layers", ylabel="%", ylim=(0, 100), xticks=depths)
    start.set(title="gradient by layer, before training", xlabel="layer", ylabel="multiple of the last layer's")
    end.set(title="gradient by layer, after training", xlabel="layer", ylabel="multiple of the last layer's")
    for axes in (start, end):
        axes.set_yscale("log")
        axes.minorticks_off()


def asked() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Train plain and residual nets of growing depth; draw what differs.")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 20, 32, 56], help="layers, 6n + 2 of them")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--norm", nargs="+", choices=NORMS, default=list(NORMS), help="with batch norm, or none")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of degradation.png and degradation.svg")
    options = parser.parse_args()
    wrong = [str(depth) for depth in options.depths if depth < 8 or depth % 6 != 2]
    if wrong:
        parser.error(f"--depths: {', '.join(wrong)}: a net has 6n + 2 layers, such as 8, 14, 20, 32, 44, 56, 110")
    if options.epochs < 1:
        parser.error(f"--epochs: {options.epochs}: at least one is needed")
    return options


def main() -> None:
    """Train all nets, draw, and print the table."""
    options = asked()
    images, labels = digits()
    asked_for = product(options.norm, SHORTCUTS, sorted(options.depths), options.seeds)
    kinds = [(kind, norm, depth, seed) for norm, kind, depth, seed in dict.fromkeys(asked_for)]
    began, console = time.perf_counter(), Console(stderr=True)
    worked = time.process_time()
    runs = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        # An epoch costs about as much as its net is deep.
        task = progress.add_task("training", total=options.epochs * sum(depth for _, _, depth, _ in kinds))
        for what in kinds:
            kind, norm, depth, seed = what
            progress.update(task, description=f"{kind}, {depth} layers, {NORMS[norm]}, seed {seed}")
            runs.append(train(what, images, labels, options.epochs, lambda depth=depth: progress.advance(task, depth)))
    draw(runs, options.out)
    print(table(runs))
    print(
        f"\n{len(images)} images; epochs: {options.epochs}; seeds: {', '.join(map(str, options.seeds))}; "
        f"{time.perf_counter() - began:.0f} s, of the processor {time.process_time() - worked:.0f} s; "
        f"threads: {torch.get_num_threads()}; torch {torch.__version__}, {platform.machine()}. "
        f"Drawn: {options.out / 'degradation.svg'} and .png"
    )


if __name__ == "__main__":
    main()
