"""What the session needs of a GPU, and CUDA's refusals in our words."""

from __future__ import annotations

from typing import Callable, ContextManager, Protocol, Tuple, Type

import numpy as np

from edgeres.errors import BackendError

LOST = "The GPU is lost to this process. Start the program again; if that does not help, the machine: edgeres doctor"

ADVICE: Tuple[Tuple[str, str], ...] = (
    ("out of memory", "Close other programs on the GPU, open fewer contexts, or compile for a smaller largest batch."),
    ("no cuda-capable device", "See whether this machine shows its GPU: edgeres doctor"),
    ("driver version is insufficient", "The NVIDIA driver is older than this package wants: edgeres doctor"),
    ("driver cuda combination", "The NVIDIA driver and this GPU do not fit together: edgeres doctor"),
    ("invalid device ordinal", "See which GPUs this machine has: edgeres doctor"),
    ("busy or unavailable", "Another process holds the GPU for itself: stop it, and start this program again."),
    ("illegal memory", LOST),
    ("launch failure", LOST),
    ("ecc error", "The GPU's memory is damaged. Reset the GPU or start the machine again."),
    ("unknown error", LOST),
)
"""By what the driver said, in lower case, what to do about it."""


def advice(reason: str, otherwise: str = "See what this machine has: edgeres doctor") -> str:
    """Return what to do about a refusal of CUDA, which may stand within other words."""
    lower = reason.lower()
    return next((advice for sign, advice in ADVICE if sign in lower), otherwise)


def failure(doing: str, reason: str) -> BackendError:
    """Return the error for something that the CUDA driver refused, with its own words and what to do next."""
    return BackendError(f"CUDA failed at {doing}: {reason}. {advice(reason)}")


def no_driver(reason: str) -> BackendError:
    """Return the error for a machine on which the CUDA driver's library does not load."""
    return BackendError(
        f"there is no usable NVIDIA driver here ({reason}). Install it, or on a Jetson its JetPack; see: edgeres doctor"
    )


def choose(index: int, count: int) -> None:
    """Refuse the number of a GPU that is not there.

    Raises:
        BackendError: ``index`` is not one of ``count`` GPUs.
    """
    if count < 1:
        raise BackendError("the NVIDIA driver shows no GPU. See what this machine has: edgeres doctor")
    if not 0 <= index < count:
        there = "0" if count == 1 else f"one of 0 to {count - 1}"
        raise BackendError(f"there is no GPU {index}: this machine has {count}. Choose {there}.")


class Graph(Protocol):
    """Work of a stream, recorded once; one thread at a time."""

    def launch(self) -> None:
        """Put the work on the stream that it was recorded on; its addresses are those of then."""

    def destroy(self) -> None:
        """Free it; no launch may be under way."""


class Device(Protocol):
    """One GPU, through its primary context: the one that TensorRT and torch use as well.

    Everything from ``allocate`` on wants that context to be current in the calling thread, so it stands inside
    ``with device.current():``. Addresses, streams and events are plain integers; each belongs to the device that made
    it. Any number of threads may use one device. Every refusal of CUDA is a :class:`edgeres.errors.BackendError`.
    """

    @property
    def index(self) -> int:
        """Which GPU it is, as CUDA counts them."""

    @property
    def name(self) -> str:
        """What the driver calls it, such as ``NVIDIA L4`` or ``Orin``."""

    @property
    def compute_capability(self) -> Tuple[int, int]:
        """Such as (8, 7)."""

    @property
    def driver(self) -> Tuple[int, int]:
        """The newest CUDA that the driver serves, such as (12, 6)."""

    def current(self) -> ContextManager[None]:
        """Make the context current in this thread, and what was current before again at the end."""

    def memory(self) -> Tuple[int, int]:
        """Return free and total memory in bytes; needs no current context."""

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes of device memory."""

    def free(self, address: int) -> None:
        """Free what ``allocate`` gave."""

    def pinned(self, shape: Tuple[int, ...], dtype: Type[np.generic] = np.float32) -> np.ndarray:
        """Return an array in page-locked host memory, which copies need to be asynchronous; values undefined."""

    def free_pinned(self, array: np.ndarray) -> None:
        """Free what ``pinned`` gave; nobody may touch it, nor a view of it, any more."""

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """Begin to copy a C-contiguous array to the device; leave it alone until the stream is synchronized."""

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """Begin to fill a C-contiguous array from the device; leave it alone until the stream is synchronized."""

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Begin to copy bytes within the device; leave both ends alone until the stream is synchronized."""

    def create_stream(self) -> int:
        """Return the handle of a new stream, which does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; work on it must be over."""

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is over; other Python threads go on meanwhile."""

    def synchronize_all(self) -> None:
        """Wait until all work in the context is over, other libraries' too; other Python threads go on meanwhile."""

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        """Return what ``work`` puts on a stream, as a graph; it is recorded, and not run.

        Raises:
            BackendError: the package has no CUDA graphs, or CUDA or ``work`` refuses; the stream is as it was before.
        """

    def record(self, stream: int) -> int:
        """Return a new event that marks the stream's work up to here."""

    def elapsed(self, start: int, end: int) -> float:
        """Wait for two events and return the milliseconds between them; both are spent."""

    def close(self) -> None:
        """Free whatever was not; calling it twice is fine, everything else afterwards is refused."""
