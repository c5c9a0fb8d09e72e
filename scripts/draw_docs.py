"""Draw the figures of the documentation, from numbers that are measured on the embedded default.

    python scripts/draw_docs.py                # docs/figures/*.svg, from docs/figures/measured.json
    python scripts/draw_docs.py --measure      # measured.json anew as well: half a minute on two cores

The same numbers and the same matplotlib give the same files, byte for byte; tests draw and measure again, and compare.
It needs matplotlib, and to measure edgeres[host].
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import edgeres
from edgeres.validation.statistics import paired_difference_interval

FIGURES = Path(__file__).resolve().parents[1] / "docs/figures"
MEASURED = FIGURES / "measured.json"
TENSOR = "/layer1/layer1.0/relu2/Relu_output_0"  # what the first residual block puts out
BORDER = "/layer3/layer3.0/conv2/Conv_output_0_shift"  # what is added behind a padded 3×3 convolution, 8×8 outputs
METHODS = ("minmax", "percentile", "entropy", "mse", "auto")
BINS = 60
BUDGET = 0.5  # percentage points
RATE = 0.016  # of the samples that one of the two networks alone is right on
COUNTS = (1_000, 3_000, 10_000, 50_000)
LOSSES = (0.0, 0.25, 1.0)  # percentage points
BLUE, ORANGE, GREEN, RED, GREY = "#1f77b4", "#d95f02", "#1b7837", "#b2182b", "#666666"


def measure() -> dict[str, Any]:
    """Return what the figures show: a tensor's histogram and ranges, a border map, intervals."""
    from edgeres.calibrate import Statistics, choose
    from edgeres.calibrate.ranges import Histogram

    with tempfile.TemporaryDirectory() as work:
        # As the graph stands: equalized tensors are scaled by channel, and their units are nobody's.
        bundle = Path(edgeres.build(recovery="none", out=Path(work, "plain")).path)
        statistics = Statistics.from_bytes((bundle / "statistics.npz").read_bytes(), "statistics.npz")
        histogram = Histogram.of(statistics.tensors[TENSOR])
        ranges = {name: choose(statistics, name, 99.99, [TENSOR])[TENSOR].amax for name in METHODS}
        border = border_map(bundle)
    edges = np.linspace(0.0, histogram.amax, BINS + 1)
    places = np.clip(np.searchsorted(edges, (histogram.low + histogram.high) / 2, side="right") - 1, 0, BINS - 1)
    counts = np.bincount(places, weights=histogram.counts, minlength=BINS)
    return {
        "tensor": TENSOR,
        "elements": histogram.elements,
        "zeros": int(histogram.elements - histogram.counts.sum()),
        "amax": histogram.amax,
        "counts": [int(count) for count in counts],
        "ranges": {name: float(value) for name, value in ranges.items()},
        "border": [[float(f"{value:.5g}") for value in row] for row in border],
    }


def border_map(bundle: Path) -> np.ndarray:
    """Return what a layer owes near the border, beside what its bias gives back: its first channel, float32 (h, w)."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.int8.onnx")
    constants = {one.name: one for one in model.graph.initializer}
    found: np.ndarray = numpy_helper.to_array(constants[BORDER])[0, 0]
    return found


def draw_ranges(measured: dict[str, Any]) -> Figure:
    """A tensor's histogram, and where each method lets its range end."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, measured["amax"], BINS + 1)
    axes.bar(edges[:-1], np.maximum(measured["counts"], 0.5), np.diff(edges), align="edge", color="#9ecae1", bottom=0.5)
    axes.set(
        yscale="log", ylim=(0.7, None), xlabel="value behind the first residual block", ylabel="values, of 200 images"
    )
    order = sorted(METHODS, key=lambda name: measured["ranges"][name])
    for name in order:
        amax = measured["ranges"][name]
        axes.axvline(amax, color=f"C{METHODS.index(name)}", linewidth=1.4, label=f"{name}: {amax:.3g}")
    axes.legend(title="range ends at", fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    zeros = 100 * measured["zeros"] / measured["elements"]
    axes.set_title(f"{zeros:.0f} % of all values are exact zeros, which every grid has", fontsize=9)
    return figure


def box(axes: Axes, place: tuple[float, float], text: str, color: str, width: float = 1.1) -> None:
    """Draw a box with text, around a place."""
    x, y = place
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.22), width, 0.44, boxstyle="round,pad=0.04", facecolor=color, edgecolor="#333333", lw=0.8
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if color != "#ffffff" else "black")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, lw=1.4))


