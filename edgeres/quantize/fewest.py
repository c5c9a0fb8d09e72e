"""The fewest layers to give back to float, by what each costs alone and what a net without some of them costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from edgeres.artifacts import LayerCost

TOLERANCE = 0.1
Expected = Callable[[Collection[str]], float]
"""From nodes that are given back to the share of answers that the rest of the quantization changes."""


def fewest(costs: Sequence[LayerCost], expected: Expected, enough: float, most: int) -> tuple[LayerCost, ...]:
    """Return the fewest layers that have to be given back so that no more than ``enough`` of the answers change.

    Layers are taken worst first, a block by its mean over the layers in it; then each that turns out not to be needed,
    least first, is left out again. Where nothing is enough, it is so for what comes within 10 % of the best there is.

    Args:
        costs: of everything that can be given back.
        most: so many layers with weights may be taken.
    """
    order = _order(costs, most)
    if not order:
        return ()
    best = expected(_nodes(order))
    if best > enough:
        enough = (1 + TOLERANCE) * best
    low, high = 1, len(order)
    while low < high:  # the fewest in this order: noise that is taken away does not come back
        middle = (low + high) // 2
        if expected(_nodes(order[:middle])) <= enough:
            high = middle
        else:
            low = middle + 1
    taken = _uncovered(order[:high])
    if len(taken) > 1 and expected(_nodes(taken)) <= enough:
        for cost in sorted(taken, key=lambda cost: (cost.expected, -cost.weighted)):
            rest = [other for other in taken if other is not cost]
            if rest and expected(_nodes(rest)) <= enough:
                taken = rest
    return tuple(taken)


def _order(costs: Sequence[LayerCost], most: int) -> list[LayerCost]:
    """Return what is worth taking, worst first; what is taken already, or would be too much, is passed over."""
    weighted = {node for cost in costs if cost.weighted == len(cost.nodes) for node in cost.nodes}
    taken: set[str] = set()
    order = []
    for cost in sorted(costs, key=_harm):
        nodes = taken.union(cost.nodes)
        if nodes != taken and len(nodes & weighted) <= most:
            order.append(cost)
            taken = nodes
    return order


def _harm(cost: LayerCost) -> tuple[float, float, int]:
    """Return what orders layers, worst first; where no answer is expected to change, noise does."""
    noise = math.inf if cost.sqnr_db is None else cost.sqnr_db + 10 * math.log10(max(1, cost.weighted))
    return -cost.expected / max(1, cost.weighted), noise, cost.weighted


def _uncovered(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """Return ``costs`` without those whose nodes another, larger one has too."""
    return [
        cost for cost in costs if not any(set(cost.nodes) < set(other.nodes) for other in costs if other is not cost)
    ]


def _nodes(costs: Sequence[LayerCost]) -> frozenset[str]:
    return frozenset(node for cost in costs for node in cost.nodes)
