"""What a worker of a cluster does: look at, count or answer the samples of one shard, as this machine would.

A shard is a run of whole batches, cut where one machine's batches begin; counts are integers, and extremes the exact
ones. So whichever worker has which shard, in whatever order, the results put together are those of one machine.
Everything here runs on the worker, and is found there by its name: nothing is sent but data.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import threading
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

import numpy as np

from edgeres import __version__
from edgeres.artifacts import Engine, Preprocessing
from edgeres.errors import ClusterError
from edgeres.files import sha256_bytes
from edgeres.provenance import cores, versions
from edgeres.samples import Samples, decoders
from edgeres.workforce import opened, run_samples

ALIKE = ("onnxruntime", "numpy", "pillow")
"""Packages whose other version may compute, or decode, another last bit."""


class Probe(NamedTuple):
    """What comes out of noise: the ``digest`` of all of it, and how many ``classes`` a sample's logits have, if any are
    wanted."""

    digest: str = ""
    classes: int = 0


MODELS: Dict[str, bytes] = {}
"""The models that this worker has been sent, by SHA-256: each comes once, however many shards need it."""

_holders: Dict[str, Set[str]] = {}  # who has not let go of each model: several commands may run on one cluster
_holding = threading.Lock()

PROBES: Dict[str, Probe] = {}
"""What this worker has computed of noise, by the work."""

_one_at_a_time = threading.Lock()  # a shard takes all of its worker's cores, and the memory of one batch


class Work(NamedTuple):
    """What all shards of a pass have in common: ``tensors`` of the model are counted, or its answers wanted.

    ``model`` is its SHA-256; ``engine`` says how it is opened where answers are wanted; ``probe`` is what the client
    computes of noise, which a worker has to compute as well.
    """

    model: str
    preprocessing: Preprocessing
    tensors: Tuple[str, ...] = ()
    engine: Optional[Engine] = None
    probe: Probe = Probe()


@functools.lru_cache(maxsize=None)
def facts() -> Dict[str, str]:
    """Return what has to be the same on a worker and on the client."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):  # of one version there are many states while it is developed
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    found = {"edgeres": f"{__version__} (sources {digest.hexdigest()[:12]})"}
    found.update({name: versions((name,)).get(name, "none") for name in ALIKE})
    return {**found, "the image decoder": decoders(), "machine": platform.machine()}


def first(samples: Samples) -> Tuple[str, str]:
    """Return the SHA-256 of the first sample as it is stored, and of its pixels."""
    frame = samples.frame(0)
    pixels = hashlib.sha256(f"{frame.shape}".encode() + np.ascontiguousarray(frame).tobytes()).hexdigest()
    return samples.sha256()[0], pixels


def look(samples: Samples) -> Tuple[List[str], Tuple[str, ...]]:
    """Return what is wrong with which samples of a shard, one sentence each; and, where nothing is, their hashes."""
    with _one_at_a_time:
        problems = samples.check()
        return problems, () if problems else samples.sha256()


def count(work: Work, samples: Samples) -> bytes:
    """Return the statistics of a shard, as their file."""
    from edgeres.calibrate import observe

    with _one_at_a_time:
        batches = samples.batches(work.preprocessing, work.preprocessing.batch_size)
        return observe(model(work), work.tensors, batches).to_bytes()


def answer(work: Work, samples: Samples) -> np.ndarray:
    """Return the logits of a shard, float32 ``(N, K)``."""
    assert work.engine is not None
    with _one_at_a_time, opened(model(work), work.engine, work.preprocessing, cores()) as run:
        return run_samples(run, samples, work.preprocessing, lambda done, total: None)


def probed(work: Work) -> Probe:
    """Return a digest of what this process computes of noise that is the same everywhere: the last bit of every
    activation counts, and depends on the processor and on what runs on it, in ways that no version number tells."""
    key = repr(work._replace(probe=Probe()))
    if key not in PROBES:
        PROBES[key] = _probe(work)
    return PROBES[key]


def _probe(work: Work) -> Probe:
    height, width = work.preprocessing.size
    noise = np.random.default_rng(0).standard_normal((work.preprocessing.batch_size, 3, height, width))
    batch = noise.astype(np.float32)
    if work.engine is None:
        from edgeres.calibrate import observe

        return Probe(sha256_bytes(observe(model(work), work.tensors, [batch]).to_bytes()))
    with opened(model(work), work.engine, work.preprocessing, cores()) as run:
        logits = np.ascontiguousarray(run(batch))
    return Probe(sha256_bytes(logits.tobytes()), int(logits.shape[1]))


def hold(key: str, holder: str, content: bytes) -> None:
    """Keep a model until this holder, and every other one, lets go of it."""
    with _holding:
        _holders.setdefault(key, set()).add(holder)
        MODELS[key] = content


def let_go(key: str, holder: str) -> None:
    """Keep a model no longer for this holder."""
    with _holding:
        holders = _holders.get(key, set())
        holders.discard(holder)
        if not holders:
            _holders.pop(key, None)
            MODELS.pop(key, None)


def model(work: Work) -> bytes:
    """Return the model of a pass, which this worker has been sent.

    Raises:
        ClusterError: it has not.
    """
    content = MODELS.get(work.model)
    if content is None:
        raise ClusterError("it was not sent the model. Start the command again")
    return content


def check_probe(work: Work) -> None:
    """Refuse to work where this process computes another last bit than the client.

    Raises:
        ClusterError: it does.
    """
    with _one_at_a_time:
        found = probed(work)
    if found != work.probe:
        raise ClusterError(
            f"it computes other last bits than this machine ({processor()}). Take workers with one kind of processor, "
            "and start the command on such a machine"
        )


def processor() -> str:
    """Return what processor this is, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cut(start: int, total: int, batch: int, most: int) -> List[Tuple[int, int]]:
    """Return shards of the samples from ``start`` to ``total``: of whole batches, and of ``most`` samples or one batch
    at most; the last one may be shorter."""
    step = max(1, most // batch) * batch
    return [(begin, min(begin + step, total)) for begin in range(start, total, step)]
