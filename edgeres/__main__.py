"""``python -m edgeres``, and the command ``edgeres``."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line. Until it is there to answer a Ctrl-C, one ends the process as any other signal would:
    without a traceback through half an import; and so does one that comes when it is done."""
    # torch's threads (libgomp) wait by spinning. Beside anything else that runs they wait for each other most of the
    # time. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from edgeres.cli import main as run

    run()


if __name__ == "__main__":
    main()
