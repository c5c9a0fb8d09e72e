"""The ladder of the accuracy budget as such: order, end, time, interruptions; on nets whose loss is known."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeres import budget
from edgeres.artifacts import Climb, ExportedModel, FileRef, Imported, LayerCost, Report, from_data, to_data
from edgeres.budget import build_within
from edgeres.errors import QuantizationError
from edgeres.progress import Progress
from edgeres.recipe import load_recipe
from edgeres.samples import samples_from_arrays
from edgeres.workspace import Workspace, stage_key

EXPORTED = ExportedModel(FileRef("model.fp32.onnx", "0" * 64, 1), 17, "x", "y", (3, 8, 8), 10, {})
SAMPLES = samples_from_arrays(np.zeros((1000, 1, 1, 3), np.uint8), np.zeros(1000, np.int64))
SECONDS = 60.0  # that each net takes to be made


class Job:
    """What the ladder sees of a build: nets are files that say what they are, and lose what ``loss`` says.

    ``loss`` is by layer; with reconstruction, ``full`` times as much is lost.
    """

    def __init__(self, workspace: Workspace, loss: Mapping[str, float], **wanted: Any) -> None:
        self.full = wanted.pop("full", 1.0)
        self.recipe = load_recipe(None, {f"quantization.{name}": value for name, value in wanted.items()})
        self.workspace, self.loss = workspace, loss
        self.calibration = self.validation = SAMPLES
        self.judges = True
        self.level: int | None = None
        self.given_back: dict[str, str] = {}
        self.imported: Imported | None = None
        self.report: Report | None = None
        self.progress = Progress()
        self.warnings: list[str] = []
        self.made: list[tuple[int, frozenset[str]]] = []
        self.interrupt: Callable[[], None] = lambda: None

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def drop(self, level: int, given_back: Collection[str]) -> float:
        lost = sum(value for layer, value in self.loss.items() if layer not in given_back)
        return round(lost * (self.full if level == 2 else 1.0), 6)

    def make(self, exported: ExportedModel) -> None:
        level = 1 if self.level is None else self.level
        net = (level, frozenset(self.given_back))
        key = stage_key("quantize", {"level": level, "given_back": sorted(self.given_back)})
        if self.workspace.reuse("quantize", key) is None:
            self.interrupt()
            self.workspace.write("net", content(*net))
            self.workspace.finish("quantize", key, ("net",), SECONDS, {})
            self.made.append(net)
        drop = self.drop(*net)
        record = self.workspace.reuse("validate", key)
        if record is None:
            assert (self.workspace.folder / "net").read_bytes() == content(*net)  # judged is what is there
            report = Report(1000, 1 - drop / 100, 21.0, 0.5, "fail" if drop > 0.5 else "pass", "cpu", "int8",
                            policy="point", drop_pp=drop)  # fmt: skip
            self.workspace.write("report", repr(drop).encode())
            record = self.workspace.finish("validate", key, ("report",), 0.0, to_data(report))
        self.report = from_data(record.facts, Report, "validate")


def content(level: int, given_back: Collection[str]) -> bytes:
    return repr((level, sorted(given_back))).encode()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What is measured on the calibration samples, which show a tenth of the loss; and the clock."""

    def costs(
        job: Job, exported: ExportedModel, watch: Callable[[int, int], None]
    ) -> tuple[Any, tuple[LayerCost, ...]]:
        found = [
            LayerCost(x, (x,), 1, loss / 1000, 0.0, 9.5) for x, loss in job.loss.items() if x not in job.given_back
        ]

        def whole(nodes: Collection[str]) -> SimpleNamespace:
            return SimpleNamespace(expected=job.drop(1, {*job.given_back, *nodes}) / 1000)

        return lambda: SimpleNamespace(whole=whole), tuple(sorted(found, key=lambda one: -one.expected))

    facts = SimpleNamespace(follows=True, sqnr=20.0, now=0.0, reconstruction=(400, SECONDS))
    monkeypatch.setattr(budget.recovery, "level", lambda job: 1 if job.level is None else job.level)
    monkeypatch.setattr(budget.recovery, "done", lambda job: facts.follows and budget.recovery.level(job))
    monkeypatch.setattr(budget.recovery, "reconstruction", lambda job: facts.reconstruction)
    monkeypatch.setattr(budget.recovery, "follows", lambda job: facts.follows)
    monkeypatch.setattr(budget.recovery, "calibration_sqnr", lambda job: facts.sqnr)
    monkeypatch.setattr(budget.recovery, "costs", costs)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: facts.now))
    return facts


