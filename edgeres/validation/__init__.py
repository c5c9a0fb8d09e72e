"""Two sets of logits → statistics → a Report, and its words."""

from __future__ import annotations

from edgeres.validation.compare import attribute_drop, compare
from edgeres.validation.words import advice, decibels, headline

__all__ = ["advice", "attribute_drop", "compare", "decibels", "headline"]
