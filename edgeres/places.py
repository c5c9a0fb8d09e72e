"""Where a recipe's paths lead, and the dossier of data that comes with edgeres."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional, Union

from edgeres.errors import RecipeError
from edgeres.files import is_url

DOSSIER_PREFIX = "edgeres:"
STRAYS = f"leads out of the data that comes with edgeres. Name its own place, without {DOSSIER_PREFIX} in front"


def dossier() -> Path:
    """Return the folder of the data that comes with edgeres: in a wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "dossier"
    return installed if installed.is_dir() else package.parent / "calibration"


def strays(path: str) -> bool:
    """Whether a path is said to be in the dossier and leads out of it."""
    inside = os.path.normpath(path[len(DOSSIER_PREFIX) :])
    return path.startswith(DOSSIER_PREFIX) and (os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir)


def locate(path: str, base: Optional[Path] = None) -> Path:
    """Return the real place of a recipe's path; ``base`` is what relative paths are relative to.

    Raises:
        RecipeError: it is said to be in the dossier and leads out of it.
    """
    if strays(path):
        raise RecipeError(path, [STRAYS])
    if path.startswith(DOSSIER_PREFIX):
        return dossier() / path[len(DOSSIER_PREFIX) :]
    # A ~name that is nobody's is left as it is: a file may be called so, and if not, it is reported as missing.
    return (base or Path.cwd()) / os.path.expanduser(path)


def place_of(source: str) -> Union[str, Path]:
    """Return where a recipe's samples are: the URL of a store, or a real place as :func:`locate` has it."""
    return source if is_url(source) else locate(source)


def absolute(path: str, base: Path) -> str:
    return path if not path or path.startswith(DOSSIER_PREFIX) or is_url(path) else str(locate(path, base).absolute())
