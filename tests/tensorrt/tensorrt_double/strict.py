"""The double itself: a module made from a surface that refuses what the release refuses and records the rest."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorrt_double.acts import ACTS, PROPERTIES, PROPERTY_TYPES
from tensorrt_double.script import Call, Crash, Script
from tensorrt_double.shapes import Class, Instance, equal_dims, is_buffer, make_enum, make_host_memory

SURFACES = Path(__file__).resolve().parent.parent / "surface"


ALIASES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int32": "INT32", "bool": "BOOL", "uint8": "UINT8"}
"""Module attributes of every release for members of DataType."""


@functools.cache
def surface_of(version: str) -> dict[str, Any]:
    """Return a release's surface; nobody may change it."""
    return json.loads((SURFACES / f"{version}.json").read_text(encoding="utf-8"))


class Double:
    """One double: ``module`` goes into ``sys.modules``, ``calls`` and ``refusals`` say what was done with it.

    ``submit(stream, work)`` runs what ``execute_async_v3`` enqueues; a device double sets its own, to run it when the
    stream is synchronized. ``calibration`` is what the calibrator handed to the build, ``pinned`` the precisions that
    it was asked to keep: layer → DataType, where a flag says that they count.
    """

    def __init__(self, version: str, script: Script | None = None, name: str = "tensorrt") -> None:
        self.version = version
        self.script = script or Script()
        self.calls: list[Call] = []
        self.refusals: list[str] = []
        self.calibration: bytes | None = None
        self.pinned: dict[str, str] = {}
        self.submit: Callable[[int, Callable[[], None]], None] = lambda stream, work: work()
        self.surface = surface_of(version)
        self.enums = {path: make_enum(path, values) for path, values in self.surface["enums"].items()}
        self.classes: dict[str, type] = {}
        for path, facts in sorted(self.surface["classes"].items(), key=lambda item: len(item[1]["bases"])):
            self.classes[path] = self._class(path, facts)
        self.module = self._module(name)

    # What a test asks afterwards.

    def called(self, path: str) -> list[dict[str, Any]]:
        """Return the arguments of every call of ``Class.method``, in order."""
        return [call.arguments for call in self.calls if call.kind == "call" and call.path == path]

    def was_set(self, path: str) -> list[Any]:
        """Return every value that the property ``Class.name`` was set to, in order."""
        return [call.arguments["value"] for call in self.calls if call.kind == "set" and call.path == path]

    def touched(self, *kinds: str) -> set[str]:
        """Return the paths that were called, read or set."""
        return {call.path for call in self.calls if not kinds or call.kind in kinds}

    def member(self, path: str) -> Any:
        """Return the enum member ``Enum.NAME``."""
        enum, _, name = path.rpartition(".")
        return getattr(self.enums[enum], name)

    # What the behaviours below use.

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))

    def make(self, path: str, **state: Any) -> Any:
        """Return an instance that Python code could not construct itself."""
        instance = self.classes[path].__new__(self.classes[path])
        object.__setattr__(instance, "_state", state)
        return instance

    def log(self, logger: Any, severity: str, text: str) -> None:
        """Hand a message to a logger; the real one survives an exception there, but prints it: a defect of ours."""
        try:
            logger.log(self.member(f"ILogger.Severity.{severity}"), text)
        except Exception as problem:
            raise Crash(f"ILogger.log raised {problem!r}") from problem

    def record(self, kind: str, path: str, arguments: dict[str, Any]) -> None:
        kept = {key: type(value).__name__ if isinstance(value, Instance) else value for key, value in arguments.items()}
        self.calls.append(Call(kind, path, kept))

    def refuse(self, kind: type, text: str) -> Any:
        self.refusals.append(text)
        raise kind(text)

    # How classes come about.

    def _module(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__dict__["__version__"] = self.surface["version"]
        for path, made in [*self.classes.items(), *self.enums.items()]:
            if "." not in path:
                setattr(module, path, made)
        for path in ("ILogger", "Logger"):
            self.classes[path].Severity = self.enums["ILogger.Severity"]
            for member in self.surface["enums"]["ILogger.Severity"]:
                setattr(self.classes[path], member, self.member(f"ILogger.Severity.{member}"))
        for alias, member in ALIASES.items():
            setattr(module, alias, self.member(f"DataType.{member}"))
        for function, spec in self.surface["functions"].items():
            setattr(module, function, self._function(f"module.{function}", spec))
        return module

    def _function(self, path: str, spec: dict[str, str]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            return self._perform(path, spec, None, args, kwargs)

        return function

    def _class(self, path: str, facts: dict[str, Any]) -> type:
        if path == "IHostMemory":
            return make_host_memory(self)
        body: dict[str, Any] = {"__init__": self._constructor(path, facts["methods"].get("__init__"))}
        for name, spec in facts["methods"].items():
            if name != "__init__":
                body[name] = self._method(f"{path}.{name}", spec)
        for name, settable in facts["properties"].items():
            body[name] = self._property(f"{path}.{name}", settable)
        if path == "Dims":
            body.update(__repr__=lambda this: repr(tuple(this._state["sizes"])), __eq__=equal_dims, __hash__=None)
        bases = tuple(self.classes[base] for base in facts["bases"]) or (Instance,)
        made = Class(path, bases, body)
        made._surface = True  # type: ignore[attr-defined]
        return made

    def _constructor(self, path: str, spec: dict[str, str] | None) -> Callable[..., None]:
        def __init__(this: Any, *args: Any, **kwargs: Any) -> None:
            if spec is None:
                self.refuse(TypeError, f"{path}: no constructor defined")
            if path == "Dims" and len(args) == 1 and not kwargs and self._fits(args[0], "Dims"):
                object.__setattr__(this, "_state", {"sizes": [int(size) for size in args[0]]})
                return
            given = self._bind(f"{path}()", spec or {}, args, kwargs)
            object.__setattr__(this, "_state", {"sizes": []} if path == "Dims" else dict(given))
            self.record("call", path, given)
            if isinstance(self.script.returns.get(path), Exception):
                raise self.script.returns[path]
            if f"{path}.__init__" in ACTS:
                ACTS[f"{path}.__init__"](self, this, **given)

        return __init__

    def _method(self, path: str, spec: dict[str, str]) -> Callable[..., Any]:
        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            return self._perform(path, spec, this, args, kwargs)

        return method

    def _perform(self, path: str, spec: dict[str, str], this: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = self._bind(path, spec, args, kwargs)
        if path.startswith("Dims."):
            return ACTS[path](self, this, **given)
        self.record("call", path, given)
        if path in self.script.returns:
            scripted = self.script.returns[path]
            return scripted(**given) if callable(scripted) else scripted
        if path in ACTS:
            return ACTS[path](self, this, **given)
        if spec["return"] == "None":
            return None
        raise Crash(f"the double does not know what {path} returns; script it: Script(returns={{{path!r}: …}})")

    def _bind(self, path: str, spec: dict[str, str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return parameter → argument, or refuse as pybind11 does."""
        parameters = [name for name in spec if name != "return"]
        names = [name.rstrip("?") for name in parameters]
        given = dict(zip(names, args, strict=False))
        wrong = len(args) > len(names) or any(key not in names or key in given for key in kwargs)
        given.update(kwargs)
        wrong = wrong or any(not parameter.endswith("?") and parameter not in given for parameter in parameters)
        if not wrong:
            kinds = {parameter.rstrip("?"): spec[parameter] for parameter in parameters}
            wrong = not all(self._fits(value, kinds[name]) for name, value in given.items())
        if wrong:
            wanted = ", ".join(f"{name}: {spec[name]}" for name in parameters)
            got = ", ".join([*(repr(value) for value in args), *(f"{key}={value!r}" for key, value in kwargs.items())])
            self.refuse(TypeError, f"{path}: incompatible arguments; wanted ({wanted}), got ({got}) in {self.version}")
        return given

    def _fits(self, value: Any, kind: str) -> bool:
        if kind.endswith("?"):
            return value is None or self._fits(value, kind[:-1])
        if kind in self.enums:
            return isinstance(value, self.enums[kind])
        if kind in ("Dims", "tuple"):
            if kind == "Dims" and isinstance(value, self.classes["Dims"]):
                return True
            plain = isinstance(value, tuple) or (kind == "Dims" and isinstance(value, list))
            return plain and all(hasattr(size, "__index__") for size in value)
        if kind in self.classes:
            return isinstance(value, self.classes[kind])
        if kind.startswith("list["):
            return isinstance(value, (list, tuple)) and all(self._fits(each, kind[5:-1]) for each in value)
        if kind in ("object", "capsule"):
            return True
        if kind == "buffer":
            return is_buffer(value)
        if kind in ("int", "float"):
            return hasattr(value, "__index__") or (kind == "float" and hasattr(value, "__float__"))
        if kind in ("bool", "str"):
            return isinstance(value, {"bool": bool, "str": str}[kind])
        raise Crash(f"the double has no {kind}: edgeres was not meant to need it")

    def _property(self, path: str, settable: bool) -> property:
        owner, _, name = path.partition(".")

        def read(this: Any) -> Any:
            if owner == "Dims":
                return 8
            key = path if path in this._state else name
            if key not in this._state and path not in PROPERTIES:
                raise Crash(f"the double does not know {path}; give it a value in PROPERTIES")
            value = this._state[key] if key in this._state else PROPERTIES[path](self, this)
            self.record("get", path, {"value": value})
            return value

        def write(this: Any, value: Any) -> None:
            kind = PROPERTY_TYPES.get(path, "object")
            if not self._fits(value, kind):
                self.refuse(TypeError, f"{path} = {value!r}: wanted {kind} in {self.version}")
            this._state[name] = value
            self.record("set", path, {"value": value})

        return property(read, write if settable else None)
