"""The node: sensor_msgs/Image in, vision_msgs/Classification and diagnostics out. All that can be, is in ``core``."""

from __future__ import annotations

from typing import Any, List, Optional

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from vision_msgs.msg import Classification, ObjectHypothesis

from edgeres.errors import EdgeresError
from edgeres_ros.core import OK, Answer, Classifier, Settings, open_classifier

NAME = "edgeres_classifier"

# As cameras send, but one image: an older one would only be dropped here.
NEWEST_IMAGE = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
)

PARAMETERS = {
    "bundle": "the folder that `edgeres build` made",
    "backend": "auto, cpu, tensorrt, tensorrt-rtx, or a target of the bundle, such as dla0",
    "threads": "threads of the CPU's engine; 0: its own choice",
    "top_k": "how many classes are published, the most probable first; 0: all",
    "threshold": "classes that are less probable are left out",
    "labels": "a text file, the name of one class per line; empty: their numbers",
    "diagnostics_period": "seconds between diagnostics",
    "trusted_keys": "public keys, one of which has to have signed the bundle; a colon between them; empty: not asked",
}

LEVELS = (DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR)


class ClassifierNode(Node):
    """Answers the newest image of ``image`` on ``~/classification``, and tells how that goes on ``/diagnostics``.

    Raises:
        EdgeresError: the parameters, the bundle or the engine are not usable.
        ParameterException: rclpy's, for a parameter of another type.
    """

    def __init__(self) -> None:
        super().__init__(NAME)
        self._classifier: Optional[Classifier] = None
        defaults = Settings(bundle="")
        settings = Settings(
            **{
                name: self.declare_parameter(
                    name, getattr(defaults, name), ParameterDescriptor(description=description, read_only=True)
                ).value
                for name, description in PARAMETERS.items()
            }
        )
        self._answers = self.create_publisher(Classification, "~/classification", 1)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 1)
        self._classifier = open_classifier(settings, self._publish)
        self._level = OK
        manifest, record = self._classifier.engine.manifest, self._classifier.engine.record
        self.get_logger().info(f"{manifest.name}, {record.precision} on {record.target}: waiting for images")
        if not settings.trusted_keys:
            self.get_logger().warning(
                "trusted_keys is empty: whoever could write the bundle is believed, and an engine is code. Name the "
                "public keys of those who may: -p trusted_keys:=FILE.pub"
            )
        self.create_subscription(Image, "image", self._classifier.offer, NEWEST_IMAGE)
        self.create_timer(settings.diagnostics_period, self._diagnose)

    def _publish(self, answer: Answer) -> None:
        results = [ObjectHypothesis(class_id=name, score=score) for name, score in answer.classes]
        try:
            self._answers.publish(Classification(header=answer.header, results=results))
        except Exception:  # its kind differs between releases
            if self.context.ok():  # else a Ctrl-C has ended the publisher while the image was being answered
                raise

    def _diagnose(self) -> None:
        assert self._classifier is not None
        health = self._classifier.health()
        status = DiagnosticStatus(
            level=LEVELS[health.level],
            name=f"{self.get_name()}: engine",
            message=health.message,
            hardware_id=health.values["target"],
            values=[KeyValue(key=key, value=value) for key, value in health.values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)
        if health.level > self._level:  # once, not at each period
            self.get_logger().warning(health.message)
        self._level = health.level

    def destroy_node(self) -> Any:
        """Finish the image that is being answered, free the engine, then end the node."""
        if self._classifier is not None:
            self._classifier.close()
        return super().destroy_node()


def main(args: Optional[List[str]] = None) -> int:
    """Run the node until it is interrupted; return 1, with the reason in the log, where it cannot start."""
    rclpy.init(args=args)
    node = None
    try:
        node = ClassifierNode()
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (EdgeresError, ParameterException) as problem:
        get_logger(NAME).fatal(str(problem))
        return 1
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()  # a Ctrl-C has done it already
    return 0
