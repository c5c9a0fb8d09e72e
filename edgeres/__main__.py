"""``python -m edgeres``, and the command ``edgeres``."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line. Until it is there to answer a Ctrl-C, one ends the process as any other signal would:
    without a traceback through half an import; and so does one that comes when it is done."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from edgeres.cli import main as run

    run()


if __name__ == "__main__":
    main()
