"""With a cluster: a build's or a validation's passes over the samples, run by Dask's workers, to the bit as here alone.

Dask is spoken here and in :mod:`edgeres.connection` alone. Shards go out a few ahead of what has come back, results
come back in the shards' order, and each counts once: a shard whose worker died is done again by another.

What goes over the wire are pickles of Dask's, both ways: whoever can reach the scheduler can run code on its workers
and here. SECURITY.md says what follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import time
import uuid
from concurrent.futures import CancelledError
from inspect import signature
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
from distributed import Client, Future, KilledWorker, WorkerPlugin, get_worker

from edgeres import shards
from edgeres.artifacts import Engine, Preprocessing
from edgeres.backends import Runner
from edgeres.connection import LOCAL, PATIENCE, TIMEOUTS, connected, started
from edgeres.errors import ClusterError, EdgeresError, SampleError, first_line, numbered
from edgeres.files import sha256_bytes
from edgeres.provenance import share_cores
from edgeres.samples import Samples
from edgeres.workforce import Alone, Observation, Watch

if TYPE_CHECKING:
    from edgeres.calibrate import Statistics

TICK = 0.5  # seconds between looks at the workers, and at a Ctrl-C
RETRIES = 2  # of a shard that failed without a word of ours: a store that answers the third time has answered
AHEAD = 3  # shards for each worker that are out, or back before their turn
SHARDS = 4  # for each worker at least, so that the last ones end together; each costs a session and a sum
MOST = 4096  # samples of a shard: what a death costs
LARGEST_PART = 32 << 20  # bytes of a shard on its way out: frames, where these are sent
LONGEST_PROBLEM = 1 << 14  # characters of what is wrong with a sample; a path has 4,096 bytes at most
LOOKED_AT = 256  # samples of a shard that are only read


class Models(WorkerPlugin):  # type: ignore[misc]
    """Brings a model to each worker once, also to one that comes later or is started anew."""

    def __init__(self, name: str, key: str, content: bytes) -> None:
        """``name`` is no other client's; ``key`` the model's SHA-256."""
        self.name = name
        self._key, self._content = key, content

    def setup(self, worker: Any) -> None:
        shards.hold(self._key, f"{self.name} on {worker.id}", self._content)

    def teardown(self, worker: Any) -> None:
        shards.let_go(self._key, f"{self.name} on {worker.id}")


def on_worker(work: Callable[..., Any], facts: Dict[str, str], *arguments: Any) -> Any:
    """Do a piece of work here, on a worker, if it is like the client; errors of ours say where they come from."""
    worker = get_worker()
    share_cores(worker.state.nthreads)
    try:
        unlike = difference(facts, shards.facts())
        if unlike:
            raise ClusterError(unlike)
        if arguments and isinstance(arguments[0], shards.Work):
            shards.check_probe(arguments[0])
        return work(*arguments)
    except EdgeresError as problem:
        problem.args = (f"worker {worker.address}: {problem}",)
        raise


def difference(here: Dict[str, str], there: Dict[str, str]) -> str:
    """Return in what a worker is not as this machine is, in words; nothing where it is."""
    return ", ".join(
        f"{name} is {there.get(name)} there and {here[name]} here" for name in here if there.get(name) != here[name]
    )


def looked_at(found: Any, count: int) -> Tuple[Sequence[str], Sequence[str]]:
    """Return what a worker says of ``count`` samples that it looked at: what is wrong, or if nothing is, their hashes.

    Raises:
        ClusterError: it says something else.
    """
    with contextlib.suppress(TypeError, ValueError):
        wrong, hashes = found
        if all(isinstance(text, str) for text in (*wrong, *hashes)):
            if 0 < len(wrong) <= count and not hashes and max(map(len, wrong)) <= LONGEST_PROBLEM:
                return wrong, ()
            if not wrong and len(hashes) == count and all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
                return (), hashes
    raise ClusterError(f"a worker looked at {count} samples, and did not answer with one hash or one problem for each")


@contextlib.contextmanager
def joined(address: str, warn: Callable[[str], None]) -> Iterator[Cluster]:
    """Yield a cluster whose workers are all like this machine; nothing of ours is left there afterwards.

    Args:
        address: of a Dask scheduler; or ``local``, a worker for each core of this machine; or ``local:4``.

    Raises:
        ClusterError: it does not answer, has no workers, or a worker has other versions than this machine.
    """
    with contextlib.ExitStack() as held:
        client = held.enter_context(started(address) if LOCAL.fullmatch(address) else connected(address))
        cluster = Cluster(client, address, warn)
        cluster.check_alike()
        held.callback(cluster.leave)
        yield cluster


class Cluster:
    """Dask's workers, as a :class:`edgeres.workforce.Workforce`.

    ``received`` counts the bytes of results, and ``shards`` how many came, for whoever measures.
    """

    def __init__(self, client: Client, address: str, warn: Callable[[str], None]) -> None:
        self._client, self._address, self._warn = client, address, warn
        self._alone = Alone()
        # Some of Dask's releases tell of five workers where they are not asked for all.
        self._every = {"n_workers": -1} if "n_workers" in signature(client.scheduler_info).parameters else {}
        self._known: Set[str] = set()  # addresses of workers that were there at the last look
        self._own = uuid.uuid4().hex  # several clients may send one model, and each takes back its own
        self._sent = ""  # the SHA-256 of the model that the workers hold for this client
        self._empty_since: Optional[float] = None
        self._looked = 0.0
        self.received = self.shards = 0

    def leave(self) -> None:
        """Take back what the workers were sent."""
        if self._sent:
            with contextlib.suppress(Exception):  # a cluster that is gone holds nothing
                self._client.unregister_worker_plugin(self._plugin(self._sent))
        self._sent = ""

    def _plugin(self, model: str) -> str:
        return f"edgeres model {model} of {self._own}"

    # ---- who is there

    def check_alike(self) -> None:
        """Wait for a worker, and refuse workers that are not as this machine is: their results might differ.

        Raises:
            ClusterError: naming every such worker, and in what it differs.
        """
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except TIMEOUTS:
            raise ClusterError(self._nobody("has no worker")) from None
        here = shards.facts()
        problems = [
            f"worker {worker}: {difference(here, told)}" if isinstance(told, dict) else f"worker {worker}: {told}"
            for worker, told in self._everywhere(shards.facts)
            if not isinstance(told, dict) or difference(here, told)
        ]
        if problems:
            raise ClusterError(
                numbered(
                    f"the cluster at {self._address} is not like this machine, and might not give the same bits",
                    problems,
                )
                + "\nInstall the very same there: pip install 'edgeres[cluster]' in the versions that are here"
            )
        self._attend()

    def _everywhere(self, work: Callable[..., Any], *arguments: Any) -> List[Tuple[str, Any]]:
        """Return what each worker answers, or in words why it does not, by address; in the addresses' order."""
        try:
            found = self._client.run(work, *arguments, on_error="return")
        except EdgeresError:
            raise
        except Exception as problem:  # a worker that has no edgeres fails in the middle of Dask
            raise ClusterError(
                f"a worker of {self._address} cannot run edgeres: {first_line(problem)}. Install it there, in the "
                "version that is here: pip install 'edgeres[cluster]'"
            ) from None
        told = [(worker, first_line(x) if isinstance(x, BaseException) else x) for worker, x in found.items()]
        return sorted(told, key=lambda one: one[0])

    def _attend(self) -> None:
        """Look who is there; say who was lost, and give up where nobody is left.

        Raises:
            ClusterError: no worker has been there for a minute, or the scheduler is gone.
        """
        now = time.monotonic()
        if now - self._looked < TICK:
            return
        self._looked = now
        try:
            there = set(self._client.scheduler_info(**self._every)["workers"])
        except Exception as problem:  # as many kinds as there are ways to lose a connection
            raise ClusterError(
                f"the scheduler at {self._address} does not answer any more ({first_line(problem)}). Start it again, "
                "and the command: what is finished is kept"
            ) from None
        for lost in sorted(self._known - there):
            self._warn(f"worker {lost} was lost; others do its shards again")
        self._known = there
        if there:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        elif now - self._empty_since > PATIENCE:
            raise ClusterError(self._nobody("has lost all its workers"))

    def _nobody(self, what: str) -> str:
        return (
            f"the cluster at {self._address} {what}, and none came within {PATIENCE:.0f} s. Start some: dask worker "
            "ADDRESS --nthreads 4; and the command again: what is finished is kept"
        )

    # ---- what they do

    def look(self, samples: Samples) -> List[str]:
        """Have every sample read and hashed by the workers; return what is wrong.

        Raises:
            ClusterError: a worker cannot read the first sample, or finds another one there.
        """
        if samples.in_memory:  # all of it would go over the wire to be hashed, and is hashed here in a fraction of that
            return self._alone.look(samples)
        self._check_reach(samples)
        problems: List[str] = []
        cuts = self._cut(0, samples, 1, LOOKED_AT)
        for (start, stop), found in self._in_order(shards.look, (), samples, cuts):
            wrong, hashes = looked_at(found, stop - start)
            problems += wrong
            samples.learn(start, hashes)
        return problems

    def _check_reach(self, samples: Samples) -> None:
        try:
            here = shards.first(samples)
        except SampleError:
            return  # no worker's fault: it is told with all other samples that cannot be read
        problems = []
        for worker, told in self._everywhere(shards.first, samples.part(0, 1)):
            if isinstance(told, str):
                problems.append(f"worker {worker}: {told}")
            elif tuple(told) != here:
                what = "another file" if told[0] != here[0] else "other pixels of the same file"
                problems.append(f"worker {worker} finds {what} as {samples.names[0]}")
        if problems:
            raise ClusterError(
                numbered(f"workers cannot read {samples.source} as this machine does", problems)
                + "\nPut it where all of them find it under the same path, or into an object store"
            )

    def observe(
        self,
        wanted: Observation,
        samples: Samples,
        watch: Watch,
        earlier: Optional[Statistics],
        keep: Callable[[Statistics], None],
    ) -> Statistics:
        from edgeres.calibrate import Statistics

        statistics = Statistics.empty(wanted.tensors)
        if earlier is not None:
            statistics.merge(earlier)
        content = wanted.model.read_bytes()
        work = self._work(content, shards.Work(sha256_bytes(content), wanted.preprocessing, wanted.tensors))
        cuts = self._cut(statistics.samples, samples, wanted.preprocessing.batch_size, MOST)
        for (start, stop), result in self._in_order(shards.count, (work,), samples, cuts):
            found = Statistics.from_bytes(result, f"what came back of samples {start} to {stop}")
            if found.samples != stop - start:
                raise ClusterError(
                    f"a worker counted {found.samples} samples, not {stop - start}. This is a bug in edgeres"
                )
            statistics.merge(found)
            keep(statistics)
            watch(statistics.samples, len(samples))
        return statistics

    def answer(
        self,
        content: bytes,
        record: Engine,
        samples: Samples,
        preprocessing: Preprocessing,
        watch: Watch,
        run: Optional[Runner] = None,
    ) -> np.ndarray:
        if record.backend != "cpu":  # an engine for the GPU that it was made for
            return self._alone.answer(content, record, samples, preprocessing, watch, run)
        work = self._work(content, shards.Work(sha256_bytes(content), preprocessing, (), record))
        logits = np.empty((len(samples), work.probe.classes), np.float32)
        cuts = self._cut(0, samples, preprocessing.batch_size, MOST)
        for (start, stop), found in self._in_order(shards.answer, (work,), samples, cuts):
            wanted = (stop - start, work.probe.classes)
            if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != wanted:
                told = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
                raise ClusterError(f"a worker answered {told}, and not float32 {wanted}")
            logits[start:stop] = found
            watch(stop, len(samples))
        return logits

    def _work(self, content: bytes, work: shards.Work) -> shards.Work:
        """Send a model to all workers in place of the one before, and return the work with what this machine computes
        of noise.

        Raises:
            ClusterError: a worker computes something else.
        """
        shards.hold(work.model, self._own, content)
        try:
            work = work._replace(probe=shards.probed(work))
        finally:
            shards.let_go(work.model, self._own)
        if work.model != self._sent:
            self.leave()  # of a hundred rungs' models a worker need not hold a hundred
            name = self._plugin(work.model)
            self._client.register_plugin(Models(name, work.model, content), name=name)
            self._sent = work.model
        refused = [f"worker {worker}: {told}" for worker, told in self._everywhere(shards.check_probe, work) if told]
        if refused:
            raise ClusterError(numbered(f"the cluster at {self._address} would not give the same bits", refused))
        return work

    def _cut(self, start: int, samples: Samples, batch: int, most: int) -> List[Tuple[int, int]]:
        """Return shards: some for each worker, but none larger than ``most`` samples, or than what is sent at once."""
        share = -(-(len(samples) - start) // (SHARDS * max(1, len(self._known))))
        return shards.cut(start, len(samples), batch, min(most, share, max(1, LARGEST_PART // samples.weight)))

    def _in_order(
        self, work: Callable[..., Any], arguments: Tuple[Any, ...], samples: Samples, cuts: Sequence[Tuple[int, int]]
    ) -> Iterator[Tuple[Tuple[int, int], Any]]:
        """Yield each shard and its result, in order. No more than a few for each worker are out or wait for their turn,
        so that neither frames on their way out nor results on their way back fill a memory."""
        arrived: Any = queue.SimpleQueue()  # of positions
        out: Dict[int, Future] = {}
        back: Dict[int, Any] = {}
        begun = 0
        try:
            for position, shard in enumerate(cuts):
                while position not in back:
                    while begun < min(len(cuts), position + AHEAD * max(1, len(self._known))):
                        out[begun] = self._client.submit(
                            on_worker, work, shards.facts(), *arguments, samples.part(*cuts[begun]),
                            pure=False, retries=RETRIES, priority=-begun,
                        )  # fmt: skip
                        out[begun].add_done_callback(lambda _, place=begun: arrived.put(place))
                        begun += 1
                    with contextlib.suppress(queue.Empty):
                        place = arrived.get(timeout=TICK)
                        back[place] = self._result(out[place])
                        del out[place]
                    self._attend()
                result = back.pop(position)
                self.shards += 1
                self.received += len(result) if isinstance(result, bytes) else getattr(result, "nbytes", 0)
                yield shard, result
        finally:
            with contextlib.suppress(Exception):  # of a scheduler that is gone there is nothing to take back
                self._client.cancel(list(out.values()), force=True)

    def _result(self, future: Future) -> Any:
        """Return what a shard gave, which may be on a worker that dies just now, and is then computed again."""
        while True:
            try:
                return future.result(timeout=PATIENCE)
            except (CancelledError, asyncio.CancelledError):  # also while it is waited for
                raise ClusterError(
                    f"the scheduler at {self._address} has dropped the work: it was started anew, or the connection "
                    "was lost. Start the command again: what is finished is kept"
                ) from None
            except TIMEOUTS:
                if future.status == "error":  # it is what the work ended with, and no wait will change that
                    raise
                self._attend()
            except KilledWorker as problem:
                raise ClusterError(
                    f"{problem.allowed_failures + 1} workers died over the same samples, the last one was "
                    f"{problem.last_worker.address}: they may be short of memory, and their own logs tell. Give them "
                    "more, or fewer to a machine"
                ) from None
