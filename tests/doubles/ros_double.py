"""ROS 2 as far as the example node speaks with it: strict doubles of rclpy, launch and the messages, as of Humble.

ROS is not in Python's package index, so tests have none. Written after the signatures in rclpy's ``node.py`` and
``qos.py``, the message definitions (common_interfaces, vision_msgs 4) and the setters that rosidl generates for them.
Every name, argument and field that these do not have raises, and so does a value of another type. :func:`installed`
lays the modules under their real names, over a :class:`World`: what the node did, and what will happen to it.
"""

from __future__ import annotations

import array
import sys
import threading
import types
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple


class World:
    """What is outside of a node.

    ``overrides`` are the parameters it is started with. ``script`` is what ``rclpy.spin`` meets, in order: a pair of a
    topic and a message, the name of a timer's callback, a callable, or an exception to raise; at the end is a Ctrl-C.
    ``published`` holds pairs of a topic and a message, ``logged`` pairs of a level and a text.
    """

    def __init__(self) -> None:
        self.overrides: Dict[str, Any] = {}
        self.script: List[Any] = []
        self.published: List[Tuple[str, Any]] = []
        self.logged: List[Tuple[str, str]] = []
        self.context: Optional[Context] = None
        self.nodes: List[Node] = []

    def on(self, topic: str) -> List[Any]:
        """Return the messages that were published on a topic."""
        return [message for name, message in list(self.published) if name == topic]


WORLD = World()


class RCLError(RuntimeError):
    """What rclpy's C extension raises, such as for a publisher whose context is gone."""


class ExternalShutdownException(Exception):
    pass


class ParameterException(Exception):
    def __init__(self, error_msg: str, parameters: Any) -> None:
        super().__init__(f"{error_msg}: {parameters}")


class InvalidParameterTypeException(ParameterException):
    pass


class ParameterAlreadyDeclaredException(ParameterException):
    pass


class NotInitializedException(Exception):
    pass


class Context:
    def __init__(self) -> None:
        self._valid = True

    def ok(self) -> bool:
        return self._valid

    def try_shutdown(self) -> None:
        self._valid = False


# Messages


def message(name: str, constants: Optional[Dict[str, Any]] = None, /, **fields: Callable[[Any], bool]) -> type:
    """Return a class as rosidl generates it: fields by keyword, each checked whenever it is set."""

    def __init__(self: Any, /, **given: Any) -> None:
        assert set(given) <= set(fields), f"Invalid arguments passed to constructor: {sorted(set(given) - set(fields))}"
        for field, check in fields.items():
            setattr(self, field, given.get(field, check.default()))  # type: ignore[attr-defined]

    def __setattr__(self: Any, field: str, value: Any) -> None:
        if field not in fields:
            raise AttributeError(f"{name!r} object has no attribute {field!r}")
        assert fields[field](value), f"The {field!r} field of {name} cannot be {value!r}"
        if fields[field] is octets and not isinstance(value, array.array):
            value = array.array("B", value)
        object.__setattr__(self, field, value)

    return type(name, (), {"__init__": __init__, "__setattr__": __setattr__, **(constants or {})})