def draw_placement(_: dict[str, Any]) -> Figure:
    """Where Q and DQ stand around a residual block: on what convolutions read, and on the skip."""
    figure = Figure(figsize=(9.2, 2.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12.4), ylim=(-0.55, 3.35))
    axes.axis("off")
    layer, pair, white = "#355c7d", ORANGE, "#ffffff"
    row = 2.0
    chain = [
        (0.75, "x", white, 0.6),
        (1.85, "Q  DQ", pair, 0.9),
        (3.35, "Conv", layer, 0.9),
        (4.65, "ReLU", layer, 0.9),
        (5.95, "Q  DQ", pair, 0.9),
        (7.35, "Conv", layer, 0.9),
        (8.65, "Add", layer, 0.8),
        (9.85, "ReLU", layer, 0.9),
        (11.15, "Q  DQ", pair, 0.9),
    ]
    for x, text, color, width in chain:
        box(axes, (x, row), text, color, width)
    for (left, _t, _c, wide), (right, _u, _d, width) in pairwise(chain):
        integer = left in (1.85, 5.95)
        arrow(axes, (left + wide / 2 + 0.05, row), (right - width / 2 - 0.05, row), pair if integer else GREY)
    for x in (3.35, 7.35):
        box(axes, (x, 3.0), "weights  Q  DQ", pair, 1.5)
        arrow(axes, (x, 2.72), (x, 2.3), pair)
    axes.plot([1.85, 1.85, 8.65], [1.74, 0.75, 0.75], color=pair, lw=1.4)
    arrow(axes, (8.65, 0.75), (8.65, 1.74), pair)
    axes.text(
        5.2,
        0.5,
        "the skip reads the same int8 tensor as the first convolution: one Q, one scale",
        ha="center",
        fontsize=8,
    )
    axes.text(8.02, 2.32, "float", ha="center", fontsize=7, color=GREY)
    axes.text(
        6.2, -0.25, "Between convolution, addition and ReLU stands no Q: TensorRT makes one kernel of the three, "
        "which reads int8 and writes int8.", ha="center", fontsize=8,
    )  # fmt: skip
    return figure


def draw_full_range(measured: dict[str, Any]) -> Figure:
    """128 levels against 256 behind a ReLU, and the map that a border of zeros costs."""
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    amax = measured["ranges"]["auto"]
    shown = amax / 16
    values = np.linspace(0, shown, 1200)
    for levels, color, what in (
        (127, RED, "symmetric: x / s, 0 to 127"),
        (255, BLUE, "shifted: x / s − 128, −128 to 127"),
    ):
        step = amax / levels
        error = np.rint(values / step) * step - values
        noise = step**2 / 12
        left.plot(values, error, color=color, lw=1.1, label=f"{what}\nstep {step:.3g}, noise power {noise:.2g}")
    left.set(xlabel="value behind a ReLU (the first sixteenth of the range)", ylabel="what rounding changes")
    left.set_ylim(-1.1 * amax / 254, 1.9 * amax / 254)
    left.legend(fontsize=8, loc="upper right", frameon=False)
    border = np.array(measured["border"])
    reach = np.abs(border).max()
    image = right.imshow(border, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    right.set_title(
        f"what one channel of a 3×3 layer owes\nnear the border ({border.shape[0]}×{border.shape[1]} outputs)",
        fontsize=9,
    )
    right.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=right, shrink=0.85)
    return figure


def draw_verdict(_: dict[str, Any]) -> Figure:
    """Intervals of the loss against a budget, for several losses and numbers of samples."""
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    axes = figure.subplots()
    rows: list[tuple[float, str]] = []
    y = 0.0
    for loss in LOSSES:
        for count in COUNTS:
            discordant = RATE * count
            b = round((discordant + loss / 100 * count) / 2)
            c = round(discordant) - b
            low, high = (100 * limit for limit in paired_difference_interval(b, c, count))
            verdict = "pass" if high < BUDGET else "fail" if low > BUDGET else "inconclusive"
            color = {"pass": GREEN, "fail": RED, "inconclusive": GREY}[verdict]
            axes.plot([low, high], [y, y], color=color, lw=3, solid_capstyle="butt")
            axes.plot([100 * (b - c) / count], [y], "o", color=color, ms=4)
            axes.text(2.15, y, verdict, va="center", fontsize=8, color=color)
            rows.append((y, f"{count:,} samples"))
            y -= 1
        axes.text(-1.0, y + len(COUNTS) + 0.45, f"loses {loss:g} pp", fontsize=8, fontweight="bold", va="bottom")
        y -= 1.6
    axes.axvline(BUDGET, color="black", lw=1, ls="--")
    axes.text(BUDGET, 1.9, "budget", ha="center", fontsize=8)
    axes.axvline(0, color=GREY, lw=0.6)
    axes.set(xlim=(-1.0, 2.7), ylim=(y + 1.6, 1.8), xlabel="percentage points of top-1 lost, 95 % interval")
    axes.set_yticks([place for place, _ in rows], [text for _, text in rows], fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


DRAWINGS = {
    "ranges": draw_ranges,
    "placement": draw_placement,
    "full-range": draw_full_range,
    "verdict": draw_verdict,
}


def draw(measured: dict[str, Any], folder: Path) -> None:
    """Write all figures into a folder."""
    # Text stays text, in the reader's font; no date and no random names, so that the same numbers give the same bytes.
    settings = {"svg.hashsalt": "edgeres", "svg.fonttype": "none", "font.size": 9, "axes.grid": False}
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(settings):
        for name, drawing in DRAWINGS.items():
            drawing(measured).savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the documentation's figures.")
    parser.add_argument("--measure", action="store_true", help="measure anew what they show")
    parser.add_argument("--out", type=Path, default=FIGURES, help="another folder for the figures")
    options = parser.parse_args()
    if options.measure:
        MEASURED.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(MEASURED.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
