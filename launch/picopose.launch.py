"""Start ``picopose_node``: ``ros2 launch picopose_ros picopose.launch.py mesh_dir:=/path/to/meshes``.

With ``segmenter:=true`` also ``segmenter_node``, which finds the masks: a camera and meshes are enough.

``ros2 launch picopose_ros picopose.launch.py --show-args`` lists the arguments.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import (
    PackageNotFoundError,
    get_package_prefix,
    get_package_share_directory,
)
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from picopose_ros.launching import check_parameter_file, unknown_arguments

PACKAGE = "picopose_ros"
TOPICS = {
    "image": "Images to look at (sensor_msgs/Image).",
    "camera_info": "Their intrinsics (sensor_msgs/CameraInfo).",
    "segmentation": "Masks of the objects in them (see segmentation_input).",
    "depth": "Depth registered to the image, where depth is auto or segmenter.depth set (sensor_msgs/Image).",
    "labels": "Label images, where segmentation_input is detections (sensor_msgs/Image).",
}
SEGMENTER_TOPICS = {
    "boxes": "Boxes of another detector, where proposals is boxes (vision_msgs/Detection2DArray).",
}
SEGMENTER = {
    "proposals": ("segmenter.proposals", "Masks without a class: builtin, boxes, sam, sam2 or fastsam."),
    "proposal_weights": ("segmenter.weights", "Weights of sam, sam2 or fastsam."),
    "proposal_model": ("segmenter.model", "Which of its networks these are."),
}
"""Launch arguments of the segmenter: the parameter, and what it is."""
SEGMENTER_PROCESS = ("false", "true", "same_process")
SHARED = (
    "mesh_dir",
    "weights",
    "preset",
    "device",
    "cache_dir",
    "image_transport",
    "autostart",
    "use_sim_time",
)
"""Parameters that both nodes have."""
PARAMETERS = {
    "mesh_dir": (str, "Folder with one mesh file, or one folder holding it, per object."),
    "weights": (str, "Checkpoint of the network."),
    "preset": (str, "Size of the network: tiny or vitl."),
    "device": (str, "Where the network runs: cpu, cuda, cuda:1 or auto."),
    "cache_dir": (str, "Where onboarded objects are kept between starts."),
    "segmentation_input": (str, "What segmentation carries: segments, detections, boxes, yolo or mask."),
    "mask_class": (str, "Class of the object in a mask."),
    "image_transport": (str, "raw or compressed."),
    "tf_prefix": (str, "Put before the instance's name to make its TF frame."),
    "target_frame": (str, "Frame in which the poses are published too; needs tf2_ros."),
    "autostart": (bool, "false: wait for `ros2 lifecycle set` instead of starting by itself."),
    "use_sim_time": (bool, "true: take the time from /clock, as with `ros2 bag play --clock`."),
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and, once their values are known, the nodes."""
    config = Path(get_package_share_directory(PACKAGE)) / "config"
    arguments = [
        DeclareLaunchArgument(
            "params_file", default_value=str(config / "picopose.yaml"), description="Parameters of the node."
        ),
        *(
            DeclareLaunchArgument(name, default_value="", description=f"{text} Empty: as params_file says.")
            for name, (_, text) in PARAMETERS.items()
        ),
        *(
            DeclareLaunchArgument(name, default_value=name, description=f"Topic. {text}")
            for name, text in {**TOPICS, **SEGMENTER_TOPICS}.items()
        ),
        DeclareLaunchArgument(
            "segmenter",
            default_value="false",
            description="true: also start segmenter_node, which makes the masks; same_process: with both "
            "nodes in one process.",
        ),
        *(
            DeclareLaunchArgument(name, default_value="", description=f"{text} Empty: as params_file says.")
            for name, (_, text) in SEGMENTER.items()
        ),
        DeclareLaunchArgument("namespace", default_value="", description="Give each camera its own."),
        DeclareLaunchArgument(
            "respawn", default_value="false", description="true: start the node again when it has ended."
        ),
        DeclareLaunchArgument("rviz", default_value="false", description="true: also start rviz2."),
    ]
    names = [argument.name for argument in arguments]
    start = OpaqueFunction(function=_nodes, args=[config / "picopose.rviz", names])
    return LaunchDescription([*arguments, start])


def _nodes(context: LaunchContext, rviz_config: Path, names: list[str]) -> list[LogInfo | Node]:
    """The nodes. Only now it is known which arguments were given; no other may override params_file."""
    said = unknown_arguments(context.argv, names)
    said += check_parameter_file(Path(LaunchConfiguration("params_file").perform(context)))
    if LaunchConfiguration("rviz").perform(context).lower() in ("true", "1"):
        # Looked for before anything is started: a launch that fails halfway leaves the node running.
        try:
            get_package_prefix("rviz2")
        except PackageNotFoundError as error:
            raise RuntimeError(
                "rviz:=true, but rviz2 isn't installed: sudo apt install ros-$ROS_DISTRO-rviz2, or "
                "leave it out"
            ) from error
    given = {name: LaunchConfiguration(name).perform(context) for name in PARAMETERS}
    overrides = {
        # The type is said, or a folder named 2024 would arrive as a number.
        name: ParameterValue(LaunchConfiguration(name), value_type=PARAMETERS[name][0])
        for name, value in given.items()
        if value
    }
    segmenter = LaunchConfiguration("segmenter").perform(context).lower()
    if segmenter not in SEGMENTER_PROCESS:
        raise RuntimeError(f"segmenter:={segmenter}: use one of {', '.join(SEGMENTER_PROCESS)}")
    topics = TOPICS if segmenter == "false" else {**TOPICS, **SEGMENTER_TOPICS}
    common = {
        "namespace": LaunchConfiguration("namespace"),
        "remappings": [(name, LaunchConfiguration(name)) for name in topics],
        "output": "screen",
    }
    simulated = {name: value for name, value in overrides.items() if name == "use_sim_time"}
    process = {
        "package": PACKAGE,
        # A node finishes the frame it has in hand; only after that does launch grow impatient.
        "sigterm_timeout": "12",
        "respawn": LaunchConfiguration("respawn"),
        "respawn_delay": 2.0,
        **common,
    }
    own = {
        parameter: ParameterValue(LaunchConfiguration(name), value_type=str)
        for name, (parameter, _) in SEGMENTER.items()
        if LaunchConfiguration(name).perform(context)
    }
    file = LaunchConfiguration("params_file")
    if segmenter == "same_process":
        # Without a name: it would be given to both nodes.
        nodes = [
            Node(executable="picopose_with_segmenter", parameters=[file, {**overrides, **own}], **process)
        ]
    else:
        name = "picopose_node"
        nodes = [Node(executable=name, name=name, parameters=[file, overrides], **process)]
    if segmenter == "true":
        name, shared = "segmenter_node", {key: overrides[key] for key in SHARED if key in overrides}
        nodes.append(Node(executable=name, name=name, parameters=[file, {**shared, **own}], **process))
    return [
        *(LogInfo(msg=f"WARNING: {sentence}") for sentence in said),
        *nodes,
        Node(
            package="rviz2",
            executable="rviz2",
            name="rviz2",
            arguments=["-d", str(rviz_config)],
            parameters=[simulated],
            condition=IfCondition(LaunchConfiguration("rviz")),
            **common,
        ),
    ]
