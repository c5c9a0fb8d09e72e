"""What people see: progress on a terminal, tables and verdicts. The only file that imports rich."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table

from edgeres.artifacts import Bundle, Change, Climb, Engine, LayerSummary, Manifest, Report, summaries
from edgeres.files import PAGE
from edgeres.inspection import layer_errors, repairs, worst_errors
from edgeres.measurements import Benchmark, Memory
from edgeres.progress import Progress, counted
from edgeres.provenance import commit_words
from edgeres.validation import (
    advice,
    baseline_headline,
    decibels,
    fallen_words,
    headline,
    latency_failure,
    limit_headline,
)
from edgeres.validation.cases import first_of, one_line

WIDTH_OF_A_LOG = 140  # columns; where nobody's window can be asked
VERDICT_STYLE = {
    "pass": "bold green",
    "fail": "bold red",
    "error": "bold red",
    "inconclusive": "bold yellow",
    "unlabelled": "bold",
}

SPEEDUP_STYLE = {"faster": "bold green", "slower": "bold red", "undecided": "bold yellow"}


class _Console(Console):
    """A console on which nobody has to read to the end: what follows is not shown, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def console(stderr: bool = False) -> Console:
    """Return a console; plain text where there is no terminal, no colour where NO_COLOR is set, no guessed markup.

    It is as wide as the terminal, or as COLUMNS says.
    """
    made = _Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = WIDTH_OF_A_LOG
    return made


def _table(columns: Sequence[str], title: str) -> Table:
    """Return an empty table, whose cells go on in the next line where they are too narrow: nothing is cut off."""
    headed = [Column(one_line(header), overflow="fold") for header in columns]
    return Table(*headed, title=one_line(title) or None, title_justify="left")


class TerminalProgress(Progress):
    """Bars and lines on stderr where that is a terminal; otherwise only warnings.

    Without ``unrest`` a bar is drawn only when it advances, by whoever lets it, and no thread disturbs what is timed.
    """

    def __init__(self, unrest: bool = True) -> None:
        self._unrest = unrest
        self._console = console(stderr=True)
        self._live = self._console.is_terminal
        self._bars: Optional[Bars] = None
        self._task: Optional[TaskID] = None
        self._name = ""
        self._row = ""  # of a matrix, where there is one
        self.lines: List[Tuple[str, str, str]] = []

    def row(self, number: int, total: int, text: str) -> None:
        self._row = f"{text.partition(':')[0]}: "
        if self._live:
            self._console.print(one_line(f"bundle {number} of {total}: {text}"), style="bold")

    def stage(self, name: str, text: str) -> None:
        self._name = name
        if self._live:
            self._bars = Bars(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                auto_refresh=self._unrest,
            )
            self._bars.start()
            self._task = self._bars.add_task(name, total=None)

    def advance(self, done: int, total: int) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, refresh=not self._unrest)

    def finished(self, name: str, seconds: float, text: str) -> None:
        self.stop()
        self._line(name, text, f"{seconds:.1f} s")

    def reused(self, name: str, text: str) -> None:
        self._line(name, text, "reused")

    def warn(self, text: str) -> None:
        self._console.print(one_line(f"warning: {self._row}{text}"), style="yellow")

    def stop(self) -> None:
        """Take a running bar off the terminal."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = self._task = None

    def _line(self, name: str, text: str, time: str) -> None:
        self.lines.append((name, text, time))
        if self._live:
            self._console.print(one_line(f"{name:<10} {time:>8}  {text}"))


def show_build(bundle: Bundle, lines: Sequence[Tuple[str, str, str]]) -> None:
    """Print what a build did and how its result compares with FP32."""
    out = console()
    table = _table(("stage", "result", "time"), f"{bundle.manifest.name}, {bundle.manifest.precision}")
    for name, text, time in lines:
        table.add_row(*map(one_line, (name, text, time)))
    out.print(table)
    if bundle.manifest.climb is not None:
        show_ladder(bundle.manifest.climb)
    place = Path(bundle.path)
    worst = worst_errors(layer_errors(place, bundle.manifest))
    if worst:
        said = (f"{x['module']} {100 * x['share']:.0f} % (own {decibels(x['own_sqnr_db'])})" for x in worst)
        out.print(one_line(f"most of the noise: {', '.join(said)}"))
    if bundle.report is not None:
        show_report(bundle.report, *repairs(place, bundle.manifest))
    out.print(one_line(f"bundle: {bundle.path}"))
    if any(ref.path == PAGE for ref in bundle.manifest.files):
        out.print(one_line(f"report: {place / PAGE}  (show it: edgeres report {shlex.quote(bundle.path)} --open)"))


def show_ladder(climb: Climb) -> None:
    """Print what each rung of the accuracy budget's ladder did and bought, and which one the bundle holds."""
    columns = ("rung", "given back to float", "drop, pp", "bought, pp", "same answer", "SQNR", "verdict", "s", "")
    rows = [
        [
            f"{number}: {rung.rung}",
            ", ".join(rung.layers) or "nothing",
            "" if rung.drop_pp is None else f"{rung.drop_pp:+.2f}",
            "" if rung.bought_pp is None else f"{rung.bought_pp:+.2f}",
            f"{100 * rung.agreement:.2f} %",
            decibels(rung.sqnr_db),
            rung.verdict,
            f"{rung.seconds:.1f}",
            "taken" if number == climb.taken else "",
        ]
        for number, rung in enumerate(climb.rungs)
    ]
    show_rows(columns, rows, "what was done for the accuracy budget")


