"""Which nodes the recipe keeps in float: patterns of module paths, and of node names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from edgeres.errors import QuantizationError


def kept_nodes(nodes: Iterable[str], modules: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """Return node name → the pattern that keeps it, for the nodes that a pattern keeps.

    Args:
        nodes: the names of all nodes.
        modules: node name → torch module.
        patterns: shell patterns of node names and module paths; a module is kept with all that is inside it.

    Raises:
        QuantizationError: patterns that name nothing, each with the names closest to it.
    """
    names = {node: [node, *_with_parents(modules.get(node, ""))] for node in nodes}
    kept: dict[str, str] = {}
    unmatched = []
    for pattern in patterns:
        found = [node for node, known in names.items() if any(fnmatchcase(name, pattern) for name in known)]
        if not found:
            unmatched.append(pattern)
        for node in found:
            kept.setdefault(node, pattern)
    if unmatched:
        known = sorted({name for group in names.values() for name in group})
        raise QuantizationError(
            f"keep_float names nothing in the model: {'; '.join(_told(pattern, known) for pattern in unmatched)}. "
            "Patterns are of module paths such as layer1.0.conv1 (layer1 keeps all that is inside it) or of node "
            "names; edgeres inspect lists both. A batch norm is part of the convolution in front of it."
        )
    return kept


def _with_parents(module: str) -> list[str]:
    """Return a module's path and those of the modules around it: ``a.b.c`` gives ``a``, ``a.b`` and ``a.b.c``."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _told(pattern: str, known: Sequence[str]) -> str:
    folded = {name.lower(): name for name in known}
    near = [folded[name] for name in get_close_matches(pattern.lower(), folded, n=3)]
    return f"{pattern!r} (did you mean {' or '.join(near)}?)" if near else repr(pattern)
