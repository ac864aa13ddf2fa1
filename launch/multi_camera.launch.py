"""One ``picopose_node`` per camera: ``ros2 launch picopose_ros multi_camera.launch.py cameras:=left,right``.

Every camera is a namespace. Its node listens to the topics in there, publishes its detections there, and puts
the camera's name before its TF frames, so that ``left/mug_0`` and ``right/mug_0`` are two frames. All nodes
share one cache of onboarded objects: the first one that needs an object makes its templates, the others wait.
``ros2 launch picopose_ros multi_camera.launch.py --show-args`` lists the arguments.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from picopose_ros.launching import check_parameter_file, unknown_arguments

PACKAGE = "picopose_ros"
PLACEHOLDER = "{camera}"
TOPICS = {
    "image": ("image_raw", "Images to look at (sensor_msgs/Image)."),
    "camera_info": ("camera_info", "Their intrinsics (sensor_msgs/CameraInfo)."),
    "segmentation": ("segmentation", "Masks of the objects in them (see segmentation_input)."),
    "depth": ("depth", "Depth images registered to the image, where depth is auto (sensor_msgs/Image)."),
    "labels": ("labels", "Label images, where segmentation_input is detections (sensor_msgs/Image)."),
}
PARAMETERS = {
    "mesh_dir": (str, "Folder with one mesh file, or one folder holding it, per object."),
    "weights": (str, "Checkpoint of the network."),
    "preset": (str, "Size of the network: tiny or vitl."),
    "device": (str, "Where the network runs: cpu, cuda, cuda:1 or auto."),
    "cache_dir": (str, "Where onboarded objects are kept, for all cameras."),
    "segmentation_input": (str, "What segmentation carries: segments, detections, boxes, yolo or mask."),
    "mask_class": (str, "Class of the object in a mask."),
    "image_transport": (str, "raw or compressed."),
    "target_frame": (str, "Frame in which the poses are published too; needs tf2_ros."),
    "use_sim_time": (bool, "true: take the time from /clock, as with `ros2 bag play --clock`."),
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and, once their values are known, the nodes."""
    config = Path(get_package_share_directory(PACKAGE)) / "config"
    arguments = [
        DeclareLaunchArgument(
            "cameras", description="Names of the cameras, e.g. left,right. Each is a namespace."
        ),
        DeclareLaunchArgument(
            "params_file",
            default_value=str(config / "picopose.yaml"),
            description="Parameters of all nodes; sections named /left/picopose_node differ between them.",
        ),
        *(
            DeclareLaunchArgument(name, default_value="", description=f"{text} Empty: as params_file says.")
            for name, (_, text) in PARAMETERS.items()
        ),
        *(
            DeclareLaunchArgument(
                name,
                default_value=default,
                description=f"Topic. {text} Relative: in the camera's namespace. {PLACEHOLDER} is its name.",
            )
            for name, (default, text) in TOPICS.items()
        ),
    ]
    arguments.append(
        DeclareLaunchArgument(
            "respawn", default_value="false", description="true: start a node again when it has ended."
        )
    )
    names = [argument.name for argument in arguments]
    return LaunchDescription([*arguments, OpaqueFunction(function=_nodes, args=[names])])


def camera_names(text: str) -> list[str]:
    """``left,right`` as a list.

    Raises:
        ValueError: no name, one that can be no namespace, or one twice.
    """
    names = [name for name in re.split(r"[,\s]+", text) if name]
    if not names:
        raise ValueError("cameras is empty: name them, e.g. cameras:=left,right")
    for name in names:
        if not re.fullmatch(r"[A-Za-z]\w*(/[A-Za-z]\w*)*", name, re.ASCII):
            raise ValueError(f"cameras: {name!r} can't be a namespace: use letters, digits and underscores")
        if names.count(name) > 1:
            raise ValueError(f"cameras: {name!r} is there twice; two nodes of one name would clash on TF")
    return names


def _nodes(context: LaunchContext, names: list[str]) -> list[LogInfo | Node]:
    """One node per camera. Only now it is known which arguments were given."""
    said = unknown_arguments(context.argv, names)
    said += check_parameter_file(Path(LaunchConfiguration("params_file").perform(context)))
    values = {name: LaunchConfiguration(name).perform(context) for name in (*PARAMETERS, *TOPICS, "cameras")}
    given: dict[str, Any] = {
        # The type is said, or a folder named 2024 would arrive as a number.
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, (kind, _) in PARAMETERS.items()
        if values[name]
    }
    nodes = [
        Node(
            package=PACKAGE,
            executable="picopose_node",
            name="picopose_node",
            namespace=camera,
            parameters=[LaunchConfiguration("params_file"), {**given, "tf_prefix": f"{camera}/"}],
            remappings=[(name, values[name].replace(PLACEHOLDER, camera)) for name in TOPICS],
            output="screen",
            # The node finishes the frame it has in hand; only after that does launch grow impatient.
            sigterm_timeout="12",
            respawn=LaunchConfiguration("respawn"),
            respawn_delay=2.0,
        )
        for camera in camera_names(values["cameras"])
    ]
    return [*(LogInfo(msg=f"WARNING: {sentence}") for sentence in said), *nodes]
