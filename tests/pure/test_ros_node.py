"""The example's ROS 2 node and launch file, over strict doubles: ROS is not in Python's package index.

That the doubles refuse what rclpy does not have is tested here too; that rclpy has what they have, only ROS can tell.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Set

import numpy as np
import pytest
import ros_double

import edgeres
from edgeres_ros.core import Classifier, Settings

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/ros2"


@pytest.fixture
def world() -> Iterator[ros_double.World]:
    with ros_double.installed() as world:
        yield world


@pytest.fixture
def node(world: ros_double.World, summing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node's module; its engine sums the channels of 4 × 4 pixels. ``node.runner`` is what computes there."""
    module: Any = importlib.import_module("edgeres_ros.node")
    engine, module.runner = summing()

    def open_classifier(settings: Settings, deliver: Any) -> Classifier:
        module.settings = settings
        module.classifier = Classifier(engine, ["red", "green", "blue"], settings, deliver)
        return module.classifier

    monkeypatch.setattr(module, "open_classifier", open_classifier)
    return module


def image(value: int = 1, **changes: Any) -> Any:
    header = ros_double.Header(stamp=ros_double.Time(sec=7, nanosec=9), frame_id="camera")
    pixels = np.full((4, 4, 3), value, np.uint8)
    fields: Dict[str, Any] = {"height": 4, "width": 4, "encoding": "rgb8", "step": 12, "data": pixels.tobytes()}
    return ros_double.Image(**{"header": header, **fields, **changes})


def answered(world: ros_double.World, count: int) -> Callable[[], None]:
    return lambda: ros_double.wait_until(lambda: len(world.on("/edgeres_classifier/classification")) >= count)


def settled(node: Any) -> Callable[[], None]:
    def wait() -> None:
        total = node.classifier._total
        ros_double.wait_until(lambda: total.received == total.answered + total.dropped + total.refused + total.failed)

    return wait


def test_images_become_classifications_and_diagnostics(world: ros_double.World, node: Any) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0, 2] = 3
    world.overrides = {"bundle": "build/digits-int8", "top_k": 2}
    world.script = [("/image", image(data=pixels.tobytes())), answered(world, 1), settled(node), "_diagnose"]
    assert node.main() == 0
    (message,) = world.on("/edgeres_classifier/classification")
    assert (message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id) == (7, 9, "camera")
    assert [hypothesis.class_id for hypothesis in message.results] == ["blue", "red"]
    total = np.exp(3) + 2
    np.testing.assert_allclose([one.score for one in message.results], [np.exp(3) / total, 1 / total])
    (diagnostics,) = world.on("/diagnostics")
    (status,) = diagnostics.status
    assert (status.level, status.name, status.hardware_id) == (b"\x00", "edgeres_classifier: engine", "cpu")
    assert diagnostics.header.stamp.sec == 1700000000
    values = {pair.key: pair.value for pair in status.values}
    assert (values["bundle"], values["answered"], values["dropped"]) == ("build/digits-int8", "1", "0")
    assert float(values["latency p50 (ms)"]) <= float(values["latency p99 (ms)"])
    assert values["signature"] == "not asked"
    ((first, _), (second, told)) = world.logged
    assert (first, second) == ("info", "warning")
    assert "trusted_keys is empty" in told


def test_where_a_key_is_named_nothing_is_warned_of(world: ros_double.World, node: Any) -> None:
    world.overrides = {"bundle": "b", "trusted_keys": "lab.pub"}
    assert node.main() == 0
    assert [level for level, _ in world.logged] == ["info"]


def test_the_camera_is_heard_as_sensors_are_and_the_rest_is_kept_for_one(world: ros_double.World, node: Any) -> None:
    seen: Dict[str, Any] = {}

    def look() -> None:
        (one,) = world.nodes
        seen.update(subscribed=one.subscribed["/image"], timed=one.timed["_diagnose"], declared=one._declared)

    world.overrides = {"bundle": "b", "diagnostics_period": 2.5}
    world.script = [look]
    assert node.main() == 0
    of, _, qos = seen["subscribed"]
    assert of is ros_double.Image
    assert (qos.history, qos.depth) == (ros_double.HistoryPolicy.KEEP_LAST, 1)
    assert (qos.reliability, qos.durability) == (
        ros_double.ReliabilityPolicy.BEST_EFFORT,
        ros_double.DurabilityPolicy.VOLATILE,
    )
    assert seen["timed"][0] == 2.5
    assert set(seen["declared"]) == set(Settings._fields)
    assert all(one.read_only and one.description for one in seen["declared"].values())
    assert node.settings == Settings("b", diagnostics_period=2.5)


