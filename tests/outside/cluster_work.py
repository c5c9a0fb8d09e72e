"""Work for the workers of a cluster that goes wrong: found there by its name, as edgeres' own is."""

from __future__ import annotations

import os
import signal
import time

from edgeres.samples import Samples


def die(samples: Samples) -> None:
    """End the worker, as a lack of memory would."""
    os.kill(os.getpid(), signal.SIGKILL)


def slow(samples: Samples) -> int:
    """Take a while, and return how many samples there were."""
    time.sleep(0.2)
    return len(samples)
