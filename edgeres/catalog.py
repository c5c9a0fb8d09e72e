"""The architectures with their size, for ``edgeres models``."""

from __future__ import annotations

import importlib.util
from typing import Any, Dict, List

from edgeres.architectures import ARCHITECTURES
from edgeres.errors import MissingPackageError


def catalog() -> List[Dict[str, Any]]:
    """Return every named architecture with parameters, MACs per image, input size, classes and source.

    Raises:
        MissingPackageError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError.for_extra("torch", "counting parameters", "host")
    from edgeres import models

    entries = []
    for name, architecture in ARCHITECTURES.items():
        parameters, macs = models.count(models.outline(name), (architecture.size, architecture.size))
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