def test_a_damaged_image_is_a_diagnostic_and_said_once(world: ros_double.World, node: Any) -> None:
    damaged = ("/image", image(step=11))
    world.overrides = {"bundle": "b", "trusted_keys": "lab.pub"}
    world.script = [damaged, settled(node), "_diagnose", damaged, settled(node), "_diagnose"]
    world.script += [("/image", image()), settled(node), "_diagnose"]
    assert node.main() == 0
    first, second, third = (message.status[0] for message in world.on("/diagnostics"))
    assert first.level == second.level == b"\x02"
    assert "its rows have 11 bytes" in first.message
    assert third.level == b"\x00"
    assert [level for level, _ in world.logged] == ["info", "warning"]
    assert len(world.on("/edgeres_classifier/classification")) == 1


@pytest.mark.parametrize("end", [None, ros_double.ExternalShutdownException()])
def test_it_ends_cleanly(world: ros_double.World, node: Any, end: Any) -> None:
    world.overrides = {"bundle": "b"}
    world.script = [("/image", image()), answered(world, 1), *([end] if end else [])]
    assert node.main() == 0
    assert node.runner.closed
    assert world.nodes == []
    assert world.context is not None
    assert not world.context.ok()
    assert not [thread for thread in threading.enumerate() if thread.name == "edgeres-classifier"]


def test_a_ctrl_c_in_the_midst_of_an_answer_is_no_problem(world: ros_double.World, node: Any) -> None:
    """Since Humble the context is gone before spin returns, and an answer that is under way cannot be published."""
    begun = threading.Event()

    def meanwhile(batch: np.ndarray) -> None:
        begun.set()
        ros_double.wait_until(lambda: world.context is not None and not world.context.ok())

    node.runner.meanwhile = meanwhile
    world.overrides = {"bundle": "b"}
    world.script = [("/image", image()), lambda: begun.wait(30)]
    assert node.main() == 0
    assert world.published == []
    assert node.classifier._total.failed == 0
    assert node.runner.closed


def test_a_publisher_that_fails_while_ros_runs_is_told(world: ros_double.World, node: Any) -> None:
    world.overrides = {"bundle": "b"}

    def lose(publisher: Any, message: Any) -> None:
        raise ros_double.RCLError("out of memory")

    def replace() -> None:
        world.nodes[0]._answers.publish = lambda message: lose(None, message)  # type: ignore[attr-defined]

    world.script = [replace, ("/image", image()), settled(node), "_diagnose"]
    assert node.main() == 0
    (message,) = world.on("/diagnostics")
    assert "RCLError: out of memory" in message.status[0].message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"bundle": "nowhere/at-all"}, "nowhere/at-all"),
        ({}, "bundle is empty. Name the folder"),
        ({"bundle": "b", "threshold": 1}, "'threshold'"),
        ({"bundle": "b", "top_k": -1, "threshold": 2.0}, "2 problems"),
    ],
)
def test_it_does_not_start_with_what_cannot_work(world: ros_double.World, overrides: Any, words: str) -> None:
    world.overrides = overrides
    world.script = [AssertionError("it must not spin")]
    assert importlib.import_module("edgeres_ros.node").main() == 1
    ((level, text),) = world.logged
    assert level == "fatal"
    assert words in text
    assert world.context is not None
    assert not world.context.ok()