def kind(default: Callable[[], Any], check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check of one field's values, with what the field holds at first."""

    def allowed(value: Any) -> bool:
        return check(value)

    allowed.default = default  # type: ignore[attr-defined]
    return allowed


def whole(bits: int, low: int = 0) -> Callable[[Any], bool]:
    return kind(int, lambda value: type(value) is int and low <= value < 2**bits)


def nested(of: type) -> Callable[[Any], bool]:
    return kind(of, lambda value: isinstance(value, of))


def many(of: type) -> Callable[[Any], bool]:
    return kind(list, lambda value: isinstance(value, (list, tuple)) and all(isinstance(one, of) for one in value))


text = kind(str, lambda value: isinstance(value, str))
flag = kind(bool, lambda value: isinstance(value, bool))
number = kind(float, lambda value: isinstance(value, float))
byte = kind(lambda: b"\0", lambda value: isinstance(value, bytes) and len(value) == 1)
octets = kind(lambda: array.array("B"), lambda value: isinstance(value, (bytes, bytearray, array.array)))

Time = message("Time", sec=whole(31, -(2**31)), nanosec=whole(32))
Header = message("Header", stamp=nested(Time), frame_id=text)
Image = message(
    "Image",
    header=nested(Header),
    height=whole(32),
    width=whole(32),
    encoding=text,
    is_bigendian=whole(8),
    step=whole(32),
    data=octets,
)
ObjectHypothesis = message("ObjectHypothesis", class_id=text, score=number)
Classification = message("Classification", header=nested(Header), results=many(ObjectHypothesis))
KeyValue = message("KeyValue", key=text, value=text)
DiagnosticStatus = message(
    "DiagnosticStatus",
    {"OK": b"\x00", "WARN": b"\x01", "ERROR": b"\x02", "STALE": b"\x03"},
    level=byte,
    name=text,
    message=text,
    hardware_id=text,
    values=many(KeyValue),
)
DiagnosticArray = message("DiagnosticArray", header=nested(Header), status=many(DiagnosticStatus))
ParameterDescriptor = message(
    "ParameterDescriptor",
    name=text,
    type=whole(8),
    description=text,
    additional_constraints=text,
    read_only=flag,
    dynamic_typing=flag,
)


# Quality of service


class HistoryPolicy(IntEnum):
    SYSTEM_DEFAULT, KEEP_LAST, KEEP_ALL, UNKNOWN = range(4)


class ReliabilityPolicy(IntEnum):
    SYSTEM_DEFAULT, RELIABLE, BEST_EFFORT, UNKNOWN = range(4)


class DurabilityPolicy(IntEnum):
    SYSTEM_DEFAULT, TRANSIENT_LOCAL, VOLATILE, UNKNOWN = range(4)


class QoSProfile:
    def __init__(self, **policies: Any) -> None:
        kinds = {
            "history": HistoryPolicy,
            "depth": int,
            "reliability": ReliabilityPolicy,
            "durability": DurabilityPolicy,
        }
        assert set(policies) <= set(kinds), f"Invalid arguments passed to constructor: {sorted(policies)}"
        assert all(isinstance(value, kinds[name]) for name, value in policies.items())
        assert "depth" in policies, "History set to KEEP_LAST without a depth setting."
        self.history: HistoryPolicy = policies.get("history", HistoryPolicy.KEEP_LAST)
        self.depth: int = policies["depth"]
        self.reliability: ReliabilityPolicy = policies.get("reliability", ReliabilityPolicy.RELIABLE)
        self.durability: DurabilityPolicy = policies.get("durability", DurabilityPolicy.VOLATILE)


def profile(qos: Any) -> QoSProfile:
    if not isinstance(qos, (QoSProfile, int)):
        raise TypeError(f"Expected QoSProfile or int, but received {type(qos)!r}")
    return qos if isinstance(qos, QoSProfile) else QoSProfile(depth=qos)


# Nodes


class Parameter:
    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value


class Logger:
    """Levels as rclpy has them; ``throttle_duration_sec``, ``skip_first`` and ``once`` are not spoken here."""

    def info(self, message: str) -> bool:
        return self._log("info", message)

    def warning(self, message: str) -> bool:
        return self._log("warning", message)

    def error(self, message: str) -> bool:
        return self._log("error", message)

    def fatal(self, message: str) -> bool:
        return self._log("fatal", message)

    def _log(self, level: str, message: str) -> bool:
        assert isinstance(message, str)
        WORLD.logged.append((level, message))
        return True


class Publisher:
    def __init__(self, topic: str, of: type, qos: QoSProfile, node: Node) -> None:
        self.topic, self.qos_profile = topic, qos
        self._of, self._node = of, node

    def publish(self, msg: Any) -> None:
        if not isinstance(msg, self._of):
            raise TypeError(f"Expected {self._of}, got {type(msg)}")
        if not self._node.context.ok() or self._node not in WORLD.nodes:
            raise RCLError("Failed to publish: publisher's context is invalid")
        WORLD.published.append((self.topic, msg))


class RosTime:
    def to_msg(self) -> Any:
        return Time(sec=1700000000, nanosec=5)


class Clock:
    def now(self) -> RosTime:
        return RosTime()


class Node:
    """Topics are expanded as ROS does (``~/x`` and ``x``) and not remapped."""

    def __init__(
        self,
        node_name: str,
        *,
        context: Optional[Context] = None,
        cli_args: Optional[List[str]] = None,
        namespace: Optional[str] = None,
        use_global_arguments: bool = True,
        enable_rosout: bool = True,
        start_parameter_services: bool = True,
        parameter_overrides: Optional[List[Parameter]] = None,
        allow_undeclared_parameters: bool = False,
        automatically_declare_parameters_from_overrides: bool = False,
    ) -> None:
        if WORLD.context is None or not WORLD.context.ok():
            raise NotInitializedException("cannot create node")
        self._name = node_name
        self._context = WORLD.context
        self._declared: Dict[str, Any] = {}
        self.subscribed: Dict[str, Tuple[type, Callable[[Any], None], QoSProfile]] = {}
        self.timed: Dict[str, Tuple[float, Callable[[], None]]] = {}
        WORLD.nodes.append(self)

    @property
    def context(self) -> Context:
        return self._context

    def get_name(self) -> str:
        return self._name

    def get_logger(self) -> Logger:
        return Logger()

    def get_clock(self) -> Clock:
        return Clock()

    def declare_parameter(
        self, name: str, value: Any = None, descriptor: Any = None, ignore_override: bool = False
    ) -> Parameter:
        if name in self._declared:
            raise ParameterAlreadyDeclaredException("Parameter(s) already declared", name)
        assert descriptor is None or isinstance(descriptor, ParameterDescriptor)
        self._declared[name] = descriptor
        given = value if ignore_override else WORLD.overrides.get(name, value)
        if type(given) is not type(value):
            raise InvalidParameterTypeException(f"Trying to set parameter {name!r} to {given!r}", name)
        return Parameter(name, given)

    def create_publisher(
        self,
        msg_type: type,
        topic: str,
        qos_profile: Any,
        *,
        callback_group: Any = None,
        event_callbacks: Any = None,
        qos_overriding_options: Any = None,
    ) -> Publisher:
        return Publisher(self._expanded(topic), msg_type, profile(qos_profile), self)

    def create_subscription(
        self,
        msg_type: type,
        topic: str,
        callback: Callable[[Any], None],
        qos_profile: Any,
        *,
        callback_group: Any = None,
        event_callbacks: Any = None,
        qos_overriding_options: Any = None,
        raw: bool = False,
    ) -> None:
        self.subscribed[self._expanded(topic)] = msg_type, callback, profile(qos_profile)

    def create_timer(
        self, timer_period_sec: float, callback: Callable[[], None], callback_group: Any = None, clock: Any = None
    ) -> None:
        self.timed[callback.__name__] = float(timer_period_sec), callback

    def destroy_node(self) -> bool:
        WORLD.nodes.remove(self)
        return True

    def _expanded(self, topic: str) -> str:
        assert topic
        assert " " not in topic
        if topic.startswith("~/"):
            return f"/{self._name}/{topic[2:]}"
        return topic if topic.startswith("/") else f"/{topic}"


def init(
    *, args: Optional[List[str]] = None, context: Optional[Context] = None, domain_id: Optional[int] = None
) -> None:
    if WORLD.context is not None and WORLD.context.ok():
        raise RuntimeError("Context.init() must only be called once")
    WORLD.context = Context()


def spin(node: Node, executor: Any = None) -> None:
    """Let the script happen; then a Ctrl-C, which since Humble ends the context before ``spin`` raises."""
    assert node in WORLD.nodes
    for event in WORLD.script:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, str):
            node.timed[event][1]()
        elif isinstance(event, tuple):
            of, callback, _ = node.subscribed[event[0]]
            assert isinstance(event[1], of)
            callback(event[1])
        else:
            event()
    assert WORLD.context is not None
    WORLD.context.try_shutdown()
    raise KeyboardInterrupt


