"""Who does the long work over the samples: this machine alone, or with a cluster; both give the same bits."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, List, NamedTuple, Optional, Protocol, Tuple

import numpy as np

from edgeres.artifacts import Engine, Preprocessing
from edgeres.backends import Runner
from edgeres.errors import BackendError, MissingPackageError, SampleError
from edgeres.runtime.frames import Fed
from edgeres.runtime.loading import open_record
from edgeres.samples import Samples

if TYPE_CHECKING:
    from edgeres.calibrate import Statistics

Watch = Callable[[int, int], None]


class Observation(NamedTuple):
    """What a calibration pass counts: the ``tensors`` of a ``model``, which is an FP32 ONNX file, on samples that go
    through ``preprocessing``."""

    model: Path
    tensors: Tuple[str, ...]
    preprocessing: Preprocessing


class Workforce(Protocol):
    """Runs samples through models."""

    def look(self, samples: Samples) -> List[str]:
        """Return one sentence for every sample that cannot be read."""

    def observe(
        self,
        wanted: Observation,
        samples: Samples,
        watch: Watch,
        earlier: Optional[Statistics],
        keep: Callable[[Statistics], None],
    ) -> Statistics:
        """Return what a calibration pass counts.

        Args:
            earlier: what an interrupted pass had counted: of the first of these samples, in their order.
            keep: called from time to time with all that was counted so far, of the first samples in their order.
        """

    def answer(
        self,
        content: bytes,
        record: Engine,
        samples: Samples,
        preprocessing: Preprocessing,
        watch: Watch,
        run: Optional[Runner] = None,
    ) -> np.ndarray:
        """Return an engine's logits of all samples, float32 ``(N, K)``, in their order.

        Args:
            content: the engine's file, verified.
            run: the engine, where it is open already.
        """


class Alone:
    """This machine, by itself."""

    def look(self, samples: Samples) -> List[str]:
        return samples.check()

    def observe(
        self,
        wanted: Observation,
        samples: Samples,
        watch: Watch,
        earlier: Optional[Statistics],
        keep: Callable[[Statistics], None],
    ) -> Statistics:
        from edgeres.calibrate import observe

        rest = samples.after(earlier.samples if earlier else 0)
        return observe(
            wanted.model,
            wanted.tensors,
            rest.batches(wanted.preprocessing, wanted.preprocessing.batch_size),
            lambda done: watch(done, len(samples)),
            earlier,
            keep,
        )

    def answer(
        self,
        content: bytes,
        record: Engine,
        samples: Samples,
        preprocessing: Preprocessing,
        watch: Watch,
        run: Optional[Runner] = None,
    ) -> np.ndarray:
        if run is not None:
            return run_samples(run, samples, preprocessing, watch)
        with opened(content, record, preprocessing) as fed:
            return run_samples(fed, samples, preprocessing, watch)


@contextlib.contextmanager
def opened(
    content: bytes, record: Engine, preprocessing: Preprocessing, threads: Optional[int] = None
) -> Iterator[Fed]:
    """Yield an engine that takes normalized input, whatever it takes itself; it is closed at the end.

    Args:
        content: its file, verified.
        threads: of one operator of an engine on the CPU; None: as many as there are cores.
    """
    with contextlib.closing(open_record(content, record, threads)) as run:
        yield Fed(run, record, preprocessing)


@contextlib.contextmanager
def hired(cluster: Optional[str], warn: Callable[[str], None] = lambda text: None) -> Iterator[Workforce]:
    """Yield who does the work: this machine alone, or where one is named, with a cluster, which is left at the end.

    Args:
        cluster: ``local``, ``local:4``, the address of a Dask scheduler, or None.
        warn: is told what goes on in the cluster that its owner should know.

    Raises:
        MissingPackageError: Dask is not installed.
        ClusterError: the cluster does not answer, or is not fit to give the very bits of this machine.
    """
    if cluster is None:
        yield Alone()
        return
    if importlib.util.find_spec("distributed") is None:
        raise MissingPackageError.for_extra("distributed", "--cluster", "cluster")
    from edgeres.cluster import joined

    with joined(cluster, warn) as workforce:
        yield workforce


def run_samples(run: Runner, samples: Samples, preprocessing: Preprocessing, watch: Watch) -> np.ndarray:
    """Return a runner's logits of all samples, float32 ``(N, K)``, in the samples' order."""
    logits, done = np.empty((0, 0), np.float32), 0
    size = getattr(run, "largest", None) or preprocessing.batch_size
    for batch in samples.batches(preprocessing, size):
        found = run(batch)
        if not done:
            logits = np.empty((len(samples), *found.shape[1:]), np.float32)
        if found.shape != (len(batch), *logits.shape[1:]):
            raise BackendError(
                f"the engine answered {found.shape} to {len(batch)} samples. Compile it from this model."
            )
        logits[done : done + len(batch)] = found
        done += len(batch)
        watch(done, len(samples))
    if not done:
        raise SampleError(f"{samples.source} has no samples")
    return logits