def climbed(job: Job) -> Climb | None:
    """Run the ladder, and check what holds for every climb."""
    build_within(job, EXPORTED)  # type: ignore[arg-type]
    record = job.workspace.records.get("budget")
    if record is None:
        assert job.report is not None
        assert job.report.verdict == "pass" or job.recipe.quantization.recovery not in ("auto", "full")
        return None
    climb = from_data(record.facts, Climb, "budget")
    taken = climb.rungs[climb.taken]
    nodes = {node for cost in climb.taken_layers for node in cost.nodes}
    assert (job.workspace.folder / "net").read_bytes() == content(taken.level, nodes)
    assert job.report is not None
    assert (job.report.drop_pp, job.report.verdict) == (taken.drop_pp, taken.verdict)
    for rung in climb.rungs:
        assert rung.drop_pp == job.drop(rung.level, rung.layers)
    assert taken.drop_pp == min(rung.drop_pp for rung in climb.rungs if rung.drop_pp is not None)
    assert bool(climb.ended) == (taken.verdict == "fail")
    assert climb.ended in "".join(job.warnings)
    assert any("on other" in text for text in job.warnings) == (not climb.ended and len(climb.rungs) > 1)
    if len(climb.rungs) > 1 and climb.rungs[0].level == 1:
        assert bool(climb.without_full) == (climb.rungs[1].rung != "full")
    for before, after in zip(climb.rungs, climb.rungs[1:], strict=False):
        assert set(before.layers) <= set(after.layers)
        assert after.bought_pp == pytest.approx(before.drop_pp - after.drop_pp)  # type: ignore[operator]
    assert len(climb.rungs[-1].layers) <= len(job.loss) / 2
    return climb


LOSSES = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.4, 0.8, 3.0, 20.0]), min_size=1, max_size=8).map(
    lambda values: {f"layer{i}": value for i, value in enumerate(values)}
)


@given(LOSSES, st.sampled_from([0.1, 0.4, 0.9, 1.0, 1.5]), st.sampled_from(["auto", "full", "fast"]))
@settings(max_examples=60)
def test_whatever_is_lost_the_best_validated_net_is_returned(loss: dict[str, float], full: float, level: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Workspace(Path(folder) / "bundle") as workspace:
        job = Job(workspace, loss, full=full, recovery=level)
        climb = climbed(job)
        if climb is not None and climb.rungs[climb.taken].layers and level == "auto":
            assert job.drop(climb.rungs[climb.taken].level, climb.rungs[climb.taken].layers[:-1]) > 0.5


def test_rungs_in_their_order(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 0.29, "b": 1.0, "c": 0.1, "d": 0.1, "e": 0.5, "f": 0.0})
        climb = climbed(job)
    assert climb is not None
    assert [(rung.rung, rung.level, rung.layers) for rung in climb.rungs] == [
        ("fast", 1, ()),
        ("full", 2, ()),
        ("give back", 1, ("b", "e")),  # reconstruction bought nothing, and is not done again
    ]
    assert [rung.bought_pp for rung in climb.rungs] == [None, 0.0, 1.5]
    assert [cost.layer for cost in climb.given_back] == ["b", "e"]
    assert "best of 3 nets" in job.warnings[0]
    assert "quantized alone, b costs 0.1 % of the answers (9.5 dB)" in job.given_back["b"]


def test_reconstruction_that_helps_is_done_for_the_rest_of_the_climb(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 1.2, "b": 0.4, "c": 0.4, "d": 0.0}, full=0.5)
        climb = climbed(job)
    assert climb is not None
    assert [(rung.level, rung.layers) for rung in climb.rungs] == [(1, ()), (2, ()), (2, ("a",))]


