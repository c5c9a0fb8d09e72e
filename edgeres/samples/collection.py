"""Samples in order: lazily decoded frames, their hashes, and batches of network inputs prepared in threads."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Deque, Dict, Generator, List, Mapping, Optional, Protocol, Sequence, Tuple, TypeVar

import numpy as np

from edgeres.artifacts import Preprocessing, SampleSet
from edgeres.errors import RecipeError, SampleError
from edgeres.preprocess import output_shape, prepare, problems
from edgeres.provenance import cores

T = TypeVar("T")
MOST_THREADS = 8


class Source(Protocol):
    """Where samples come from: image files, or an array. Every method may be called from any thread."""

    names: Tuple[str, ...]
    labels: Optional[np.ndarray]
    classes: Optional[Tuple[str, ...]]
    weight: int
    """Bytes that each sample brings along where :meth:`part` is sent."""
    in_memory: bool
    """Whether these are its pixels, because there is no file that others could read."""

    def frame(self, index: int) -> np.ndarray:
        """Return uint8 (H, W, 3), RGB."""

    def glimpse(self, index: int, side: int) -> np.ndarray:
        """Return uint8 (H, W, 3), RGB: the frame, or where that is cheaper, one scaled down to no less than ``side``
        pixels on its short side."""

    def sha256(self, index: int) -> str:
        """Return the hash of what the sample was stored as."""

    def problem(self, index: int) -> Optional[str]:
        """Return what is wrong with a sample, in a sentence, or None."""

    def part(self, indices: Sequence[int], sha256: Mapping[int, str]) -> Source:
        """Return some of the samples without labels, small enough to be sent; those whose hash is told are held
        against it when they are read."""


class Samples:
    """Samples in a fixed order; nothing is decoded until it is asked for.

    ``source`` is what they were opened from; ``available`` is how many there are, of which these are the ones taken;
    ``weight`` is how many bytes each brings along where a part is sent; ``in_memory``: these are its pixels.
    """

    def __init__(
        self,
        source: str,
        content: Source,
        taken: Optional[Sequence[int]] = None,
        hashes: Optional[Dict[int, str]] = None,
    ) -> None:
        self.source = source
        self.available = len(content.names)
        self.classes = content.classes
        self.weight = content.weight
        self.in_memory = content.in_memory
        self._content = content
        self._taken = tuple(range(self.available)) if taken is None else tuple(taken)
        # Shared with every subset: dict operations on distinct keys are safe between threads.
        self._hashes: Dict[int, str] = {} if hashes is None else hashes
        self.names: Tuple[str, ...] = tuple(content.names[index] for index in self._taken)
        self.labels: Optional[np.ndarray] = None
        """int64 (N,), from 0 on; None where the source has none."""
        if content.labels is not None:
            self.labels = content.labels[list(self._taken)]
            self.labels.flags.writeable = False

    def __len__(self) -> int:
        return len(self._taken)

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else "labelled"
        return f"<Samples {self.source}: {len(self)} of {self.available}, {labels}>"

    def frame(self, index: int) -> np.ndarray:
        """Return one sample as uint8 (H, W, 3), RGB, 0…255.

        Raises:
            SampleError: its file cannot be read.
        """
        return self._content.frame(self._taken[index])

    def glimpse(self, index: int, side: int) -> np.ndarray:
        """Return one sample as uint8 (H, W, 3), RGB, 0…255: the frame itself, or where that is cheaper to decode, one
        scaled down whose short side still has ``side`` pixels.

        Raises:
            SampleError: its file cannot be read.
        """
        return self._content.glimpse(self._taken[index], side)

    def whole(self) -> Samples:
        """Return all the samples that there are, of which these are the ones taken."""
        return Samples(self.source, self._content, None, self._hashes)

    def located(self, index: int, problem: SampleError) -> SampleError:
        """Return a problem with one sample as an error that names the sample."""
        if self.names[index] in str(problem):
            return problem
        return SampleError(f"{self.source}, {self.names[index]}: {problem}")

    def subset(self, count: int) -> Samples:
        """Return ``count`` of these samples, spread evenly over their order, or all of them if there are fewer.

        Raises:
            SampleError: ``count`` is below 1.
        """
        if count < 1:
            raise SampleError(f"{self.source}: {count} samples were asked for. Ask for at least 1.")
        total = len(self)
        count = min(count, total)
        taken = [self._taken[index * total // count] for index in range(count)]
        return Samples(self.source, self._content, taken, self._hashes)

    def at(self, positions: Sequence[int]) -> Samples:
        """Return the samples at some positions among these."""
        taken = [self._taken[position] for position in positions]
        return Samples(self.source, self._content, taken, self._hashes)

    def after(self, count: int) -> Samples:
        """Return these samples without the first ``count``, in the same order; none if there are no more."""
        return Samples(self.source, self._content, self._taken[count:], self._hashes)

    def part(self, start: int, stop: int) -> Samples:
        """Return the samples from one position to another, by themselves, to be sent to another process: without
        labels. Where hashes are known, reading another content than that is an error there."""
        taken = self._taken[start:stop]
        return Samples(self.source, self._content.part(taken, self._hashes))

    def learn(self, start: int, hashes: Sequence[str]) -> None:
        """Take the hashes of the samples from a position on from somebody who has read them."""
        self._hashes.update(zip(self._taken[start : start + len(hashes)], hashes))

    def sha256(self, threads: Optional[int] = None) -> Tuple[str, ...]:
        """Return one hash (64 hex digits) per sample: of a file's bytes, or of a frame's shape and bytes.

        Raises:
            SampleError: a file cannot be read.
        """
        missing = [index for index in dict.fromkeys(self._taken) if index not in self._hashes]
        for index, digest in zip(missing, in_order(self._content.sha256, missing, threads)):
            self._hashes[index] = digest
        return tuple(self._hashes[index] for index in self._taken)

    def sample_set(self) -> SampleSet:
        """Return the record of which samples these are; its digest covers names, hashes and labels, and their order.

        Raises:
            SampleError: a file cannot be read.
        """
        hashes = self.sha256()
        columns: List[Sequence[object]] = [self.names, hashes]
        if self.labels is not None:
            columns.append(self.labels.tolist())
        # JSON quotes every name, so that no two different sets are written alike.
        text = json.dumps(list(zip(*columns)), separators=(",", ":"))
        # Where they lie is in the recipe; the same samples elsewhere make the same table, byte for byte.
        return SampleSet(
            os.path.basename(self.source), hashlib.sha256(text.encode("ascii")).hexdigest(), self.names, hashes
        )

    def check(self, threads: Optional[int] = None) -> List[str]:
        """Return one sentence for every sample whose header cannot be read; an empty list where all can."""
        found = in_order(self._content.problem, self._taken, threads)
        return [problem for problem in found if problem is not None]

    def batches(
        self, preprocessing: Preprocessing, batch_size: int, threads: Optional[int] = None
    ) -> Generator[np.ndarray, None, None]:
        """Yield all samples as network inputs, float32 (n, 3, h, w), in order; the last batch may be smaller.

        Threads decode and prepare at most about one batch ahead of the one being filled, so memory stays bounded.
        Closing the iterator early stops them.

        Raises:
            SampleError: a sample cannot be read, or does not cover the crop; ``batch_size`` is below 1.
            RecipeError: the preprocessing is mistaken.
        """
        if batch_size < 1:
            raise SampleError(f"{self.source}: batches of {batch_size} were asked for. Ask for at least 1.")
        mistakes = problems(preprocessing)
        if mistakes:
            raise RecipeError("preprocessing", mistakes)
        return self._batches(preprocessing, batch_size, _threads(threads))

    def _batches(
        self, preprocessing: Preprocessing, batch_size: int, threads: int
    ) -> Generator[np.ndarray, None, None]:
        def prepared(position: int) -> np.ndarray:
            try:
                return prepare(self.frame(position), preprocessing)
            except SampleError as problem:
                raise self.located(position, problem) from None

        inputs = in_order(prepared, range(len(self)), threads, max(2 * threads, batch_size))
        try:
            for start in range(0, len(self), batch_size):
                batch = np.empty((min(batch_size, len(self) - start), *output_shape(preprocessing)), np.float32)
                for position in range(len(batch)):
                    batch[position] = next(inputs)
                yield batch
        finally:
            inputs.close()


def in_order(
    function: Callable[[int], T], items: Sequence[int], threads: Optional[int] = None, ahead: int = 256
) -> Generator[T, None, None]:
    """Yield ``function(item)`` in the items' order, computed in threads, at most ``ahead`` of them before their turn.

    An exception comes out where its result would have. Closing the generator cancels what has not begun, and waits
    for the rest.
    """
    pending: Deque[Any] = deque()
    pool = ThreadPoolExecutor(_threads(threads), thread_name_prefix="edgeres-samples")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown(wait=True)


def _threads(threads: Optional[int]) -> int:
    if threads is None:
        return min(MOST_THREADS, cores())
    return max(1, threads)
