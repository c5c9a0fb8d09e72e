"""A strict, recording double of the ``tensorrt`` module, for each release whose surface lies in ``../surface``.

It refuses what the release's own bindings refuse: an attribute or enum member that the release does not have, a wrong
number of arguments, an unknown keyword, a wrong type (an int is no enum member), a property that cannot be set, and a
subclass that does not call its base's ``__init__``. What would crash or corrupt a real process (an object freed too
early, one context in two threads, a wild address) raises :class:`Crash`, which no ``except Exception`` catches.

    from tensorrt_double import Double, ParseError, Script

    double = Double("10.3", Script(parse_errors=(ParseError("no importer for op Foo"),)))
    monkeypatch.setitem(sys.modules, "tensorrt", double.module)

Every call and every property read or set is in ``double.calls``, in order; every refused one is in ``double.refusals``.
"""

from __future__ import annotations

from tensorrt_double import building, running
from tensorrt_double.device import HostDevice
from tensorrt_double.script import Call, Crash, Layer, ParseError, Script, Tensor
from tensorrt_double.strict import Double

VERSIONS = ("8.5", "8.6", "10.3", "10.7", "10.13", "10.16", "11.0", "11.4")

__all__ = [
    "VERSIONS",
    "Call",
    "Crash",
    "Double",
    "HostDevice",
    "Layer",
    "ParseError",
    "Script",
    "Tensor",
    "building",
    "running",
]
