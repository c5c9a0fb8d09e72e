"""What is known of a bundle → one self-contained page, ``report.html``: no script, nothing loaded from anywhere."""

from __future__ import annotations

from edgeres.page.content import Contents, Flip, Pair, flips, pairs

__all__ = ["Contents", "Flip", "Pair", "flips", "pairs"]
