"""Two sets of logits → statistics → a Report, and its words."""

from __future__ import annotations

from edgeres.validation.baseline import against_baseline
from edgeres.validation.cases import short_form
from edgeres.validation.compare import attribute_drop, check_rules, compare
from edgeres.validation.latency import Limits, against_limits, latency_failure, limit_headline
from edgeres.validation.words import advice, baseline_headline, decibels, doubts, fallen_words, headline

__all__ = [
    "Limits",
    "advice",
    "against_baseline",
    "against_limits",
    "attribute_drop",
    "baseline_headline",
    "check_rules",
    "compare",
    "decibels",
    "doubts",
    "fallen_words",
    "headline",
    "latency_failure",
    "limit_headline",
    "short_form",
]
