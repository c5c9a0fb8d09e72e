"""The recipe: what the user wants, from TOML and flags, with every mistake reported at once.

A TOML file has the sections below as tables; a flag is an override with a dotted name, such as
``{"calibration.method": "entropy"}``. Paths are relative to the file that names them (for flags, to the current
folder); ``edgeres:`` in front of a path means the dossier that comes with edgeres.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import msgspec

from edgeres import OPTIONS
from edgeres.architectures import ARCHITECTURES, Architecture
from edgeres.artifacts import Preprocessing, to_data
from edgeres.errors import RecipeError
from edgeres.files import is_url, read_bounded
from edgeres.preprocess import PAD

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16", "int8")
METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
ACTIVATION_RANGES = ("auto", "symmetric", "shifted")
GROUPED = ("auto", "int8", "float")
WEIGHT_RANGES = ("auto", "full", "paired")
RECOVERIES = ("auto", "none", "fast", "full")
POLICIES = ("ci", "point")
ENGINE_INPUTS = ("auto", "uint8", "float32")
BACKENDS = ("auto", "cpu", "tensorrt", "tensorrt-rtx")
LARGEST_BATCH = (1 << 31) - 1
LARGEST_WORKSPACE = (1 << 43) - 1  # in MiB; in bytes it has 63 bits
TARGETS = ("cpu", "gpu", "dla0", "dla1", "rtx")
DOSSIER_PREFIX = "edgeres:"
MOST_CLASSES = 1_000_000  # a classifier of ResNet-50 for so many has 8 GB
MOST_MINUTES = 7 * 24 * 60
LARGEST_RECIPE = 1 << 16  # bytes: a recipe is a page of text
MOST_DOTS = 1_000  # in a line: Python's reader takes gigabytes for a key of 30,000 parts
TABLE = "targets"
ONE_ALONE = (
    "this recipe is of several bundles, and one is wanted here. Build them all: edgeres build RECIPE, in Python "
    "edgeres.build_matrix; or name one of the bundles"
)
DEFAULT_RECIPE = DOSSIER_PREFIX + "recipes/digits-int8.toml"
IMAGENET_SIZE, IMAGENET_RESIZE = 224, 256


class ModelSection(msgspec.Struct, frozen=True):
    """``source`` is a name from ``edgeres models``, ``package.module:callable``, or an ``.onnx`` file."""

    source: str = ""
    weights: Optional[str] = None
    num_classes: Optional[int] = None
    seed: int = 0

    @property
    def onnx(self) -> Optional[Path]:
        """The ``.onnx`` file that the model is, or None where it is a name or a callable."""
        return locate(self.source) if self.source.lower().endswith(".onnx") else None


class InputSection(msgspec.Struct, frozen=True):
    """``size`` is [height, width] in pixels; the rest as in :class:`edgeres.artifacts.Preprocessing`."""

    size: Optional[Tuple[int, int]] = None
    resize: Optional[int] = None
    mean: Tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: Tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: str = "rgb"
    fit: str = "crop"
    pad: Optional[Tuple[int, int, int]] = None


class CalibrationSection(msgspec.Struct, frozen=True):
    """``samples`` is a folder, a list file or an array file; ``count`` of them are used, spread evenly over all."""

    samples: Optional[str] = None
    count: int = 512
    method: str = "auto"
    percentile: float = 99.99


class QuantizationSection(msgspec.Struct, frozen=True):
    """``keep_float`` are shell patterns of torch modules that stay in float.

    ``activation_range`` is ``symmetric``, with which recovery shifts only what comes for nothing; ``shifted``, which
    gives all that is never negative the full int8 range; or ``auto``, which takes what suits the engine's target.
    ``recovery`` is how much is done for the accuracy: ``none``, ``fast``, ``full``, or ``auto``, which is ``fast``, and
    more where the verdict is ``fail``. Then ``auto`` and ``full`` also give layers back to float until the accuracy
    budget is kept, for up to ``budget_minutes``; 0: neither.
    ``grouped`` is how convolutions in groups run: ``int8``, ``float``, or ``auto``, which is by the engine's target.
    ``weight_range`` is ``full``; ``paired``, which keeps neighbours within what 16 bits hold beside any byte; or
    ``auto``, by the engine's target.
    """

    keep_float: Tuple[str, ...] = ()
    activation_range: str = "auto"
    grouped: str = "auto"
    weight_range: str = "auto"
    recovery: str = "auto"
    budget_minutes: float = 10.0


class ValidationSection(msgspec.Struct, frozen=True):
    """``max_drop`` is the accuracy budget: percentage points of top-1 that may be lost against FP32."""

    samples: Optional[str] = None
    max_drop: float = 0.5
    policy: str = "ci"


class EngineSection(msgspec.Struct, frozen=True):
    """``backend`` runs the model: ``auto`` takes the best that this machine has; ``target`` is the device.

    For TensorRT: ``batch`` is (min, opt, max); ``workspace_mib`` limits the builder's scratch memory;
    ``optimization_level`` is 0…5; ``timing_cache`` is a file that speeds up the next build; ``gpu_fallback`` lets
    layers that a DLA does not have run on the GPU; ``strict`` refuses an engine with a layer that does not run as
    planned. ``input`` is what the engine takes: ``uint8`` pixels, a quarter of the bytes, normalized ``float32``, or
    ``auto``: pixels where any normalized input is then still answered alike (int8 nets that read exact pixels).
    ``timeout_minutes`` is how long the builder may take.
    """

    backend: str = "auto"
    target: Optional[str] = None
    batch: Tuple[int, int, int] = (1, 8, 32)
    workspace_mib: Optional[int] = None
    optimization_level: Optional[int] = None
    timing_cache: Optional[str] = None
    gpu_fallback: bool = True
    version_compatible: bool = False
    hardware_compatible: bool = False
    strict: bool = False
    input: str = "auto"
    timeout_minutes: float = 240.0


SECTIONS: Dict[str, type] = {
    "model": ModelSection,
    "input": InputSection,
    "calibration": CalibrationSection,
    "quantization": QuantizationSection,
    "validation": ValidationSection,
    "engine": EngineSection,
}


class Recipe(msgspec.Struct, frozen=True):
    """What the user wants, whole: every default filled in, every path absolute."""

    name: str
    precision: str
    model: ModelSection
    input: InputSection
    calibration: CalibrationSection
    quantization: QuantizationSection
    validation: ValidationSection
    engine: EngineSection

    @property
    def architecture(self) -> Optional[Architecture]:
        """The named architecture, or None where the model is a callable or a file."""
        return ARCHITECTURES.get(self.model.source)

    @property
    def preprocessing(self) -> Preprocessing:
        """How frames become input.

        Raises:
            RecipeError: the size is open (an ``.onnx`` model whose size nobody has looked up yet).
        """
        if self.input.size is None:
            raise RecipeError("input.size", ["is not known: say --input-size HEIGHTxWIDTH"])
        frame = self.input
        return Preprocessing(self.input.size, frame.resize, frame.mean, frame.std, frame.color, frame.fit, frame.pad)

    def with_size(self, size: Tuple[int, int]) -> Recipe:
        """Return the recipe for a model that turned out to take images of ``size`` (height, width)."""
        resize = self.input.resize
        if resize is None and self.input.fit != "letterbox":
            resize = max(size)
        return msgspec.structs.replace(self, input=msgspec.structs.replace(self.input, size=size, resize=resize))


def dossier() -> Path:
    """Return the folder of the data that comes with edgeres: in a wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "dossier"
    return installed if installed.is_dir() else package.parent / "calibration"


