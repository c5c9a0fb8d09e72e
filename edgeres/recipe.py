"""The recipe: what the user wants, from TOML and flags, with every mistake reported at once.

A TOML file has the sections (:mod:`edgeres.sections`) as tables; a flag is an override with a dotted name, such as
``{"calibration.method": "entropy"}``. Paths are relative to the file that names them (for flags, to the current
folder); ``edgeres:`` in front of a path means the dossier that comes with edgeres.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

import msgspec

from edgeres import OPTIONS
from edgeres.artifacts import to_data
from edgeres.errors import RecipeError
from edgeres.files import read_bounded
from edgeres.mistakes import engine_mistakes, mistakes
from edgeres.places import DOSSIER_PREFIX, absolute, dossier, locate, place_of
from edgeres.preprocess import PAD
from edgeres.sections import BACKENDS, METHODS, PRECISIONS, SECTIONS, TARGETS, EngineSection, Recipe, ValidationSection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "BACKENDS",
    "DEFAULT_RECIPE",
    "FLAGS",
    "METHODS",
    "PRECISIONS",
    "SECTIONS",
    "TABLE",
    "TARGETS",
    "EngineSection",
    "Raw",
    "Recipe",
    "ValidationSection",
    "decode",
    "dossier",
    "engine_section",
    "load_recipe",
    "locate",
    "place_of",
    "read_raw",
    "read_section",
    "recipe_data",
]

LARGEST_RECIPE = 1 << 16  # bytes: a recipe is a page of text
MOST_DOTS = 1_000  # in a line: Python's reader takes gigabytes for a key of 30,000 parts
TABLE = "targets"
ONE_ALONE = (
    "this recipe is of several bundles, and one is wanted here. Build them all: edgeres build RECIPE, in Python "
    "edgeres.build_matrix; or name one of the bundles"
)
DEFAULT_RECIPE = DOSSIER_PREFIX + "recipes/digits-int8.toml"
IMAGENET_SIZE, IMAGENET_RESIZE = 224, 256


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
        values["timing_cache"] = absolute(values["timing_cache"], Path.cwd())
    problems: List[str] = []
    section = read_section("engine", EngineSection, values, problems)
    if isinstance(section, EngineSection):
        problems.extend(engine_mistakes(section))
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
            values[key] = absolute(values[key], base)
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("source"), str) and model["source"].lower().endswith(".onnx"):
        model["source"] = absolute(model["source"], base)


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
    problems.extend(problem for problem in mistakes(recipe) if not _known(problem, problems))
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