@pytest.mark.parametrize(
    "breach",
    [
        lambda node: node.create_publisher(ros_double.Image, "image"),
        lambda node: node.create_publisher(ros_double.Image, "image", 1, qos=1),
        lambda node: node.create_publisher(ros_double.Image, "image", "1"),
        lambda node: node.create_publisher(ros_double.Image, "image", 1).publish(ros_double.Header()),
        lambda node: node.create_subscription(ros_double.Image, "image", print),
        lambda node: node.declare_param("bundle", ""),
        lambda node: node.get_logger().warn_once("x"),
        lambda node: ros_double.QoSProfile(queue_size=1),
        lambda node: ros_double.QoSProfile(history=ros_double.HistoryPolicy.KEEP_LAST),
        lambda node: ros_double.Image(size=3),
        lambda node: ros_double.Image(height=-1),
        lambda node: ros_double.Image(width=4.0),
        lambda node: ros_double.ObjectHypothesis(class_id=3),
        lambda node: ros_double.ObjectHypothesis(score=np.float32(0.5)),
        lambda node: ros_double.ObjectHypothesis(id="3"),
        lambda node: ros_double.DiagnosticStatus(level=0),
        lambda node: ros_double.DiagnosticStatus(values=[("a", "b")]),
        lambda node: setattr(ros_double.Header(), "seq", 3),
        lambda node: ros_double.LaunchNode(node_executable="x"),
    ],
)
def test_the_doubles_refuse_what_ros_does_not_have(world: ros_double.World, breach: Callable[[Any], Any]) -> None:
    ros_double.init()
    with pytest.raises((TypeError, AttributeError, AssertionError)):
        breach(ros_double.Node("one"))


def launched(name: str) -> Any:
    return runpy.run_path(str(EXAMPLE / "launch" / name))["generate_launch_description"]()


def test_the_launch_file_starts_what_is_installed(world: ros_double.World, node: Any) -> None:
    entities = launched("classifier.launch.py").entities
    (started,) = (one for one in entities if isinstance(one, ros_double.LaunchNode))
    arguments = {one.name: one for one in entities if isinstance(one, ros_double.DeclareLaunchArgument)}
    setup = (EXAMPLE / "setup.py").read_text(encoding="utf-8")
    module, function = re.findall(rf'"{started.executable} = (\S+):(\w+)"', setup)[0]
    assert getattr(importlib.import_module(module), function) is node.main
    assert (started.package, started.name) == ("edgeres_ros", node.NAME)
    assert arguments["bundle"].default_value is None
    file, given = started.parameters
    assert file.variable_name == "params_file"
    share, *place = arguments["params_file"].default_value.substitutions
    assert share.package == "edgeres_ros"
    assert (EXAMPLE.joinpath(*place)).is_file()
    assert "/".join(place) in setup
    assert set(given) <= set(node.PARAMETERS)
    assert all(value.value_type is str and value.value.variable_name == name for name, value in given.items())
    ((topic, target),) = started.remappings
    assert (topic, target.variable_name) == ("image", "image")


def test_the_files_around_it_agree(node: Any) -> None:
    listed = (EXAMPLE / "config/classifier.yaml").read_text(encoding="utf-8")
    written = dict(re.findall(r"^    (\w+): (.+)$", listed, re.MULTILINE))
    assert {name: ast.literal_eval(f"'{value}'" if value.isalpha() else value) for name, value in written.items()} == {
        name: value for name, value in Settings("")._asdict().items() if name != "bundle"
    }
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert [name for name in node.PARAMETERS if f"| `{name}` |" not in readme] == []
    package = ElementTree.parse(EXAMPLE / "package.xml").getroot()
    setup = (EXAMPLE / "setup.py").read_text(encoding="utf-8")
    assert package.findtext("version") == edgeres.__version__
    assert f'version="{edgeres.__version__}"' in setup
    for place in re.findall(r'\["([^"]+/[^"]+|package.xml)"\]', setup):
        assert (EXAMPLE / place).is_file(), place


def test_every_ros_package_that_is_imported_is_a_dependency() -> None:
    package = ElementTree.parse(EXAMPLE / "package.xml").getroot()
    depends = {element.text for element in package.iter("exec_depend")}
    imported: Set[str] = set()
    for path in [*EXAMPLE.glob("edgeres_ros/*.py"), *EXAMPLE.glob("launch/*.py")]:
        for one in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(one, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in one.names}
            elif isinstance(one, ast.ImportFrom):
                imported.add((one.module or "").split(".")[0])
    ros = {name.split(".")[0] for name in ros_double.MODULES}
    assert len(imported & ros) == 7
    assert imported & ros <= depends
