"""Tells colcon what to install where: `ros2 run` and `ros2 launch` look in these places."""

from setuptools import setup

setup(
    name="edgeres_ros",
    version="0.1.0",
    packages=["edgeres_ros"],
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/edgeres_ros"]),
        ("share/edgeres_ros", ["package.xml"]),
        ("share/edgeres_ros/launch", ["launch/classifier.launch.py"]),
        ("share/edgeres_ros/config", ["config/classifier.yaml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="edgeres",
    maintainer_email="edgeres@example.com",
    description="Classifies camera images with an edgeres bundle.",
    license="Apache-2.0",
    entry_points={"console_scripts": ["classifier = edgeres_ros.node:main"]},
)
