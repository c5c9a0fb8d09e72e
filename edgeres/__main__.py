"""``python -m edgeres``."""

from __future__ import annotations

from edgeres.cli import main

if __name__ == "__main__":
    main()
