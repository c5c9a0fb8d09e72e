"""What a project begins with: a calibration dossier with a recipe to edit, and a workflow that builds and gates."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Dict, List

import edgeres
from edgeres.errors import BundleError, RecipeError
from edgeres.files import write_atomic
from edgeres.recipe import dossier

DOSSIER = {"recipe.toml": "calibration/recipe.toml", "README.md": "calibration/README.md"}
WORKFLOWS: Dict[str, Dict[str, str]] = {
    "github": {"github.yml": ".github/workflows/edgeres.yml"},
    "gitlab": {"gitlab.yml": ".gitlab-ci.yml"},
    "none": {},
}


def begin(folder: Path, ci: str) -> List[Path]:
    """Write a starter into a folder, which may hold other files, and return the files written.

    Args:
        ci: one of ``WORKFLOWS``.

    Raises:
        RecipeError: files of these names are there already; none of them is touched, and nothing is written.
        BundleError: they cannot be written; what was written is taken back.
    """
    wanted = {folder / place: name for name, place in {**DOSSIER, **WORKFLOWS[ci]}.items()}
    there = [path for path in wanted if os.path.lexists(str(path))]
    if there:
        raise RecipeError(
            "nothing was written, for nothing is overwritten. Name another folder and copy what you need from there",
            [f"{path} exists already" for path in there],
        )
    written: List[Path] = []
    try:
        for path, name in wanted.items():
            text = (dossier() / "starter" / name).read_text(encoding="utf-8")
            write_atomic(path, text.replace("@VERSION@", edgeres.__version__).encode())
            written.append(path)
    except BundleError:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return written
