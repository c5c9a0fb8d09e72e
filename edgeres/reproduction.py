"""Whether a bundle can be built again: the same recipe, data and tools are to make the same files, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from edgeres.artifacts import Manifest
from edgeres.bundle import verify
from edgeres.errors import BundleError
from edgeres.files import ENGINES, ERRORS, PAGE, RECIPE
from edgeres.pipeline import build
from edgeres.progress import Progress
from edgeres.recipe import Recipe

NOT_COMPARED = (RECIPE, PAGE, ERRORS, ENGINES)
"""What tells of places and of the machine; what is added up in torch's threads, in an order that their number changes;
and what a builder made that chooses by time."""


class Reproduction(NamedTuple):
    """``files`` says of each compared file whether it is the ``same``, ``different``, ``missing`` in the new build or
    ``new`` there; ``recipe`` and ``tools`` have what was said and what was used, where these differ."""

    files: Dict[str, str]
    recipe: Dict[str, Tuple[Any, Any]]
    tools: Dict[str, Tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """Whether all that is compared came out alike."""
        return all(word == "same" for word in self.files.values())


def reproduce(bundle: Path, recipe: Recipe, progress: Optional[Progress] = None) -> Reproduction:
    """Build a recipe anew beside a bundle, compare, and remove what was built; the bundle itself is only read.

    It is built in ``.NAME.check``, where an interrupted check goes on.

    Raises:
        EdgeresError: the bundle is damaged, or the recipe cannot be built.
    """
    before = verify(bundle)
    place = Path(bundle).absolute()
    aside = place.parent / f".{place.name}.check"
    if aside.is_symlink():
        raise BundleError(f"{aside} is a link, where this check would work. Remove it.")
    try:
        build(recipe, aside / place.name, progress=progress)
        after = verify(aside / place.name)
    except BaseException:
        _tidy(aside)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return Reproduction(
        files=_files(before, after),
        recipe=_differing(_flat(before.recipe), _flat(after.recipe)),
        tools=_differing(_flat(before.provenance), _flat(after.provenance), ("tools.", "python", "host.")),
    )


def _tidy(aside: Path) -> None:
    """Remove the folder of a check unless another one works there, or something is to be gone on from."""
    if not any(path.name.endswith(".work") for path in aside.glob(".*")):
        shutil.rmtree(aside, ignore_errors=True)


def _files(before: Manifest, after: Manifest) -> Dict[str, str]:
    one, other = ({ref.path: ref.sha256 for ref in manifest.files} for manifest in (before, after))
    paths = sorted(path for path in one.keys() | other.keys() if not path.startswith(NOT_COMPARED))
    return {path: _word(one.get(path), other.get(path)) for path in paths}


def _word(before: Optional[str], after: Optional[str]) -> str:
    if before is None:
        return "new"
    if after is None:
        return "missing"
    return "same" if before == after else "different"


def _flat(data: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Return nested tables as one, with dotted names."""
    flat: Dict[str, Any] = {}
    for name, value in data.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def _differing(
    before: Dict[str, Any], after: Dict[str, Any], beginnings: Tuple[str, ...] = ("",)
) -> Dict[str, Tuple[Any, Any]]:
    names = sorted(name for name in before.keys() | after.keys() if name.startswith(beginnings))
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def rows(found: Reproduction) -> List[List[str]]:
    """Return what differs as rows of a table: what, then, and now."""
    files = [[path, "", word] for path, word in found.files.items()]
    differences = [*found.recipe.items(), *found.tools.items()]
    return [*files, *([name, _shown(was), _shown(now)] for name, (was, now) in differences)]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
