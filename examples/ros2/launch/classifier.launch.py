"""Starts the classifier: ros2 launch edgeres_ros classifier.launch.py bundle:=FOLDER image:=/camera/image_raw."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare


def text(name: str) -> ParameterValue:
    """Return an argument as text, also where it looks like a number."""
    return ParameterValue(LaunchConfiguration(name), value_type=str)


def generate_launch_description() -> LaunchDescription:
    parameters = PathJoinSubstitution([FindPackageShare("edgeres_ros"), "config", "classifier.yaml"])
    return LaunchDescription(
        [
            DeclareLaunchArgument("bundle", description="the folder that `edgeres build` made"),
            DeclareLaunchArgument("backend", default_value="auto", description="auto, or one of the bundle's"),
            DeclareLaunchArgument("image", default_value="image", description="the camera's topic"),
            DeclareLaunchArgument("params_file", default_value=parameters, description="the other parameters"),
            Node(
                package="edgeres_ros",
                executable="classifier",
                name="edgeres_classifier",
                output="screen",
                parameters=[LaunchConfiguration("params_file"), {"bundle": text("bundle"), "backend": text("backend")}],
                remappings=[("image", LaunchConfiguration("image"))],
            ),
        ]
    )