def locate(path: str, base: Optional[Path] = None) -> Path:
    """Return the real place of a recipe's path; ``base`` is what relative paths are relative to."""
    if path.startswith(DOSSIER_PREFIX):
        return dossier() / path[len(DOSSIER_PREFIX) :]
    # A ~name that is nobody's is left as it is: a file may be called so, and if not, it is reported as missing.
    return (base or Path.cwd()) / os.path.expanduser(path)


def place_of(source: str) -> Union[str, Path]:
    """Return where a recipe's samples are: the URL of a store, or a real place as :func:`locate` has it."""
    return source if is_url(source) else locate(source)


def load_recipe(source: Union[str, Path, None] = None, overrides: Optional[Mapping[str, Any]] = None) -> Recipe:
    """Return the recipe of a TOML file, with overrides on top; of the embedded default where neither names a model.

    Args:
        source: a TOML file, a bundle (its own recipe is taken), or None.
        overrides: dotted name → value, such as ``{"model.source": "resnet50"}``; None values are ignored.

    Raises:
        RecipeError: with every mistake found.
    """
    raw = read_raw(source, overrides)
    problems: List[str] = []
    if TABLE in raw.data:
        raise RecipeError(raw.where, [f"{TABLE}: {ONE_ALONE}"])
    recipe = decode(raw.data, problems)
    if problems or recipe is None:
        raise raw.error(problems)
    return recipe


