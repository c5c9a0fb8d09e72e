"""The rows of a matrix: ``[[targets]]`` of a recipe, each of which makes it the recipe of a bundle of its own.

::

    [[targets]]
    target = "cpu"                 # build/<name>-int8-cpu

    [[targets]]
    name = "robot"                 # build/<name>-robot
    precision = "fp16"
    target = "gpu"

What a row says takes the place of what the recipe says; what none says is the same for all.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import msgspec

from edgeres.errors import RecipeError, few
from edgeres.recipe import FLAGS, TABLE, Recipe, decode, read_raw, read_section

MOST = 100  # rows


class RowSection(msgspec.Struct, frozen=True):
    """``name`` ends the name of the row's bundle, by default ``<precision>-<target>``; all else is the recipe's."""

    name: Optional[str] = None
    precision: Optional[str] = None
    target: Optional[str] = None
    activation_range: Optional[str] = None
    method: Optional[str] = None
    max_drop: Optional[float] = None


KEYS = {
    "precision": "precision",
    "target": "engine.target",
    "activation_range": "quantization.activation_range",
    "method": "calibration.method",
    "max_drop": "validation.max_drop",
}
"""What a row may say, and the recipe's key whose place it takes."""


class Planned(NamedTuple):
    """A row to be built: what it is called among the others, and its recipe, whole."""

    name: str
    recipe: Recipe

    def place(self, out: Optional[Path]) -> Path:
        """Return the folder of the row's bundle, in ``out`` or else in ``build``."""
        return (Path("build") if out is None else out) / f"{self.recipe.name}-{self.name}"


def load_rows(
    source: Union[str, Path, None] = None, overrides: Optional[Mapping[str, Any]] = None
) -> Optional[Tuple[Planned, ...]]:
    """Return the rows of a recipe; None where it has no ``[[targets]]``, and is the recipe of one bundle.

    Args: as of :func:`edgeres.recipe.load_recipe`. An override of what rows say themselves is a mistake.

    Raises:
        RecipeError: with every mistake found, those that all rows share once.
    """
    raw = read_raw(source, overrides)
    if TABLE not in raw.data:
        return None
    tables = raw.data.pop(TABLE)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise RecipeError(raw.where, [f"{TABLE}: is a list of tables, one for each bundle: [[{TABLE}]]"])
    if len(tables) > MOST:
        raise RecipeError(raw.where, [f"{TABLE}: {len(tables)} are more than {MOST}"])
    problems: List[str] = []
    rows = [read_section(_label(number), RowSection, table, problems) for number, table in enumerate(tables)]
    own = [{KEYS[field]: field for field in KEYS if getattr(row, field) is not None} for row in rows]
    contradicted = _contradicted(own, raw.overrides)
    problems.extend(contradicted)
    found = [_decoded(raw.data, row, keys) for row, keys in zip(rows, own)]
    problems.extend(_told([texts for _, texts in found], own))
    planned = [Planned(_name(row, recipe), recipe) for row, (recipe, _) in zip(rows, found) if recipe is not None]
    if len(planned) == len(rows) and not contradicted:
        problems.extend(_misnamed(planned))
    if problems:
        raise raw.error(problems)
    return tuple(planned)


def _label(number: int) -> str:
    return f"{TABLE}[{number + 1}]"


def _name(row: RowSection, recipe: Recipe) -> str:
    if row.name is not None:
        return row.name
    return recipe.precision if row.target is None else f"{recipe.precision}-{row.target}"


def _decoded(data: Dict[str, Any], row: RowSection, own: Mapping[str, str]) -> Tuple[Optional[Recipe], List[str]]:
    """Return the recipe of a row, and what is wrong with it."""
    values = {key: getattr(row, field) for key, field in own.items()}
    if row.target is not None:
        values["engine.backend"] = "auto"  # which follows from the target
    merged = copy.deepcopy(data)
    problems: List[str] = []
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        table = merged.setdefault(section, {}) if section else merged
        if isinstance(table, dict):  # what is no table stays, to be reported
            table[name] = value
    return decode(merged, problems), problems


def _told(texts: Sequence[Sequence[str]], own: Sequence[Mapping[str, str]]) -> List[str]:
    """Return what is wrong with each row's recipe: what every row has is said once, and all else of the row that has it
    or says it."""
    problems: List[str] = []
    for number, (found, keys) in enumerate(zip(texts, own)):
        for text in found:
            key, _, what = text.partition(":")
            if key in keys:
                problems.append(f"{_label(number)}.{keys[key]}:{what}")
            elif all(text in others for others in texts):
                problems.append(text)
            else:
                problems.append(f"{_label(number)}: {text}")
    return list(dict.fromkeys(problems))


def _contradicted(own: Sequence[Mapping[str, str]], overrides: Mapping[str, Any]) -> List[str]:
    """Return flags that contradict what rows say themselves."""
    problems = []
    for key in overrides:
        also = "engine.target" if key == "engine.backend" else key
        rows = [_label(number) for number, keys in enumerate(own) if also in keys]
        if rows:
            what = also.rpartition(".")[2]
            problems.append(f"{FLAGS[key]}: {few(rows)} say their own {what}. Leave the flag out, or theirs")
    return problems


def _misnamed(planned: Sequence[Planned]) -> List[str]:
    """Return names of rows that are no folders' names, or another row's."""
    problems: List[str] = []
    first: Dict[str, int] = {}
    for number, row in enumerate(planned):
        name = row.name
        if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
            problems.append(f"{_label(number)}.name: {name!r} is not a plain folder name")
        earlier = first.setdefault(name.lower(), number)
        if earlier != number:
            problems.append(f"{_label(number)} is called {name}, as {_label(earlier)} is. Give it another: name = ...")
    return problems