def show_engine(place: str, engine: Engine, words: str) -> None:
    """Print what was compiled and what it fits."""
    out = console()
    out.print(one_line(f"{place}: {engine.target}: {words}"))
    out.print("  takes: " + ("pixels (uint8)" if engine.input == "uint8" else "normalized input (float32)"))
    for name, value in engine.built_for.items():
        if value:
            out.print(one_line(f"  {name}: {value}"))


def show_benchmark(measured: Benchmark) -> None:
    """Print latencies, memory, clocks and power, and in words whether the engine pays."""
    place = measured.host.get("processor") or measured.host["system"]
    title = f"{measured.bundle}: {measured.target}, {place}; milliseconds a call"
    columns = ("model", "batch", "calls", "p50", "p90", "p99", "max", "jitter", "images/s")
    rows = [
        [
            found.model,
            str(found.batch),
            str(found.calls),
            *map(_four_digits, (found.p50_ms, found.p90_ms, found.p99_ms, found.max_ms, found.jitter_ms)),
            f"{found.images_per_second:.1f}",
        ]
        for found in measured.latencies
    ]
    show_rows(columns, rows, title)
    out = console()
    grown = ", ".join(f"{name} {_memory_words(memory)}" for name, memory in measured.memory.items())
    whole = "" if measured.resident_bytes is None else f"; the process {_mebibytes(measured.resident_bytes)}"
    out.print(one_line(f"memory, to open and to run: {grown}{whole}"))
    for state in measured.board:
        sensors = [(state.clocks_mhz, "MHz", 0), (state.power_watts, "W", 2)]
        said = [
            f"{name} {middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"
            for values, unit, digits in sensors
            for name, (low, middle, high) in values.items()
        ]
        if said:
            out.print(one_line(f"batch {state.batch}, all models in turns: {', '.join(said)}"))
    for speedup, text in zip(measured.speedups, measured.answers):
        out.print(one_line(text), style=SPEEDUP_STYLE.get(speedup.verdict, ""))
    for text in measured.notes:
        out.print(one_line(f"note: {text}"))


def _four_digits(value: float) -> str:
    return f"{value:.{max(0, min(3, 3 - len(str(int(value))) + 1))}f}"


def _memory_words(memory: Memory) -> str:
    parts = [(memory.resident_bytes, ""), (memory.device_bytes, " on the device")]
    told = [f"{_mebibytes(value)}{where}" for value, where in parts if value is not None]
    return " and ".join(told) or "not known"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:.1f} MiB"


