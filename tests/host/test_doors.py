"""Bad files at every door of edgeres: refused in words, in seconds, in little memory; nothing is run, nothing lost.

`scripts/fuzz.py` tries many more, for as long as it is told to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from doors import Door
from host_doors import all_doors
from hostile import BASE, CODE, Hostile, host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import COMMANDS, old_bundle, refusals, tree
from sandbox import ACCEPTED, CRASH, GOOD, HANG, MEMORY, REFUSED, TRACEBACK, Outcome, attempt, attempts, outcome_of
from trial import Trial, Try, changed, table

from edgeres.errors import SampleError

NAMES = (
    *("packed bundle", "recipe", "manifest", "calibration table", "errors of layers", "report, baseline", "benchmark"),
    *("names in a page, JUnit and GitHub", "list of samples", "timing cache", "npy", "npz", "tar", "reference logits"),
    *("scalings", "image png", "image jpg", "image gif", "image bmp", "onnx", "onnx on a robot", "checkpoint (zip)"),
    *("checkpoint (pickle)", "safetensors", "statistics"),
)
HOSTILE = (*BASE, *host())


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Door]:
    return all_doors(tmp_path_factory.mktemp("doors"))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Door, list[Try]], Trial]:
    """Return ``trial(name, door, tries)``: what comes of files at a door, each in a child."""

    def run(name: str, door: Door, tries: list[Try]) -> Trial:
        found = Trial(tmp_path_factory.mktemp("kept"))
        found.attempt(name, door, tries)
        return found

    return run


def test_every_door_is_tried(doors: dict[str, Door]) -> None:
    assert {*NAMES, "folder"} == doors.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_files_to_be_changed_are_good_ones(name: str, doors: dict[str, Door], tmp_path: Path) -> None:
    door = doors[name]
    for number, seed in enumerate(door.seeds):
        path = tmp_path / f"{number}/x{door.suffix}"
        path.parent.mkdir()
        path.write_bytes(seed)
        door.enter(path)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1))
def test_changed_files_are_refused_in_words_or_read(
    name: str, seed: int, doors: dict[str, Door], tmp_path_factory: pytest.TempPathFactory
) -> None:
    door = doors[name]
    kind, content = changed(door, door.seeds, Random(seed))
    path = tmp_path_factory.mktemp("changed") / f"x{door.suffix}"
    path.write_bytes(content)
    outcome = outcome_of(lambda: door.enter(path))
    assert outcome.end in GOOD, f"{kind}: {outcome.words}"
    assert not list(path.parent.rglob("owned")), f"{kind}: its orders were obeyed"


@pytest.mark.parametrize("one", HOSTILE, ids=[f"{one.door}-{number}" for number, one in enumerate(HOSTILE)])
def test_files_that_fill_the_memory_never_end_or_give_orders_are_refused(
    one: Hostile, doors: dict[str, Door], trial: Callable[[str, Door, list[Try]], Trial]
) -> None:
    found = trial(one.door, doors[one.door], [Try(one.kind, one.write)])
    counts = found.by_door[one.door]
    assert not found.bad, counts
    assert counts[REFUSED] or one.kind == CODE  # names and texts may be read, as what they are


@pytest.mark.parametrize(("command", "endings"), COMMANDS)
def test_the_command_line_refuses_bad_files_and_loses_nothing(
    command: str, endings: tuple[str, ...], tmp_path: Path
) -> None:
    old = old_bundle(tmp_path / "old")
    before = tree(old)
    tries = [one for one in refusals(old) if one.command == command]
    outcomes = attempts([lambda one=one: one.run(tmp_path) for one in tries])
    assert {one.ending for one in tries} == set(endings)
    for one, outcome in zip(tries, outcomes, strict=True):
        assert outcome.end == REFUSED, f"{one.ending}, {one.kind}: {outcome.words}"
    assert tree(old) == before


def crash() -> None:
    import ctypes

    ctypes.string_at(1)


def bug() -> None:
    raise KeyError("x")


def test_a_bad_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.SECONDS", 2.0)

    def forever() -> None:
        while True:
            pass

    ends = [outcome.end for outcome in attempts([bug, lambda: None, crash, lambda: bytes(1 << 40), forever, bug])]
    assert ends == [TRACEBACK, ACCEPTED, CRASH, MEMORY, HANG, TRACEBACK]
    assert attempt(crash) == Outcome(CRASH, "signal 11")


def test_an_order_that_is_obeyed_is_seen(trial: Callable[[str, Door, list[Try]], Trial]) -> None:
    door = Door(".txt", (), lambda path: Path("owned").touch(), {})
    found = trial("a door", door, [Try("an order", Path.touch)])
    assert (found.bad, found.by_door["a door"]["executions"]) == (1, 1)


def test_much_memory_is_seen_whatever_came_of_it() -> None:
    def much() -> None:
        bytearray(b"x") * (5 << 28)

    def refused_late() -> None:
        much()
        raise SampleError("too large")

    ends = [outcome.end for outcome in attempts([lambda: None, much, lambda: None, refused_late, lambda: None])]
    assert ends == [ACCEPTED, MEMORY, ACCEPTED, MEMORY, ACCEPTED]


def test_what_was_never_looked_for_is_no_zero(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.record("npz", "bytes", Outcome(REFUSED), {"executions": 0})
    trial.record("command line", "bytes", Outcome(REFUSED), {"losses": 0})
    cells = [row.strip("| ").split(" | ") for row in table("door", trial.by_door).splitlines()]
    rows = {row[0]: row[-2:] for row in cells}
    assert rows["npz"] == ["0", "–"]
    assert rows["command line"] == ["–", "0"]
    assert rows["all"] == ["0", "0"]


def test_a_file_that_one_change_leaves_alone_gets_another() -> None:
    def fails(content: bytes, random: Random) -> bytes:
        raise ValueError

    idle = {"fails": fails, "same": lambda content, random: content}
    door = Door(".txt", (b"abc",), lambda path: None, {**idle, "longer": lambda content, random: content + b"d"})
    for seed in range(20):
        kind, content = changed(door, door.seeds, Random(seed))
        assert kind == "longer"
        assert content.startswith(b"abcd")
    assert changed(Door(".txt", (b"abc",), lambda path: None, idle), [b"abc"], Random(0)) == ("as it was", b"abc")