def test_reconstruction_alone_may_be_enough(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        climb = climbed(Job(workspace, {"a": 1.0, "b": 1.0}, full=0.1))
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["fast", "full"]
    assert climb.taken_layers == ()


def test_one_that_began_with_all_of_recovery_goes_on_with_layers(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 2.0, "b": 0.0}, recovery="full")
        job.level = 2
        climb = climbed(job)
    assert climb is not None
    assert [(rung.rung, rung.level) for rung in climb.rungs] == [("full", 2), ("give back", 2)]


@pytest.mark.parametrize(
    ("wanted", "loss"),
    [({"recovery": "fast"}, 9.0), ({"recovery": "none"}, 9.0), ({"budget_minutes": 0.0}, 9.0), ({}, 0.4)],
)
def test_no_ladder_where_none_is_wanted_or_needed(wanted: dict[str, Any], loss: float, tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": loss, "b": 0.0}, **wanted)
        build_within(job, EXPORTED)  # type: ignore[arg-type]
        assert "budget" not in workspace.records
        assert job.made == [(1, frozenset())]
        assert job.warnings == []


@pytest.mark.parametrize("verdict", ["inconclusive", "unlabelled"])
def test_only_a_failure_is_climbed_for(verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Job.make

    def undecided(job: Job, exported: ExportedModel) -> None:
        made(job, exported)
        job.report = Report(10, 0.9, 9.0, 0.5, verdict, "cpu", "int8", drop_pp=9.0)

    monkeypatch.setattr(Job, "make", undecided)
    with Workspace(tmp_path / "bundle") as workspace:
        build_within(Job(workspace, {"a": 9.0, "b": 0.0}), EXPORTED)  # type: ignore[arg-type]
        assert "budget" not in workspace.records


def test_a_files_own_ranges_are_not_recovered_but_said_to_lose(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 9.0, "b": 0.0})
        job.imported = Imported("NNCF", {}, {}, (), ())
        climb = climbed(job)
    assert climb is not None
    assert len(climb.rungs) == 1
    assert "Calibrate anew: --recovery fast" in climb.ended


def test_a_model_that_cannot_be_followed_is_said_to_be_one(known: Any, tmp_path: Path) -> None:
    known.follows = False
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 9.0, "b": 0.0})
        climb = climbed(job)
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["none"]
    assert "accuracy recovery is off" in job.warnings[0]


def test_samples_that_do_not_show_the_loss_cannot_say_whence_it_comes(known: Any, tmp_path: Path) -> None:
    known.sqnr = 45.0
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 9.0, "b": 0.0})
        climb = climbed(job)
    assert climb is not None
    assert len(climb.rungs) == 1
    assert "45.0 dB against 21.0 dB" in climb.ended


def test_a_rung_that_cannot_be_made_ends_it_and_the_best_one_stays(tmp_path: Path) -> None:
    def fail() -> None:
        if job.given_back:
            (job.workspace.folder / "net").write_bytes(b"half a net")
            raise QuantizationError("no such luck")

    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 1.0, "b": 0.0})
        job.interrupt = fail
        climb = climbed(job)
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["fast", "full"]
    assert "no such luck" in climb.ended


def test_where_reconstruction_fails_layers_are_given_back(known: Any, tmp_path: Path) -> None:
    def fail() -> None:
        if job.level == 2:
            known.now += 100.0
            raise QuantizationError("no such luck")

    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 1.0, "b": 0.0})
        job.interrupt = fail
        climb = climbed(job)
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["fast", "give back"]
    assert (climb.without_full, climb.ended) == ("failed", "")
    assert "no such luck" in job.warnings[0]


@pytest.mark.parametrize(
    ("word", "loss", "rounds", "minutes"), [("size", 1.0, 0, 10.0), ("loss", 2.1, 400, 10.0), ("time", 1.0, 400, 3.9)]
)
def test_reconstruction_is_left_out_where_it_cannot_help(
    word: str, loss: float, rounds: int, minutes: float, known: Any, tmp_path: Path
) -> None:
    known.reconstruction = (rounds, SECONDS if rounds else 0.0)
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": loss, "b": 0.0}, full=0.1, budget_minutes=minutes)
        climb = climbed(job)
    assert climb is not None
    assert [(rung.rung, rung.level) for rung in climb.rungs] == [("fast", 1), ("give back", 1)]
    assert climb.without_full == word
    assert f"no reconstruction ({word}), a given back: pass" in budget.budget_words(climb)