def show_report(report: Report, worst: Sequence[str] = (), untried: str = "") -> None:
    """Print FP32 and the engine side by side, the verdict in words, and what to do next: see ``advice``."""
    out = console()
    engine = f"{report.precision.upper()} ({report.backend})"
    table = _table(("", "FP32", engine), counted(report.samples, f"{report.samples_source} sample"))
    if report.top1_reference is not None and report.top1_engine is not None:
        table.add_row("top-1", f"{100 * report.top1_reference:.2f} %", f"{100 * report.top1_engine:.2f} %")
    if report.top5_reference is not None and report.top5_engine is not None:
        table.add_row("top-5", f"{100 * report.top5_reference:.2f} %", f"{100 * report.top5_engine:.2f} %")
    if report.drop_ci95_pp is not None and report.drop_pp is not None:
        low, high = report.drop_ci95_pp
        table.add_row(
            "drop, pp", "", f"{report.drop_pp:+.2f}  (95 %: {low:+.2f} to {high:+.2f}; budget {report.max_drop_pp:g})"
        )
    if report.discordant is not None:
        table.add_row(
            "only one right", str(report.discordant.only_reference_correct), str(report.discordant.only_engine_correct)
        )
    table.add_row("same answer", "", f"{100 * report.agreement:.2f} %")
    table.add_row("SQNR", "", "identical" if report.sqnr_db is None else f"{report.sqnr_db:.1f} dB")
    sure = report.confidence
    if sure is not None and sure.calibration_error_reference is not None and sure.calibration_error_engine is not None:
        errors = (sure.calibration_error_reference, sure.calibration_error_engine)
        table.add_row("calibration error", *(f"{100 * error:.2f} %" for error in errors))
    if report.attribution is not None and report.backend != "cpu":
        table.add_row("quantization's part", "", _change_words(report.attribution.quantization))
        table.add_row("the engine's part", "", _change_words(report.attribution.engine))
    out.print(table)
    show_layers(report.layers)
    for line in first_of(fallen_words(report)):
        out.print(one_line(line), style="yellow")
    _show_verdict(report.verdict, headline(report))
    if report.baseline is not None:
        _show_verdict(report.baseline.verdict, baseline_headline(report))
    for limit in report.latency.limits if report.latency is not None else ():
        _show_verdict(limit.verdict, limit_headline(report, limit))
    if report.latency_error:
        _show_verdict("error", latency_failure(report))
    for line in advice(report, worst, untried):
        out.print(one_line(f"  {line}"))


def _show_verdict(verdict: str, words: str) -> None:
    console().print(one_line(f"{verdict.upper()}: {words}"), style=VERDICT_STYLE.get(verdict, ""))


def _change_words(change: Change) -> str:
    """Return what one step of a drop does, in a cell."""
    drop = "" if change.drop_pp is None else f"{change.drop_pp:+.2f} pp, "
    sqnr = "identical" if change.sqnr_db is None else f"{change.sqnr_db:.1f} dB"
    return f"{drop}same answer {100 * change.agreement:.2f} %, {sqnr}"


def show_layers(layers: Sequence[LayerSummary]) -> None:
    """Print what the layers of each engine compute in, and which of them are not as planned."""
    out = console()
    for summary in layers:
        out.print(one_line(f"engine for {summary.target}: {summary.words}"))
        for text in summary.not_as_planned:
            out.print(one_line(f"  not as planned: {text}"), style="yellow")


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table."""
    table = _table(columns, title)
    for row in rows:
        table.add_row(*map(one_line, row))
    console().print(table)


def show_manifest(path: str, manifest: Manifest) -> None:
    """Print what a bundle is, where it comes from and what it was judged to be."""
    out = console()
    made = manifest.provenance.get("tools", {})
    tools = ", ".join(f"{name} {version}" for name, version in made.items()) if isinstance(made, dict) else made
    out.print(one_line(f"{path}: {manifest.name}, {manifest.precision}"))
    frame = manifest.preprocessing
    how = "of frames that are not resized"
    if frame.resize is not None:
        how = f"of frames whose short side is resized to {frame.resize}"
    if frame.fit == "letterbox":
        how = f"of whole frames in a letterbox of {frame.pad}"
    facts: Dict[str, Any] = {
        "input": f"{frame.size[0]}×{frame.size[1]} pixels, {how}; {frame.color}, mean {frame.mean}, std {frame.std}",
        "engines": ", ".join(f"{e.target} ({_engine_words(e)})" for e in manifest.engines) or "none",
        "made with": tools,
        "git": commit_words(manifest.provenance.get("git")) or "none",
    }
    for name, value in facts.items():
        out.print(one_line(f"  {name}: {value}"))
    for warning in manifest.warnings:
        out.print(one_line(f"  warning: {warning}"), style="yellow")
    show_layers(summaries(manifest.engines))


def _engine_words(engine: Engine) -> str:
    """Return what an engine computes in and takes, and what it was built for, as far as that is known."""
    built_for = (f"{name} {value}" for name, value in engine.built_for.items() if value)
    return ", ".join([engine.precision, f"takes {engine.input}", *built_for])