class Raw(NamedTuple):
    """A recipe as it was read, flags on top, and nothing of it checked: TOML's types, with absolute paths; ``where`` it
    comes from, and the flags, ``overrides`` by dotted name."""

    data: Dict[str, Any]
    where: str
    overrides: Mapping[str, Any]

    def error(self, problems: Sequence[str]) -> RecipeError:
        """Return what to raise of problems, each said of the flag that it comes from, where it comes from one."""
        blamed = [_blamed(problem, self.overrides) for problem in problems]
        of_flags = all(new != old for new, old in zip(blamed, problems))
        return RecipeError("options" if of_flags else self.where, blamed)


def read_raw(source: Union[str, Path, None] = None, overrides: Optional[Mapping[str, Any]] = None) -> Raw:
    """Return the recipe of a TOML file as it stands there, with overrides on top; see :func:`load_recipe`.

    Raises:
        RecipeError: it cannot be read, or is not TOML.
    """
    overrides = {name: value for name, value in (overrides or {}).items() if value is not None}
    if source is None and "model.source" not in overrides:
        source = DEFAULT_RECIPE
    data: Dict[str, Any] = {}
    where = "options"
    if source is not None:
        path = locate(str(source))
        path = path / "recipe.toml" if os.path.isdir(path) else path
        where = str(path)
        data = _read(path)
        _anchor(data, path.parent)
    flags: Dict[str, Any] = {}
    for name, value in overrides.items():
        _put(flags, name, value)
    _anchor(flags, Path.cwd())
    for section, values in flags.items():
        if not isinstance(values, dict):
            data[section] = values
        elif isinstance(data.setdefault(section, {}), dict):  # what is no table stays, to be reported
            data[section].update(values)
    return Raw(data, where, overrides)


FLAGS = {key: f"--{name.replace('_', '-')}" for name, key in OPTIONS.items() if key != "name"}
"""The recipe's keys, and the flags that override them."""


def _blamed(problem: str, overrides: Collection[str]) -> str:
    """Return a problem that names the flag which a value came from, in the place of the recipe's key."""
    key, colon, what = problem.partition(":")
    return f"{FLAGS[key]}{colon}{what}" if key in overrides and key in FLAGS else problem


