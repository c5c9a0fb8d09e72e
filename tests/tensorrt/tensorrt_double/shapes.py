"""How the bindings' classes, enums and buffers look from Python, without what they do."""

from __future__ import annotations

import ctypes
from typing import Any


class Class(type):
    """Refuses an instance whose subclass ``__init__`` did not call the base's, as pybind11 does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        if "_state" not in instance.__dict__:
            base = next(base for base in cls.__mro__ if "_surface" in vars(base))
            raise TypeError(f"{base.__name__}.__init__() must be called when overriding __init__")
        return instance


class Instance(metaclass=Class):
    """What every class of the surface inherits: only Python subclasses may have attributes of their own."""

    _state: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # how Python reaches what only a kind of layer has
            if not issubclass(value, type(self)):
                raise TypeError(f"a {type(self).__name__} is no {value.__name__}")
        elif "_surface" in vars(type(self)) and not isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def make_enum(path: str, values: dict[str, int]) -> type:
    """Return an enum as pybind11 makes it: members are no ints, compare by identity of type, and do not shift."""
    name = path.rpartition(".")[2]

    class Enum:
        __slots__ = ("name", "value")

        def __init__(self, value: int) -> None:
            if value not in values.values():
                raise ValueError(f"{value} is not a valid {name}")
            object.__setattr__(self, "value", int(value))
            object.__setattr__(self, "name", next(key for key, each in values.items() if each == value))

        def __setattr__(self, key: str, value: Any) -> None:
            raise AttributeError(f"{name!r} members cannot be changed")

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self) and other.value == self.value  # type: ignore[attr-defined]

        def __hash__(self) -> int:
            return hash(self.value)

        def __int__(self) -> int:
            return self.value

        __index__ = __int__

        def __repr__(self) -> str:
            return f"<{name}.{self.name}: {self.value}>"

        def __str__(self) -> str:
            return f"{name}.{self.name}"

    Enum.__name__ = Enum.__qualname__ = name
    members = {}
    for key, value in values.items():
        member = Enum(value)
        object.__setattr__(member, "name", key)
        members[key] = member
        setattr(Enum, key, member)
    Enum.__members__ = members  # type: ignore[attr-defined]
    return Enum


def make_host_memory(double: Any) -> type:
    """Return IHostMemory: a buffer without ``len()`` or indexing; ``bytes(m)`` and ``write(m)`` do."""

    class IHostMemory(ctypes.Structure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            double.refuse(TypeError, "IHostMemory: no constructor defined")

        @property
        def nbytes(self) -> int:
            return ctypes.sizeof(self)

        @property
        def dtype(self) -> Any:
            return double.member("DataType.INT8")

        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")

    return IHostMemory


def host_memory(double: Any, content: bytes) -> Any:
    """Return an IHostMemory that holds ``content``."""
    fields = {"_fields_": [("_content", ctypes.c_ubyte * len(content))]}
    return type("IHostMemory", (double.classes["IHostMemory"],), fields).from_buffer_copy(content)


def is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def equal_dims(this: Any, other: Any) -> bool:
    if type(other) is not type(this):
        raise TypeError("__eq__(): Dims compare with Dims only; write tuple(dims) == …")
    return bool(this._state["sizes"] == other._state["sizes"])