def test_reconstruction_that_there_is_no_more_time_for_is_not_done_again(known: Any, tmp_path: Path) -> None:
    def tick() -> None:
        known.now += 5 * SECONDS if job.level == 2 else SECONDS

    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 1.2, "b": 0.4, "c": 0.4, "d": 0.0}, full=0.5, budget_minutes=9.5)
        job.interrupt = tick
        climb = climbed(job)
    assert climb is not None
    assert [(rung.rung, rung.level) for rung in climb.rungs] == [("fast", 1), ("full", 2), ("give back", 1)]


def test_what_costs_almost_nothing_is_not_said_to_cost_nothing() -> None:
    assert "less than 0.01 % of" in budget.reasons([LayerCost("a", ("a",), 1, 0.0, 0.0, 60.0)])["a"]


@pytest.mark.parametrize(("minutes", "rungs"), [(0.5, 1), (1.5, 2), (2.5, 2)])
def test_the_time_box_ends_it_and_is_said_to(minutes: float, rungs: int, known: Any, tmp_path: Path) -> None:
    def tick() -> None:
        known.now += SECONDS

    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {f"layer{i}": 9.0 for i in range(9)}, budget_minutes=minutes)
        job.interrupt = tick
        climb = climbed(job)
    assert climb is not None
    assert len(climb.rungs) == rungs
    words = "hardly an int8 net" if minutes > 2 else f"its time box, {minutes:g} minutes, is too short"
    assert words in climb.ended


def test_time_that_ends_while_layers_are_looked_for_ends_it(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = budget.recovery.costs

    def slow(job: Job, exported: ExportedModel, watch: Callable[[int, int], None]) -> Any:
        known.now += 600.0
        watch(1, 2)
        return found(job, exported, watch)  # type: ignore[arg-type]

    monkeypatch.setattr(budget.recovery, "costs", slow)
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 9.0, "b": 0.0}, budget_minutes=10.0)
        climb = climbed(job)
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["fast"]
    assert "too short to find out which layers" in climb.ended


class Stop(BaseException):
    """The power goes."""


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_climb_goes_on_from_the_last_validated_rung(at: int, tmp_path: Path) -> None:
    loss = {"a": 0.9, "b": 0.5, "c": 0.3, "d": 0.2, "e": 0.0, "f": 0.0, "g": 0.0}

    def job_of(workspace: Workspace) -> Job:
        job = Job(workspace, loss, full=0.95)
        job.drop = lambda level, given: Job.drop(job, level, given) + (0.4 if len(given) == 2 else 0.0)  # type: ignore[method-assign]
        return job

    with Workspace(tmp_path / "whole") as workspace:
        whole = job_of(workspace)
        expected = climbed(whole)
    assert expected is not None
    made: list[tuple[int, frozenset[str]]] = []
    with pytest.raises(Stop) if at < len(whole.made) else pytest.MonkeyPatch.context(), \
            Workspace(tmp_path / "bundle") as workspace:  # fmt: skip
        job = job_of(workspace)

        def stop() -> None:
            if len(job.made) == at:
                raise Stop

        job.interrupt = stop
        try:
            climbed(job)
        finally:
            made.extend(job.made)
    with Workspace(tmp_path / "bundle") as workspace:
        job = job_of(workspace)
        again = climbed(job)
        assert (workspace.folder / "net").read_bytes() == (tmp_path / ".whole.work/bundle/net").read_bytes()
    assert made + job.made == whole.made  # none was made twice
    assert again is not None
    assert [to_data(rung) for rung in again.rungs] == [to_data(rung) for rung in expected.rungs]


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """The folder of a climb that was interrupted behind its second rung."""
    with contextlib.suppress(Stop), Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 1.0, "b": 0.0})

        def stop() -> None:
            if len(job.made) == 2:
                raise Stop

        job.interrupt = stop
        climbed(job)
    assert (tmp_path / ".bundle.work/.rungs/ladder.json").is_file()
    return tmp_path / "bundle"


