"""The errors: one tree, drawn as it is, and messages that list every problem."""

from __future__ import annotations

import inspect
import pickle
import re
from typing import Dict, List, Type

import pytest

import edgeres
from edgeres import errors
from edgeres.errors import MOST_TOLD, EdgeresError, few, numbered

CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__ and issubclass(kind, BaseException)
}
LISTING = (errors.RecipeError, errors.CheckpointError, errors.LintError)


def drawn() -> Dict[str, str]:
    """Return each class that the docstring's tree names, and its parent there."""
    parents: Dict[str, str] = {}
    branch: List[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)([A-Z]\w+Error)  ", line)
        if found:
            depth = len(found.group(1)) // 4
            branch[depth:] = [found.group(2)]
            parents[found.group(2)] = branch[depth - 1] if depth else "Exception"
    return parents


def example(kind: Type[EdgeresError]) -> EdgeresError:
    if issubclass(kind, LISTING):
        return kind("net.toml", ["one is wrong", "two is wrong"])
    return kind("what is wrong")


def test_the_tree_is_drawn_as_it_is() -> None:
    assert drawn() == {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()}


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_every_error_is_one_of_ours(kind: Type[EdgeresError]) -> None:
    assert issubclass(kind, edgeres.EdgeresError)
    assert kind.__doc__


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_an_error_comes_back_from_another_process(kind: Type[EdgeresError]) -> None:
    """Process pools and clusters pickle what a worker raises."""
    before = example(kind)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert str(after) == str(before)
    assert vars(after) == vars(before)


def test_a_single_problem_is_one_line() -> None:
    assert numbered("net.toml", ["size: is missing"]) == "net.toml: size: is missing"


def test_several_problems_are_counted_and_listed_in_order() -> None:
    message = numbered("net.toml", ["b is wrong", "a is wrong"])
    assert message.splitlines() == ["net.toml: 2 problems", "  - b is wrong", "  - a is wrong"]


@pytest.mark.parametrize("kind", LISTING)
def test_problems_are_kept_and_shown(kind: Type[errors.RecipeError]) -> None:
    error = kind("net.toml", iter(["one", "two"]))
    assert error.where == "net.toml"
    assert error.problems == ["one", "two"]
    assert str(error) == numbered("net.toml", ["one", "two"])


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    message = str(errors.MissingPackageError.for_extra("onnx", "building a bundle", "host"))
    assert "onnx" in message
    assert "building a bundle" in message
    assert "pip install 'edgeres[host]'" in message


def test_a_long_list_is_cut_and_says_by_how_much() -> None:
    lines = numbered("net.pth", [f"problem {i}" for i in range(MOST_TOLD + 7)]).splitlines()
    assert lines[0] == f"net.pth: {MOST_TOLD + 7} problems"
    assert lines[-1] == "  … and 7 more"
    assert len(lines) == MOST_TOLD + 2
    assert (few(["a", "b"]), few(["a", "b", "c", "d"])) == ("a, b", "a, b, c and 1 more")


def test_a_line_break_in_a_strangers_name_makes_no_line() -> None:
    assert numbered("a\nplace", ["x\nPASS: good"]) == "a\\nplace: x\\nPASS: good"
    assert numbered("here", ["x\ny", "z"]).splitlines() == ["here: 2 problems", "  - x\\ny", "  - z"]
    assert few(["a\n::error::b", "c"]) == "a\\n::error::b, c"
