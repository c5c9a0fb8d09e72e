"""Whether a bundle can be built again: the same recipe, data and tools are to make the same files."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from edgeres.artifacts import Manifest
from edgeres.bundle import verify
from edgeres.errors import BundleError
from edgeres.files import ENGINES, ERRORS, MEANING, PAGE, RECIPE, REPORT
from edgeres.matrix import terms_of
from edgeres.pipeline import build
from edgeres.progress import Progress
from edgeres.recipe import Recipe
from edgeres.stages import STAGES

NOT_COMPARED = (RECIPE, PAGE, ERRORS, ENGINES)
"""What tells of places and of the machine; what is added up in torch's threads, in an order that their number changes;
and what a builder made that chooses by time."""
ENGINE_MADE = (MEANING, REPORT)
"""What an engine answered, and what is told of the engines: it is compared where these are the CPU's alone."""

MARK = ".edgeres-check"  # a file in a folder that a check works in, locked by whoever does; no other folder is removed
YOUNG = 60.0  # seconds in which one that was just made may not be locked yet


class Reproduction(NamedTuple):
    """``files`` says of each compared file whether it is the ``same``, ``different``, ``missing`` in the new build or
    ``new`` there, and ``not_compared`` names the others; ``recipe`` and ``tools`` have what was said and what was used,
    where these differ."""

    files: Dict[str, str]
    not_compared: List[str]
    recipe: Dict[str, Tuple[Any, Any]]
    tools: Dict[str, Tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """Whether all that is compared came out alike."""
        return all(word == "same" for word in self.files.values())


def reproduce(
    bundle: Path, recipe: Recipe, progress: Optional[Progress] = None, cluster: Optional[str] = None
) -> Reproduction:
    """Build a recipe anew beside a bundle, compare, and remove what was built; the bundle itself is only read.

    It is built as far as the bundle was, in a new folder that nobody else can write to: nothing that lies beside the
    bundle is taken over. Of what the recipe names, a callable is run, as in every build.

    Raises:
        EdgeresError: the bundle is damaged, the recipe cannot be built, or there is no place beside the bundle.
    """
    before = verify(bundle)
    place = Path(os.path.abspath(bundle))  # without any ..: beside it is not inside it
    prefix = f".{place.name}.check-"
    _remove_left(place.parent, prefix)
    until = max(before.stages.keys() & set(STAGES), key=STAGES.index, default=STAGES[-1])
    try:
        aside = tempfile.TemporaryDirectory(prefix=prefix, dir=place.parent)
    except OSError as problem:
        raise BundleError(
            f"cannot work beside {place}: {problem.strerror}. Copy the bundle to a folder that can be written."
        ) from None
    with aside, _locked(aside.name):
        again = Path(aside.name) / place.name
        build(recipe, again, until, progress, cluster, terms_of(bundle, recipe))
        after = verify(again)
    files, others = _files(before, after)
    return Reproduction(
        files=files,
        not_compared=others,
        recipe=_differing(_flat(before.recipe), _flat(after.recipe)),
        tools=_differing(_flat(before.provenance), _flat(after.provenance), ("tools.", "python", "host.")),
    )


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Mark a folder as a check's, and lock the mark for as long as this process works there, or lives."""
    descriptor = os.open(os.path.join(folder, MARK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # no locks on this file system: then nobody finds the mark unlocked either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove what checks that were killed have left: folders with a mark that nobody has locked any more."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink():
                continue
            descriptor = os.open(folder / MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor)
                if found.st_uid == os.geteuid() and time.time() - found.st_mtime > YOUNG:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _files(before: Manifest, after: Manifest) -> Tuple[Dict[str, str], List[str]]:
    """Return a word on each file that is compared, and the names of the others."""
    one, other = ({ref.path: ref.sha256 for ref in manifest.files} for manifest in (before, after))
    on_cpu = all(engine.backend == "cpu" for engine in (*before.engines, *after.engines))
    left_out = NOT_COMPARED if on_cpu else (*NOT_COMPARED, *ENGINE_MADE)
    paths = sorted(one.keys() | other.keys())
    words = {path: _word(one.get(path), other.get(path)) for path in paths if not path.startswith(left_out)}
    return words, [path for path in paths if path not in words]


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
    files += [[path, "", "not compared"] for path in found.not_compared]
    return [*files, *([name, _shown(was), _shown(now)] for name, (was, now) in differences)]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