def tampered(ladder: Any, climb: Any, rung: Any) -> dict[str, Callable[[], Any]]:
    """Ways to spoil what a climb left behind."""
    outside = "../../../../evil"
    return {
        "a name that is a path": lambda: ladder["records"]["1"].update({outside: ladder["records"]["1"]["quantize"]}),
        "a time that is endless": lambda: ladder["records"]["1"]["quantize"].update(seconds=-1e308),
        "a verdict that is not the report's": lambda: rung.update(verdict="pass"),
        "no such rung": lambda: climb.update(taken=7),
        "a rung from behind": lambda: climb.update(taken=-1),
        "no such level": lambda: rung.update(level=99),
        "no such reason": lambda: climb.update(without_full="junk"),
        "no such verdict": lambda: rung.update(verdict="junk"),
        "time that is given": lambda: rung.update(seconds=-1e308),
        "a failure without a loss": lambda: rung.update(drop_pp=None),
        "a layer that nobody gave back": lambda: rung.update(layers=["a"]),
        "a layer that no rung gave back": lambda: climb.update(
            given_back=[to_data(LayerCost("a", ("a",), 1, 0.1, 0.0, None))]
        ),
        "nothing": lambda: climb.update(rungs=[]),
    }


WAYS = tuple(tampered({}, {}, {}))


@pytest.mark.parametrize("way", WAYS)
def test_a_ladder_that_somebody_changed_begins_anew(way: str, broken_off: Path) -> None:
    path = broken_off.parent / ".bundle.work/.rungs/ladder.json"
    ladder = json.loads(path.read_text())
    tampered(ladder, ladder["climb"], ladder["climb"]["rungs"][-1])[way]()
    path.write_text(json.dumps(ladder))
    with Workspace(broken_off) as workspace:
        job = Job(workspace, {"a": 1.0, "b": 0.0})
        climb = climbed(job)
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["fast", "full", "give back"]
    assert (2, frozenset()) in job.made  # it was not gone on from there
    assert not list(broken_off.parent.parent.rglob("evil*"))


@pytest.mark.parametrize("way", WAYS[3:])
def test_a_climb_that_somebody_changed_is_climbed_again(way: str, tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        first = climbed(Job(workspace, {"a": 1.0, "b": 0.0}))
        record = workspace.records["budget"]
        facts = json.loads(json.dumps(record.facts))
        tampered({}, facts, facts["rungs"][0])[way]()
        workspace.finish("budget", record.key, (), 0.0, facts)
    assert first is not None
    with Workspace(tmp_path / "bundle") as workspace:
        again = climbed(Job(workspace, {"a": 1.0, "b": 0.0}))
    assert again is not None
    assert [to_data(rung) for rung in again.rungs] == [to_data(rung) for rung in first.rungs]


def test_a_damaged_rung_is_made_again(broken_off: Path) -> None:
    (broken_off.parent / ".bundle.work/.rungs/1/net").write_bytes(b"damaged")
    with Workspace(broken_off) as workspace:
        climb = climbed(Job(workspace, {"a": 1.0, "b": 0.0}))
    assert climb is not None
    assert [rung.rung for rung in climb.rungs] == ["fast", "full", "give back"]


def test_another_recipe_is_another_climb(broken_off: Path) -> None:
    with Workspace(broken_off) as workspace:
        job = Job(workspace, {"a": 1.0, "b": 0.0}, keep_float=["fc"])
        climbed(job)
        assert (2, frozenset()) in job.made


def test_more_time_is_no_other_climb(broken_off: Path) -> None:
    with Workspace(broken_off) as workspace:
        job = Job(workspace, {"a": 1.0, "b": 0.0}, budget_minutes=20.0)
        climbed(job)
        assert job.made == [(1, frozenset({"a"}))]


def test_a_climb_that_is_over_is_taken_over_whole(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        first = climbed(Job(workspace, {"a": 9.0, "b": 0.0}))
    with Workspace(tmp_path / "bundle") as workspace:
        job = Job(workspace, {"a": 9.0, "b": 0.0})
        assert climbed(job) == first
        assert job.made == []
    with Workspace(tmp_path / "bundle") as workspace:  # where only the model is wanted, it is the same one
        job = Job(workspace, {"a": 9.0, "b": 0.0})
        job.judges = False
        climbed(job)
        assert job.made == []