def engine_section(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> EngineSection:
    """Return a bundle's engine settings with overrides on top; None values are ignored. A new backend or target takes
    the stored one's place together with it.

    Raises:
        RecipeError: with every mistake found.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    values = dict(stored) if isinstance(stored, dict) else {}
    values.pop("timing_cache", None)  # a file of the host's, and not for a bundle to choose here
    if {"backend", "target"} & given.keys():
        values = {name: value for name, value in values.items() if name not in ("backend", "target")}
    values.update(given)
    if isinstance(values.get("timing_cache"), str):
        values["timing_cache"] = _absolute(values["timing_cache"], Path.cwd())
    problems: List[str] = []
    section = read_section("engine", EngineSection, values, problems)
    if isinstance(section, EngineSection):
        problems.extend(_engine_mistakes(section))
    if problems or not isinstance(section, EngineSection):
        flags = {f"engine.{name}" for name in given}
        raise RecipeError("options", [_blamed(problem, flags) for problem in problems])
    return section


def _read(path: Path) -> Dict[str, Any]:
    try:
        content = read_bounded(path, LARGEST_RECIPE)
    except FileNotFoundError:
        problem = "there is no such recipe. Write one, or start from `edgeres build` alone"
        raise RecipeError(str(path), [problem]) from None
    except (OSError, ValueError) as failure:  # a ValueError: no path can be such
        raise RecipeError(str(path), [f"cannot be read: {getattr(failure, 'strerror', failure)}"]) from None
    try:
        text = content.decode("utf-8")
        if any(line.count(".") > MOST_DOTS for line in text.split("\n")):
            raise ValueError(f"no key has more than {MOST_DOTS:,} dots")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as failure:  # not UTF-8, not TOML, a number of thousands of digits
        raise RecipeError(str(path), [f"is not TOML: {failure}"]) from None


def _put(data: Dict[str, Any], dotted: str, value: Any) -> None:
    section, _, key = dotted.partition(".")
    if key:
        data.setdefault(section, {})[key] = value
    else:
        data[section] = value


def _anchor(data: Dict[str, Any], base: Path) -> None:
    """Make the paths in ``data`` absolute, so that the recipe means the same wherever it is read next."""
    for section, key in (
        ("model", "weights"),
        ("calibration", "samples"),
        ("validation", "samples"),
        ("engine", "timing_cache"),
    ):
        values = data.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            values[key] = _absolute(values[key], base)
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("source"), str) and model["source"].lower().endswith(".onnx"):
        model["source"] = _absolute(model["source"], base)


def _absolute(path: str, base: Path) -> str:
    return path if not path or path.startswith(DOSSIER_PREFIX) or is_url(path) else str(locate(path, base).absolute())


def decode(data: Dict[str, Any], problems: List[str]) -> Optional[Recipe]:
    """Return the recipe that TOML's data is; None where there are ``problems``, to which its own are added.

    Every section and field is read by itself, so that one mistake does not hide the next.
    """
    known = ["name", "precision", *SECTIONS, TABLE]  # of which the last is asked for elsewhere
    problems.extend(_unknown(key, known, "") for key in data if key not in known)
    sections = {name: read_section(name, kind, data.get(name, {}), problems) for name, kind in SECTIONS.items()}
    name, precision = data.get("name", ""), data.get("precision", "int8")
    if not isinstance(name, str) or name != Path(name).name or name.startswith(".") or not name.isprintable():
        problems.append(f"name: {_shown(name)} is not a plain folder name")
    if precision not in PRECISIONS:
        problems.append(f"precision: {_shown(precision)} is not one of {', '.join(PRECISIONS)}")
    recipe = Recipe(name=name, precision=precision, **sections)
    problems.extend(problem for problem in _mistakes(recipe) if not _known(problem, problems))
    return None if problems else _filled(recipe)


def _known(mistake: str, problems: List[str]) -> bool:
    """Whether a key, or the whole section that it is in, has been reported already."""
    key = mistake.partition(":")[0]
    return any(problem.startswith((f"{key}:", f"{key.partition('.')[0]}:")) for problem in problems)


def read_section(name: str, kind: type, values: Any, problems: List[str]) -> Any:
    """Return a table of TOML as a noun, with what is good in it; what is not is added to ``problems``."""
    if not isinstance(values, dict):
        problems.append(f"{name}: must be a table, not {type(values).__name__}")
        return kind()
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    problems.extend(_unknown(key, list(fields), f"{name}.") for key in values if key not in fields)
    good: Dict[str, Any] = {}
    for key, field in fields.items():
        if key in values:
            if _too_large(values[key]):
                problems.append(f"{name}.{key}: a whole number has at most 64 bits")
                continue
            try:
                good[key] = msgspec.convert(values[key], type=field.type)
            except msgspec.ValidationError as problem:
                what = str(problem)
                if isinstance(values[key], str) and what.startswith("Expected `array`, got `str`"):
                    what = f"is a list: {key} = [{json.dumps(values[key], ensure_ascii=False)}]"
                problems.append(f"{name}.{key}: {what}")
    return kind(**good)


def _too_large(value: Any) -> bool:
    """Whether there is a number that TOML does not have, though Python's reader takes it; it could not be written."""
    return any(isinstance(x, int) and x.bit_length() > 63 for x in (value if isinstance(value, list) else [value]))


def _shown(value: Any) -> str:
    """Return what a message says of a value that should have been text."""
    return repr(value) if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _unknown(key: str, known: List[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{prefix}{key}: there is no such key" + (f"; did you mean {prefix}{near[0]}?" if near else "")


def _mistakes(recipe: Recipe) -> List[str]:
    """Return what is wrong with values that have the right type."""
    problems = []
    problems.extend(_model_mistakes(recipe.model))
    if recipe.calibration.count < 1:
        problems.append(f"calibration.count: {recipe.calibration.count} is not a positive number of samples")
    if recipe.calibration.method not in METHODS:
        problems.append(f"calibration.method: {recipe.calibration.method!r} is not one of {', '.join(METHODS)}")
    if not 50 < recipe.calibration.percentile <= 100:
        problems.append(f"calibration.percentile: {recipe.calibration.percentile} is not above 50 and at most 100")
    if not 0 <= recipe.validation.max_drop <= 100:
        problems.append(f"validation.max_drop: {recipe.validation.max_drop} is not between 0 and 100 percentage points")
    if recipe.validation.policy not in POLICIES:
        problems.append(f"validation.policy: {recipe.validation.policy!r} is not one of {', '.join(POLICIES)}")
    problems.extend(_engine_mistakes(recipe.engine))
    recovery = recipe.quantization.recovery
    if recovery not in RECOVERIES:
        problems.append(f"quantization.recovery: {recovery!r} is not one of {', '.join(RECOVERIES)}")
    if not 0 <= recipe.quantization.budget_minutes <= MOST_MINUTES:
        minutes = recipe.quantization.budget_minutes
        problems.append(f"quantization.budget_minutes: {minutes} is not between 0 and {MOST_MINUTES} minutes")
    wanted = recipe.quantization.activation_range
    if wanted not in ACTIVATION_RANGES:
        ranges = ", ".join(ACTIVATION_RANGES)
        problems.append(f"quantization.activation_range: {wanted!r} is not one of {ranges}")
    elif wanted == "shifted" and (recipe.engine.target or "").startswith("dla"):
        problems.append("quantization.activation_range: a DLA takes symmetric ranges only; leave out, or say symmetric")
    if recipe.quantization.grouped not in GROUPED:
        given = recipe.quantization.grouped
        problems.append(f"quantization.grouped: {given!r} is not one of {', '.join(GROUPED)}")
    if recipe.quantization.weight_range not in WEIGHT_RANGES:
        given = recipe.quantization.weight_range
        problems.append(f"quantization.weight_range: {given!r} is not one of {', '.join(WEIGHT_RANGES)}")
    return problems


def _engine_mistakes(engine: EngineSection) -> List[str]:
    problems = []
    if engine.backend not in BACKENDS:
        problems.append(f"engine.backend: {engine.backend!r} is not one of {', '.join(BACKENDS)}")
    if engine.target is not None and engine.target not in TARGETS:
        problems.append(f"engine.target: {engine.target!r} is not one of {', '.join(TARGETS)}")
    if not 1 <= engine.batch[0] <= engine.batch[1] <= engine.batch[2]:
        problems.append(f"engine.batch: {list(engine.batch)} is not [min, opt, max] with 1 <= min <= opt <= max")
    if engine.batch[2] > LARGEST_BATCH:
        problems.append(f"engine.batch: {engine.batch[2]} is more than TensorRT can count ({LARGEST_BATCH})")
    if engine.workspace_mib is not None and not 1 <= engine.workspace_mib <= LARGEST_WORKSPACE:
        problems.append(
            f"engine.workspace_mib: {engine.workspace_mib} is not a number of MiB from 1 to {LARGEST_WORKSPACE}"
        )
    if engine.optimization_level is not None and not 0 <= engine.optimization_level <= 5:
        problems.append(f"engine.optimization_level: {engine.optimization_level} is not between 0 and 5")
    if not 0 < engine.timeout_minutes <= MOST_MINUTES:
        problems.append(f"engine.timeout_minutes: {engine.timeout_minutes} is not above 0 and at most {MOST_MINUTES}")
    if engine.input not in ENGINE_INPUTS:
        problems.append(f"engine.input: {engine.input!r} is not one of {', '.join(ENGINE_INPUTS)}")
    elif engine.input == "uint8" and (engine.target or "").startswith("dla"):
        problems.append("engine.input: an engine for a DLA takes float32; leave out, or say float32")
    return problems


def _model_mistakes(model: ModelSection) -> List[str]:
    problems = []
    onnx = model.onnx is not None
    if not model.source:
        problems.append("model.source: is missing. Name a model: see `edgeres models`")
    elif not onnx and ":" not in model.source and model.source not in ARCHITECTURES:
        near = difflib.get_close_matches(model.source, list(ARCHITECTURES), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `edgeres models`"
        others = "or give package.module:callable or a .onnx file"
        problems.append(f"model.source: there is no model {model.source!r} ({hint}; {others})")
    if onnx and model.weights:
        problems.append("model.weights: an .onnx file has its weights inside; leave weights out")
    if model.num_classes is not None and not 1 <= model.num_classes <= MOST_CLASSES:
        problems.append(f"model.num_classes: {model.num_classes} is not a number of classes from 1 to {MOST_CLASSES:,}")
    if model.seed < 0:
        problems.append(f"model.seed: {model.seed} is negative")
    return problems


def _filled(recipe: Recipe) -> Recipe:
    """Return the recipe with the model's own defaults in the place of what was left open."""
    architecture, model, frame = recipe.architecture, recipe.model, recipe.input
    size, resize, pad = frame.size, frame.resize, frame.pad
    boxed = frame.fit == "letterbox"  # which needs no resize, and a colour
    if architecture is not None:
        if model.num_classes is None:
            model = msgspec.structs.replace(model, num_classes=architecture.num_classes)
        if size is None:
            size = (architecture.size, architecture.size)
            resize = resize if resize is not None or boxed else architecture.resize
    elif size is None and model.onnx is None:
        size = (IMAGENET_SIZE, IMAGENET_SIZE)
        resize = resize if resize is not None or boxed else IMAGENET_RESIZE
    if size is not None and resize is None and not boxed:
        resize = max(size)
    if boxed and pad is None:
        pad = PAD
    frame = msgspec.structs.replace(frame, size=size, resize=resize, pad=pad)
    return msgspec.structs.replace(recipe, name=recipe.name or _name(model.source), model=model, input=frame)


def _name(source: str) -> str:
    """Return a folder name for a model: its architecture, its callable, or its file's stem."""
    stem = Path(source).stem if source.lower().endswith(".onnx") else source.rpartition(":")[2]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).strip(".") or "model"


def recipe_data(recipe: Recipe) -> Dict[str, Any]:
    """Return a recipe as TOML's types: what is None is left out."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return value

    data: Dict[str, Any] = without_none(to_data(recipe))
    return data