def try_shutdown(*, context: Optional[Context] = None, uninstall_handlers: Optional[bool] = None) -> None:
    if WORLD.context is not None:
        WORLD.context.try_shutdown()


# Launch: a description is kept as it was written, and each class takes what the real one takes.


class Substitution:
    pass


class LaunchConfiguration(Substitution):
    def __init__(self, variable_name: str, *, default: Any = None) -> None:
        self.variable_name = variable_name


class PathJoinSubstitution(Substitution):
    def __init__(self, substitutions: List[Any]) -> None:
        self.substitutions = substitutions


class FindPackageShare(Substitution):
    def __init__(self, package: str) -> None:
        self.package = package


class ParameterValue:
    def __init__(self, value: Any, *, value_type: Any = None) -> None:
        self.value, self.value_type = value, value_type


class DeclareLaunchArgument:
    def __init__(self, name: str, *, default_value: Any = None, description: Optional[str] = None) -> None:
        self.name, self.default_value, self.description = name, default_value, description


class LaunchNode:
    def __init__(
        self,
        *,
        executable: str,
        package: Optional[str] = None,
        name: Optional[str] = None,
        namespace: Optional[str] = None,
        parameters: Any = None,
        remappings: Any = None,
        arguments: Any = None,
        output: str = "log",
    ) -> None:
        self.executable, self.package, self.name = executable, package, name
        self.parameters, self.remappings = parameters, remappings


