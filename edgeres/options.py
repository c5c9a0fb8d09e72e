"""The options that several commands have, and the types of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple, TypeVar

import click

from edgeres.completion import models, paths, targets

F = TypeVar("F", bound=Callable[..., Any])

LONGEST = 1e6  # seconds that a measurement may be asked to take


if TYPE_CHECKING:
    Parameter = click.ParamType[Any]  # generic to the type checker, and not at run time before click 8.4
else:
    Parameter = click.ParamType


class Size(Parameter):
    """``224`` or ``224x160`` (height x width), in pixels."""

    name = "HEIGHTxWIDTH"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> List[int]:
        parts = str(value).lower().replace("×", "x").replace(",", "x").split("x")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or min(numbers) < 1:
            self.fail(f"{value!r} is not a size such as 224 or 224x160", param, ctx)
        return numbers * 2 if len(numbers) == 1 else numbers


class Triple(Parameter):
    """Three numbers, one per channel: ``0.485,0.456,0.406``; one number stands for all three."""

    name = "R,G,B"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> List[float]:
        try:
            numbers = [float(part) for part in str(value).replace(",", " ").split()]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3):
            self.fail(f"{value!r} is not three numbers such as 0.485,0.456,0.406", param, ctx)
        return numbers * 3 if len(numbers) == 1 else numbers


def _whole(value: Any) -> List[int]:
    """Return the whole numbers of a list such as 1,8,32; none where it is something else."""
    try:
        return [int(part) for part in str(value).replace(",", " ").split()]
    except ValueError:
        return []


class Color(Parameter):
    """``114,114,114``: red, green and blue, 0 to 255; one number stands for all three."""

    name = "R,G,B"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> List[int]:
        numbers = _whole(value)
        if len(numbers) not in (1, 3) or not all(0 <= number <= 255 for number in numbers):
            self.fail(f"{value!r} is not a colour such as 114,114,114", param, ctx)
        return numbers * 3 if len(numbers) == 1 else numbers


class Batch(Parameter):
    """``1,8,32``: the smallest, the usual and the largest batch; one number stands for all three."""

    name = "MIN,OPT,MAX"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> List[int]:
        numbers = _whole(value)
        if len(numbers) not in (1, 3):
            self.fail(f"{value!r} is not three numbers such as 1,8,32", param, ctx)
        return numbers * 3 if len(numbers) == 1 else numbers


class Finite(click.FloatRange):
    """A number of a range, and no NaN, which is in no range and yet refused by none."""

    def convert(self, value: Any, param: Optional[click.Parameter], context: Optional[click.Context]) -> float:
        number = float(super().convert(value, param, context))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, context)
        return number


class Seconds(Finite):
    """A time that can end."""

    def convert(self, value: Any, param: Optional[click.Parameter], context: Optional[click.Context]) -> float:
        seconds = super().convert(value, param, context)
        if seconds > LONGEST:
            self.fail(f"{value} is not a number of seconds up to {LONGEST}.", param, context)
        return seconds


class Sizes(Parameter):
    """``1,8,32``: batch sizes, one or more, in the order given."""

    name = "N,N,…"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> Tuple[int, ...]:
        numbers = tuple(dict.fromkeys(_whole(value)))
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r} is not a list of batch sizes such as 1,8,32", param, ctx)
        return numbers


BUILD_OPTIONS = (
    click.option(
        "--model",
        metavar="NAME",
        shell_complete=models,
        help="A name from `edgeres models`, package.module:callable, or a .onnx file.",
    ),
    click.option(
        "--weights",
        metavar="FILE",
        shell_complete=paths(".safetensors", ".pt", ".pth", ".th", bundles=False),
        help=".safetensors or a torch checkpoint (.pt .pth .th); tensors only, never code.",
    ),
    click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="Default: int8."),
    click.option("--input-size", type=Size(), help="Where the model's own does not fit."),
    click.option("--resize", type=int, metavar="PIXELS", help="Scale the short side to this before the centre crop."),
    click.option("--mean", type=Triple(), help="Per channel, of pixels scaled to 0…1."),
    click.option("--std", type=Triple(), help="Per channel, of pixels scaled to 0…1."),
    click.option(
        "--fit",
        type=click.Choice(["crop", "letterbox"]),
        help="letterbox: the whole frame, scaled into the input, the rest filled. Default: crop, out of the middle.",
    ),
    click.option("--pad", type=Color(), help="What fills a letterbox. Default: 114,114,114."),
    click.option("--num-classes", type=int, help="Outputs of the classifier."),
    click.option("--seed", type=int, help="Of random weights, where none are given."),
    click.option(
        "--calibration",
        metavar="PATH",
        shell_complete=paths(bundles=False),
        help="A folder of images, a list, .tar, or .npy/.npz of uint8 (N, H, W, 3); or a URL of a folder or .tar.",
    ),
    click.option(
        "--calibration-count", type=int, help="How many samples to calibrate on, spread evenly. Default: 512."
    ),
    click.option(
        "--method",
        type=click.Choice(["auto", "minmax", "percentile", "entropy", "mse"]),
        help="Of finding ranges. Default: auto, by the error that each tensor's range will cause.",
    ),
    click.option("--percentile", type=float, help="For --method percentile. Default: 99.99."),
    click.option(
        "--keep-float",
        multiple=True,
        metavar="PATTERN",
        help="Torch modules that stay in float, such as 'fc'. Repeatable.",
    ),
    click.option(
        "--activation-range",
        type=click.Choice(["auto", "symmetric", "shifted"]),
        help="shifted: the full int8 range after a ReLU. Default: auto, shifted for cpu and rtx, symmetric for others.",
    ),
    click.option(
        "--grouped",
        type=click.Choice(["auto", "int8", "float"]),
        help="How convolutions in groups run (ResNeXt, depthwise). Default: auto, float for gpu, int8 for others.",
    ),
    click.option(
        "--weight-range",
        type=click.Choice(["auto", "full", "paired"]),
        help="paired: neighbours within what 8-bit multiply–adds of any CPU hold. Default: auto, paired where the "
        "engine is for a CPU and activations are shifted.",
    ),
    click.option(
        "--recovery",
        type=click.Choice(["auto", "none", "fast", "full"]),
        help="How much is done for the accuracy: full takes up to two minutes more. Default: auto, "
        "which is fast, and more where the verdict is fail (--budget-minutes).",
    ),
    click.option(
        "--budget-minutes",
        type=float,
        metavar="MINUTES",
        help="How long to do more (reconstruct, give layers back to float) where the verdict is fail. Default: 10; not "
        "at all: 0, or --recovery fast or none.",
    ),
    click.option(
        "--validation",
        metavar="PATH",
        shell_complete=paths(bundles=False),
        help="A folder with one subfolder per class, or an .npz with images and labels.",
    ),
    click.option(
        "--max-drop", type=float, metavar="PP", help="Accuracy budget: points of top-1 against FP32. Default: 0.5."
    ),
    click.option(
        "--policy",
        type=click.Choice(["ci", "point"]),
        help="Judge by the whole 95 % interval, or by the point estimate.",
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), help="The bundle's folder. Default: build/<name>-<precision>."
    ),
    click.option(
        "--json", "as_json", is_flag=True, help="The result as one JSON object on stdout; everything else on stderr."
    ),
)


ENGINE_OPTIONS = (
    click.option(
        "--backend", type=click.Choice(["auto", "cpu", "tensorrt", "tensorrt-rtx"]), help="What runs it. Default: auto."
    ),
    click.option("--target", shell_complete=targets, help="The device: see `edgeres compile --list-targets`."),
    click.option("--batch", type=Batch(), help="For TensorRT: smallest, usual and largest batch. Default: 1,8,32."),
    click.option("--workspace-mib", type=int, help="TensorRT's scratch memory; less for small boards."),
    click.option("--optimization-level", type=click.IntRange(0, 5), help="Of TensorRT's builder (8.6 and newer)."),
    click.option("--timing-cache", metavar="FILE", help="Makes the next build on the same device faster."),
    click.option("--gpu-fallback/--no-gpu-fallback", default=None, help="Layers that a DLA does not have, on the GPU."),
    click.option(
        "--version-compatible/--no-version-compatible",
        default=None,
        help="An engine for newer TensorRTs too, where the lean runtime of this one is installed; not for rtx.",
    ),
    click.option(
        "--hardware-compatible/--no-hardware-compatible",
        default=None,
        help="An engine for other GPUs too (not Jetson).",
    ),
    click.option("--strict/--no-strict", default=None, help="Refuse an engine with a layer that is not as planned."),
    click.option(
        "--engine-input",
        type=click.Choice(["auto", "uint8", "float32"]),
        help="What TensorRT's engine takes: pixels, a quarter of the bytes, or normalized numbers. Default: auto, "
        "uint8 where any normalized input is then still answered alike.",
    ),
    click.option(
        "--timeout-minutes", type=float, metavar="MINUTES", help="How long TensorRT may build an engine. Default: 240."
    ),
)


LATENCY_OPTIONS = (
    click.option(
        "--max-latency-ms",
        type=Finite(0, min_open=True),
        metavar="MS",
        help="Limit on the median latency (p50) of one frame, on this machine: the engine alone, input prepared.",
    ),
    click.option(
        "--min-speedup",
        type=Finite(0, min_open=True),
        metavar="TIMES",
        help="How many times as fast as its float twin the engine has to be, on this machine.",
    ),
)


def latency_options(command: F) -> F:
    """Give a command the limits on the latency."""
    return _with(LATENCY_OPTIONS, command)


cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Run the samples on many machines: local, local:4, or a Dask scheduler's tcp://HOST:8786. Same bits.",
)


backend_option = click.option(
    "--backend",
    default="auto",
    shell_complete=targets,
    help="Which of the bundle's engines, or its target; default: the first.",
)
key_option = click.option(
    "--key",
    "trusted_keys",
    multiple=True,
    callback=lambda context, option, keys: keys or None,
    metavar="PUBLIC",
    shell_complete=paths(".pub", bundles=False),
    help="Refuse a bundle that nobody signed with this key. Repeatable: one of them is enough.",
)


def engine_options(command: F) -> F:
    """Give a command the options that concern engines."""
    return _with(ENGINE_OPTIONS, command)


def build_options(command: F) -> F:
    """Give a command the options of ``build``."""
    return engine_options(_with(BUILD_OPTIONS, command))


def _with(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):  # as decorators that stand one above the other
        command = option(command)
    return command
