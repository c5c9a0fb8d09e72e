"""The architectures with their size, for ``edgeres models``: told from their descriptions, which takes no torch."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Tuple

from edgeres.architectures import ARCHITECTURES, Architecture, layers


def catalog() -> List[Dict[str, Any]]:
    """Return every named architecture with parameters, MACs per image, input size, classes and source."""
    entries = []
    for name, architecture in ARCHITECTURES.items():
        parameters, macs = count(architecture)
        entries.append(
            {
                "name": name,
                "parameters": parameters,
                "macs": macs,
                "size": architecture.size,
                "classes": architecture.num_classes,
                "source": architecture.source,
            }
        )
    return entries


def count(architecture: Architecture) -> Tuple[int, int]:
    """Return the parameters of a net, and the multiply-accumulates of one square image of its own size.

    They are those that :func:`edgeres.models.count` finds in the module.
    """
    parameters, macs = 0, 0
    for layer in layers(architecture):
        weights = math.prod(layer.shape)
        parameters += weights + layer.shape[0] * (2 if layer.norm else 1)
        macs += weights * layer.pixels
    return parameters, macs
