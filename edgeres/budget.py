"""The accuracy budget (``--max-drop``): where a build fails it, more is done, and then layers go back to float.

The rungs of the ladder, each made and validated whole: all of recovery, where that can be enough and a build began with
less; then the layers that hurt most in float, the fewest first. It ends at the first verdict that is not ``fail``, or
where nothing more can be done, or the time is up; the bundle then holds the best net of all. Which layers hurt is
measured on the calibration samples. But every rung is judged on the same validation samples, how many layers go back
follows from the drop there, and the first net that does not fail there is taken: its verdict is a little better than
what other samples would say. So a build that climbed says how many nets were judged, and asks for others.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Collection, Optional, Tuple

import msgspec

from edgeres import __version__, recovery, stages
from edgeres.artifacts import Climb, ExportedModel, LayerCost, Report, Rung, from_data, to_data
from edgeres.errors import BundleError, EdgeresError
from edgeres.provenance import versions
from edgeres.rungs import NAMES, RANKS, STAGES, Rungs, budget_words, reasons, rung_words, sound
from edgeres.validation import decibels
from edgeres.workspace import stage_key

if TYPE_CHECKING:
    from edgeres.pipeline import Build

LARGEST_SHARE = 0.5
"""Of the layers with weights may be given back: beyond, it is hardly an int8 net, and its user should know that."""
UNSEEN_DB = 10.0
"""So much cleaner, the calibration samples' logits do not show what the validation samples suffer from."""
LARGEST_LOSS = 4.0
"""Times the budget: so much lost, reconstruction is not tried, for weights do not make up for it."""
HELPS = 0.5
"""Of the loss must have been bought by reconstruction, to be done again where layers are given back too."""
FORMAT = 2


class _TimeIsUp(Exception):
    """The time box has ended while it was looked for layers to give back."""


def build_within(job: Build, exported: ExportedModel) -> None:
    """Quantize, compile and validate, and where the verdict is ``fail`` climb until the budget is kept or none can."""
    wanted = job.recipe.quantization
    climbs = wanted.recovery in ("auto", "full") and wanted.budget_minutes > 0
    if job.recipe.precision != "int8" or job.calibration is None or not climbs:
        job.make(exported)
        return
    key = _key(job, exported)
    whole = stage_key("budget", {"climb": key, "minutes": wanted.budget_minutes})
    climb = _earlier(job, whole)
    if climb is not None:
        _stand_on(job, climb, climb.taken)
        job.make(exported)
        if job.report is None or job.report.verdict == climb.rungs[climb.taken].verdict:
            job.progress.reused("budget", budget_words(climb))
            job.workspace.take_over("sensitivity", "budget")
            _warn(job, climb)
            return
        job.workspace.records.pop("budget")  # a GPU's engine is made anew each time, and this one is judged differently
        _stand_on(job, Climb((), 0), 0)
    ladder = _Ladder(job, exported, key)
    if ladder.begin():
        climb = ladder.climb()
        seconds = _spent(climb)
        job.workspace.finish("budget", whole, (), seconds, to_data(climb))
        job.progress.finished("budget", seconds, budget_words(climb))
        _warn(job, climb)


def _earlier(job: Build, key: str) -> Optional[Climb]:
    """Return the climb of an earlier build; None where there is none, or one that nobody can have climbed."""
    record = job.workspace.reuse("budget", key)
    if record is not None:
        with contextlib.suppress(BundleError):
            climb = from_data(record.facts, Climb, "stage budget")
            if sound(climb):
                return climb
        job.workspace.records.pop("budget")
    return None