class LaunchDescription:
    def __init__(self, initial_entities: Any = None) -> None:
        self.entities = list(initial_entities or ())


MODULES: Dict[str, Dict[str, Any]] = {
    "rclpy": {"init": init, "spin": spin, "try_shutdown": try_shutdown},
    "rclpy.node": {"Node": Node},
    "rclpy.qos": {one.__name__: one for one in (DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy)},
    "rclpy.executors": {"ExternalShutdownException": ExternalShutdownException},
    "rclpy.exceptions": {"ParameterException": ParameterException},
    "rclpy.logging": {"get_logger": lambda name: Logger()},
    "rcl_interfaces.msg": {"ParameterDescriptor": ParameterDescriptor},
    "builtin_interfaces.msg": {"Time": Time},
    "std_msgs.msg": {"Header": Header},
    "sensor_msgs.msg": {"Image": Image},
    "vision_msgs.msg": {"Classification": Classification, "ObjectHypothesis": ObjectHypothesis},
    "diagnostic_msgs.msg": {one.__name__: one for one in (DiagnosticArray, DiagnosticStatus, KeyValue)},
    "launch": {"LaunchDescription": LaunchDescription},
    "launch.actions": {"DeclareLaunchArgument": DeclareLaunchArgument},
    "launch.substitutions": {
        "LaunchConfiguration": LaunchConfiguration,
        "PathJoinSubstitution": PathJoinSubstitution,
    },
    "launch_ros.actions": {"Node": LaunchNode},
    "launch_ros.parameter_descriptions": {"ParameterValue": ParameterValue},
    "launch_ros.substitutions": {"FindPackageShare": FindPackageShare},
}


@contextmanager
def installed() -> Iterator[World]:
    """Lay the doubles under ROS's names, over a world of their own; what was imported over them goes with them."""
    before = dict(sys.modules)
    WORLD.__init__()  # type: ignore[misc]
    for name, members in MODULES.items():
        package = name.split(".")[0]
        sys.modules.setdefault(package, types.ModuleType(package))
        module = sys.modules.setdefault(name, types.ModuleType(name))
        for member, value in members.items():
            setattr(module, member, value)
    try:
        yield WORLD
    finally:
        packages = {name.split(".")[0] for name in MODULES}
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in packages or name == "edgeres_ros.node":
                del sys.modules[name]


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for another thread; fail where it takes too long."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if true():
            return
        pause.wait(0.005)
    raise AssertionError("what was waited for did not happen")
