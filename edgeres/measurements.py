"""What ``bench`` and the latency gate measure, as nouns: to JSON and back as those of :mod:`edgeres.artifacts` are."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import msgspec


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long calls took: one model at one batch size, in milliseconds per call, frames in and logits out.

    ``model`` is what ran: a precision, and behind it what sets it apart from others of that precision. ``jitter_ms`` is
    p99 - p50. ``rounds_ms`` are the medians of each round, in order: ratios are of these, and slowing down shows.
    """

    model: str
    batch: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float
    jitter_ms: float
    images_per_second: float
    rounds_ms: Tuple[float, ...]


class Speedup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The time of the model ``against`` over that of ``model`` at one batch size; above 1, ``model`` is the faster one.

    ``ratio`` is the median over rounds, ``ci95`` its 95 % interval (None: too few rounds for one). ``verdict`` is
    ``faster`` or ``slower`` where the whole interval says so, else ``undecided``.
    """

    model: str
    against: str
    batch: int
    ratio: float
    ci95: Optional[Tuple[float, float]]
    rounds: int
    verdict: str


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By how many bytes opening a model and running its largest batch let memory grow: the process's resident set, and
    the device's memory where there is one; None where nobody tells."""

    resident_bytes: Optional[int]
    device_bytes: Optional[int] = None


class BoardState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Clocks and power while all models took turns at one batch size: (lowest, median, highest) by sensor."""

    batch: int
    clocks_mhz: Dict[str, Tuple[float, float, float]]
    power_watts: Dict[str, Tuple[float, float, float]]


class Benchmark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``edgeres bench`` measured. ``answers`` say in words what follows from the ratios, ``notes`` what to mind.

    ``resident_bytes`` is the whole process's at the end; ``memory`` is by model. ``engine_sha256`` is of the engine's
    file, by which a result is known to be a bundle's own.
    """

    bundle: str
    target: str
    backend: str
    precision: str
    input_shape: Tuple[int, int, int]
    threads: Optional[int]
    host: Dict[str, str]
    latencies: Tuple[Latency, ...]
    speedups: Tuple[Speedup, ...]
    memory: Dict[str, Memory]
    resident_bytes: Optional[int]
    board: Tuple[BoardState, ...]
    answers: Tuple[str, ...]
    notes: Tuple[str, ...] = ()
    interval_method: str = "sign test"
    engine_sha256: str = ""


class LatencyLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A limit that was asked for, and whether an engine keeps it.

    ``name`` is ``round_p50_ms``, milliseconds per call at most, or ``speedup``, times as fast as ``against`` at least.
    ``verdict`` is ``pass`` or ``fail`` where the whole 95 % interval of this run says so, else ``inconclusive``.
    ``independent`` is as how many independent rounds the run counts, for load that lasts meets several; ``ci95`` is
    None where they are too few for one. Then only a limit twice beyond every round is decided.
    """

    name: str
    limit: float
    measured: float
    ci95: Optional[Tuple[float, float]]
    verdict: str
    against: str = ""
    independent: int = 0


class LatencyReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast an engine is on one machine, one frame a call, against what was asked of it; never without a limit.

    ``device`` says where it was measured: the target and the processor. ``round_p50_ms`` is the median over
    ``rounds`` of each round's own, and so not the ``p50_ms`` of :class:`Latency`, which is of all calls; ``notes`` say
    what to mind about the machine.
    """

    device: str
    calls: int
    rounds: int
    round_p50_ms: float
    p99_ms: float
    limits: Tuple[LatencyLimit, ...]
    notes: Tuple[str, ...] = ()
    interval_method: str = "sign test, count deflated by Geyer 1992"