class _Ladder:
    """One climb; as far as it came, it is in ``rungs``, which outlive an interruption."""

    def __init__(self, job: Build, exported: ExportedModel, key: str) -> None:
        self.job = job
        self.exported = exported
        self.rungs = Rungs(job.workspace, key)
        self.limit = 60 * job.recipe.quantization.budget_minutes
        self.standing = -1  # the rung whose files the workspace holds
        self.without_full = self.rungs.climb.without_full
        self.wasted = 0.0  # seconds, on a rung that could not be made

    def begin(self) -> bool:
        """Make the first rung, or go on with an earlier climb; return whether there is anything to climb for."""
        job, climb = self.job, self.rungs.climb
        if climb.rungs and job.judges:
            self._stand_on(len(climb.rungs) - 1)
            return True
        self.rungs.clear()
        job.make(self.exported)
        if not job.judges or job.report is None or job.report.verdict != "fail":
            return False
        level = recovery.level(job)
        self._add(_rung(NAMES[recovery.done(job)], level, (), job.report, self._made_in()), ())
        return True

    def climb(self) -> Climb:
        """Add rungs until the budget is kept or something ends it; return them, with the best one in the workspace."""
        ended = ""
        while not ended and self._best.verdict == "fail":
            try:
                ended = self._step()
            except _TimeIsUp:
                ended = self._too_short("to find out which layers to give back")
            except EdgeresError as problem:
                self.standing = -1
                ended = f"the next rung could not be made: {problem}"
        climb = self.rungs.climb
        if self.standing != climb.taken:
            self._stand_on(climb.taken)
        return msgspec.structs.replace(climb, ended=ended, without_full=self.without_full)

    @property
    def _best(self) -> Rung:
        return self.rungs.climb.rungs[self.rungs.climb.taken]

    def _step(self) -> str:
        """Make one more rung; return what stands in the way of it, if anything does."""
        climb, start = self.rungs.climb, time.monotonic()
        if len(climb.rungs) == 1 and not self.without_full:
            obstacle = self._obstacle()
            if obstacle:
                return obstacle
            if climb.rungs[0].level < max(NAMES):
                self.without_full = self._without_full()
                if not self.without_full:
                    self._try_full(start)
                    return ""
        left = self.limit - _spent(climb) - self.wasted
        ground = self._ground(left)
        left -= ground.seconds
        if left <= 0:
            return self._too_short(f"for another rung, of about {ground.seconds:.0f} s")
        given = climb.given_back
        more = self._worst((climb.rungs[-1] if given else ground).drop_pp, start + left)
        if not more:
            return (
                f"more than {100 * LARGEST_SHARE:.0f} % of the layers in float would be hardly an int8 net. See "
                "`edgeres inspect`, calibrate with other images, or build with --precision fp16"
            )
        self._make("give back", ground.level, (*given, *more), start)
        return ""

    def _ground(self, left: float) -> Rung:
        """Return the rung whose recovery goes with giving back: reconstruction, where it is worth its time."""
        first, *others = [rung for rung in self.rungs.climb.rungs if not rung.layers]
        for full in others:
            if full.bought_pp is not None and first.drop_pp is not None and full.seconds < left:
                return full if full.bought_pp >= HELPS * first.drop_pp else first
        return first

    def _without_full(self) -> str:
        """Return in a word why reconstruction is not tried; empty where it is."""
        rounds, seconds = recovery.reconstruction(self.job)
        first, report = self.rungs.climb.rungs[0], self.job.report
        assert report is not None
        if not rounds:
            return "size"
        if first.drop_pp is not None and first.drop_pp > LARGEST_LOSS * _wanted(report):
            return "loss"
        least = (first.seconds + seconds) + 2 * first.seconds  # it, and then giving back, twice
        return "time" if least > self.limit else ""

    def _try_full(self, start: float) -> None:
        """Make the rung with reconstruction; where that fails, layers can be given back all the same."""
        try:
            self._make(NAMES[max(NAMES)], max(NAMES), (), start)
        except EdgeresError as problem:
            self.job.warn(f"reconstruction failed, and is left out: {problem}")
            self.without_full = "failed"
            self._stand_on(0)
            self.wasted = time.monotonic() - start

    def _make(self, name: str, level: int, given: Tuple[LayerCost, ...], start: float) -> None:
        job, self.standing = self.job, -1
        job.level, job.given_back = level, reasons(given)
        job.make(self.exported)
        assert job.report is not None
        layers = tuple(cost.layer for cost in given)
        self._add(_rung(name, level, layers, job.report, time.monotonic() - start), given)

    def _add(self, rung: Rung, given: Tuple[LayerCost, ...]) -> None:
        rungs = self.rungs.climb.rungs
        if rungs and rungs[-1].drop_pp is not None and rung.drop_pp is not None:
            rung = msgspec.structs.replace(rung, bought_pp=round(rungs[-1].drop_pp - rung.drop_pp, 9))
        rungs = (*rungs, rung)
        taken = min(range(len(rungs)), key=lambda i: _order(rungs[i]))
        self.rungs.add(Climb(rungs, taken, given, without_full=self.without_full))
        self.standing = len(rungs) - 1
        self.job.progress.finished(f"rung {self.standing}", rung.seconds, rung_words(rung))

    def _stand_on(self, number: int) -> None:
        """Put a kept rung's files in place and take its verdict over; an engine of a GPU is made and judged again."""
        self.rungs.bring_back(number)
        _stand_on(self.job, self.rungs.climb, number)
        self.job.make(self.exported)
        self.standing = number

    def _obstacle(self) -> str:
        """Return why nothing can be done about the loss; empty where something can."""
        if self.job.imported is not None:
            return (
                "the file's own ranges and weights are kept, and recovery would change both. Calibrate anew: "
                "--recovery fast. Or build with --precision fp16"
            )
        if not recovery.follows(self.job):
            return (
                "accuracy recovery is off (it cannot follow this model, or a DLA is to run it), and so it is not known "
                "which layers lose it. Keep some in float by hand, --keep-float PATTERN, or build with --precision fp16"
            )
        report = self.job.report
        assert report is not None
        seen = recovery.calibration_sqnr(self.job)
        if report.sqnr_db is not None and (seen is None or seen > report.sqnr_db + UNSEEN_DB):
            return (
                f"the calibration samples do not show the loss: their logits have {decibels(seen)} against "
                f"{decibels(report.sqnr_db)}, so they cannot tell which layers to give back. Calibrate with images "
                "like those that it is validated on: --calibration FOLDER"
            )
        return ""

    def _worst(self, drop: Optional[float], deadline: float) -> Tuple[LayerCost, ...]:
        """Return the fewest layers that, given back too, should let the net keep the budget; empty: none may be.

        ``drop`` is what the net loses without, in percentage points: what is expected is taken in proportion to it.
        """
        from edgeres.quantize import fewest

        def watch(done: int, total: int) -> None:
            if time.monotonic() > deadline:
                raise _TimeIsUp
            self.job.progress.advance(done, total)

        solo, costs = recovery.costs(self.job, self.exported, watch)
        already = sum(cost.weighted for cost in self.rungs.climb.given_back)
        single = {node for cost in costs if cost.weighted == len(cost.nodes) for node in cost.nodes}
        most = int(LARGEST_SHARE * (len(single) + already)) - already

        def expected(nodes: Collection[str]) -> float:
            watch(0, 1)
            return solo().whole(nodes).expected

        report = self.job.report
        assert report is not None
        assert drop
        return fewest(costs, expected, expected(()) * _wanted(report) / drop, most)

    def _made_in(self) -> float:
        """Return how many seconds the net in the workspace took, whenever it was made."""
        records = self.job.workspace.records
        return sum(records[name].seconds for name in STAGES if name in records and name != "observe")

    def _too_short(self, what: str) -> str:
        minutes = self.job.recipe.quantization.budget_minutes
        return f"its time box, {minutes:g} minutes, is too short {what}. Give it more: --budget-minutes"


