"""A recipe as TOML, for the bundle: ``edgeres build recipe.toml`` repeats the build."""

from __future__ import annotations

import tomli_w

from edgeres.recipe import Recipe, recipe_data


def recipe_toml(recipe: Recipe) -> bytes:
    """Return the resolved recipe as UTF-8 TOML."""
    return tomli_w.dumps(recipe_data(recipe)).encode("utf-8")
