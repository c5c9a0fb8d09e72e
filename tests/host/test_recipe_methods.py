"""The recipe names the range methods without entering the room that has them; the two lists are one."""

from __future__ import annotations

from edgeres import calibrate, recipe


def test_the_recipe_knows_every_range_method() -> None:
    assert (calibrate.AUTO, *calibrate.METHODS) == recipe.METHODS