def _key(job: Build, exported: ExportedModel) -> str:
    """Return the hash of everything that the rungs depend on."""
    from edgeres.compilation import activation_range
    from edgeres.targets import resolve

    recipe = job.recipe
    assert job.calibration is not None
    judged = job.calibration if job.validation is None else job.validation
    return stage_key(
        "climb",
        {
            "format": [FORMAT, stages.FORMAT],
            "edgeres": __version__,
            "model": exported.file.sha256,
            "imported": None if job.imported is None else to_data(job.imported),
            "calibration": [to_data(recipe.calibration), job.calibration.sample_set().digest],
            "validation": [recipe.validation.max_drop, recipe.validation.policy, judged.sample_set().digest],
            "quantization": to_data(msgspec.structs.replace(recipe.quantization, budget_minutes=0.0)),
            "range": activation_range(recipe),
            "engine": [to_data(recipe.engine), *resolve(recipe.engine)],
            "preprocessing": to_data(recipe.preprocessing),
            "tools": versions((*recovery.TOOLS, "onnxruntime", "tensorrt", "tensorrt_rtx")),
        },
    )


def _stand_on(job: Build, climb: Climb, number: int) -> None:
    """Let the job make the net of a rung; of no rung, the one that every build begins with."""
    job.level, job.given_back = None, {}
    if climb.rungs:
        rung = climb.rungs[number]
        job.level = rung.level
        job.given_back = reasons(cost for cost in climb.given_back if cost.layer in rung.layers)


def _order(rung: Rung) -> Tuple[int, float, int, float]:
    """Return what orders rungs, best first: the verdict, what is lost, and what is in float."""
    drop = 100.0 if rung.drop_pp is None else rung.drop_pp
    return -RANKS.index(rung.verdict), drop, len(rung.layers), -(rung.sqnr_db or 0.0)


def _rung(name: str, level: int, layers: Tuple[str, ...], report: Report, seconds: float) -> Rung:
    return Rung(
        rung=name,
        level=level,
        layers=layers,
        drop_pp=report.drop_pp,
        agreement=report.agreement,
        sqnr_db=report.sqnr_db,
        verdict=report.verdict,
        seconds=round(seconds, 3),
    )


def _wanted(report: Report) -> float:
    """Return what may be lost, in percentage points: half an answer, where the budget is nothing."""
    return max(report.max_drop_pp, 50 / report.samples)


def _spent(climb: Climb) -> float:
    """Return how many seconds of the time box are used: the first rung is the build itself."""
    return sum(rung.seconds for rung in climb.rungs[1:])


def _warn(job: Build, climb: Climb) -> None:
    if not climb.ended and len(climb.rungs) > 1:
        job.warn(
            f"this is the best of {len(climb.rungs)} nets that were judged on the same samples, which flatters it; "
            "confirm it on others: edgeres validate BUNDLE --validation OTHER"
        )
    if climb.ended:
        job.warn(f"the accuracy budget is not kept, and the search for it has ended: {climb.ended}")
