"""The node's parameters: declared in one table, read into one object, guarded when they are set."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from rcl_interfaces.msg import (
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from picopose_ros.errors import ConfigError, MeshError
from picopose_ros.estimation.settings import MOST_REFINEMENTS
from picopose_ros.estimator import Backend, EstimatorSettings, Precision
from picopose_ros.instances import SmoothingSettings
from picopose_ros.messages.answers import MIN_SCORE
from picopose_ros.node.parameter_spec import Changeable, ParameterSpec
from picopose_ros.templates.meshes import resolve_path
from picopose_ros.templates.renderer import Shading
from picopose_ros.tf_names import prefix_refusal


def _unknown_place(value: str) -> str:
    try:
        resolve_path(value)
    except MeshError as error:
        return str(error)
    return ""


PARAMETERS: tuple[ParameterSpec, ...] = (
    ParameterSpec(
        "autostart",
        True,
        "Whether the node configures and activates itself; with false it waits for `ros2 lifecycle set`.",
        changeable=Changeable.AT_START,
    ),
    ParameterSpec(
        "mesh_dir",
        "",
        "Folder with one mesh file, or one folder holding it, per object; or one mesh file. A path, "
        "~/folder, package://name/folder or file:///folder. Required.",
        check=_unknown_place,
    ),
    ParameterSpec(
        "unit",
        "m",
        "Unit of the meshes' coordinates where objects.yaml or models_info.json does not say.",
        choices=("m", "mm", "cm", "in"),
    ),
    ParameterSpec("preset", "tiny", "Size of the network.", choices=("tiny", "vitl")),
    ParameterSpec(
        "weights",
        "",
        "Checkpoint of the network; empty takes the one shipped with the preset.",
        check=_unknown_place,
    ),
    ParameterSpec(
        "device", "auto", "Where the network runs: cpu, cuda, cuda:1, or auto (cuda where there is one)."
    ),
    ParameterSpec(
        "viewpoints",
        162,
        "Templates per object. More find finer poses and take longer to onboard.",
        choices=(42, 162, 642),
    ),
    ParameterSpec(
        "shading",
        "preset",
        "How templates are lit: flat (colours as they are), headlight (by a light in the camera), auto "
        "(headlight for meshes of one colour), or preset: auto for tiny, flat for vitl as it was trained.",
        choices=("preset", *get_args(Shading)),
    ),
    ParameterSpec(
        "cache_dir",
        "",
        "Where onboarded objects are kept; empty takes the user's cache folder.",
        check=_unknown_place,
    ),
    ParameterSpec(
        "hypotheses",
        2,
        "Templates tried per segment. More are slower and survive a wrong first match.",
        minimum=1,
        maximum=32,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "prune",
        0,
        "How many hypotheses, the best after the coarse grids, go through the finest grid; 0: all of them.",
        minimum=0,
        maximum=32,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "depth",
        "off",
        "Depth images on the topic depth, registered to the image and with its stamp: auto uses those that "
        "come, in refinement.",
        choices=("off", "auto"),
    ),
    ParameterSpec(
        "fuse_views",
        1,
        "Views of a still object from a moving camera that its pose is solved from, the new one included; "
        "needs target_frame, in which the objects stand still; 1: the new view alone.",
        *(1, 16),
    ),
    ParameterSpec(
        "refinements",
        EstimatorSettings.refinements,
        "Most rounds of refinement: objects are rendered at their poses and compared with the image.",
        *(0, MOST_REFINEMENTS, (), Changeable.ALWAYS),
    ),
    ParameterSpec(
        "precision",
        "auto",
        "What the network computes in: auto takes fp16 on CUDA, bf16 on a CPU with matrix units for it, else "
        "fp32.",
        choices=get_args(Precision),
    ),
    ParameterSpec(
        "backend",
        "torch",
        "What runs the network: torch, or onnxruntime for the parts that it is faster at on the device; that "
        "is installed separately (pip install onnxruntime onnx onnxscript).",
        choices=get_args(Backend),
    ),
    ParameterSpec(
        "onnx_dir",
        "",
        "For the backend onnxruntime, a folder written by picopose export for this preset and weights; "
        "empty: configuring exports into the user's cache folder the first time.",
    ),
    ParameterSpec(
        "compile",
        "",
        "Backend of torch.compile for the network, e.g. inductor or cudagraphs; empty: none. Configuring "
        "then takes minutes.",
    ),
    ParameterSpec(
        "template_cache_mb",
        512,
        "Memory for what is remembered of templates that were tried lately, on the device.",
        minimum=0,
        maximum=65536,
    ),
    ParameterSpec(
        "min_score",
        MIN_SCORE,
        "Poses with a lower score are not published; it is meant as the probability that a pose is right.",
        minimum=0.0,
        maximum=1.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "segmentation_input",
        "segments",
        "What the topic segmentation carries: segments (picopose_ros/SegmentArray), detections "
        "(vision_msgs/Detection2DArray, with a label image on the topic labels), boxes "
        "(vision_msgs/Detection2DArray alone), yolo (yolo_msgs/DetectionArray of yolo_ros), or mask (a mono8 "
        "image of one object, whose class is mask_class).",
        choices=("segments", "detections", "boxes", "yolo", "mask"),
    ),
    ParameterSpec(
        "mask_class", "", "Class of the object in a mask. Required where segmentation_input is mask."
    ),
    ParameterSpec(
        "image_transport",
        "raw",
        "raw subscribes to image (sensor_msgs/Image), compressed to image/compressed "
        "(sensor_msgs/CompressedImage).",
        choices=("raw", "compressed"),
    ),
    ParameterSpec(
        "image_reliability",
        "auto",
        "QoS of image and camera_info: reliable, best_effort, or auto (reliable, until a publisher turns up "
        "that offers only best effort). A qos_overrides parameter of the topic wins.",
        choices=("auto", "reliable", "best_effort"),
    ),
    ParameterSpec(
        "buffer_seconds",
        5.0,
        "How long an image waits for its segmentation. Longer than the segmenter ever takes.",
        minimum=0.1,
        maximum=120.0,
    ),
    ParameterSpec(
        "buffer_images",
        150,
        "How many images wait at most, whatever their age; bounds the memory (0.9 MB each at 640x480).",
        minimum=1,
        maximum=10_000,
    ),
    ParameterSpec(
        "image_rectified",
        "auto",
        "Whether the images are rectified, so that P of camera_info describes them: yes, no, or auto (yes "
        "where the topic's name says so, as image_rect does).",
        choices=("auto", "yes", "no"),
    ),
    ParameterSpec(
        "instance_timeout",
        1.0,
        "Seconds that an instance keeps its name while it isn't seen; of the images' clock.",
        minimum=0.05,
        maximum=3600.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "instance_distance",
        0.3,
        "Farthest (m) from where it was last seen that an instance is known again.",
        minimum=0.001,
        maximum=100.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "follow",
        False,
        "Whether instances are followed from image to image between two segmentations (docs/following.md).",
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "follow_rate",
        30.0,
        "Most images per second, of the images' clock, in which instances are followed.",
        minimum=0.1,
        maximum=1000.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "smoothing.translation",
        0.0,
        "Seconds over which the position of an instance is averaged; 0 leaves it as it is. Adds no latency.",
        minimum=0.0,
        maximum=10.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "smoothing.rotation",
        0.0,
        "The same for its rotation.",
        minimum=0.0,
        maximum=10.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "smoothing.jump_distance",
        0.05,
        "A pose this far (m) from where smoothing expects it is believed at once.",
        minimum=0.001,
        maximum=10.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "smoothing.jump_deg",
        20.0,
        "The same for its rotation, degrees.",
        minimum=0.1,
        maximum=180.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "publish_tf",
        True,
        "Whether every pose is also broadcast on /tf.",
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "tf_prefix",
        "",
        "Put before the instance's name to make its TF frame, e.g. 'left_camera/'.",
        check=prefix_refusal,
    ),
    ParameterSpec(
        "target_frame",
        "",
        "Frame in which the poses are published too, on detections_in_target_frame, e.g. 'base_link'; found "
        "by TF at the image's stamp. Empty: not. Needs tf2_ros.",
        check=prefix_refusal,
    ),
)

SPECS: dict[str, ParameterSpec] = {spec.name: spec for spec in PARAMETERS}


@dataclass(frozen=True)
class NodeParameters:
    """The parameters' values; see :data:`PARAMETERS`. A dot in a name is an underscore here."""

    autostart: bool
    mesh_dir: Path | None
    unit: str
    preset: str
    weights: Path | None
    device: str
    viewpoints: int
    shading: Shading | Literal["preset"]
    cache_dir: Path | None
    hypotheses: int
    prune: int
    refinements: int
    depth: Literal["off", "auto"]
    fuse_views: int
    precision: Precision
    compile: str
    backend: Backend
    onnx_dir: str
    template_cache_mb: int
    min_score: float
    segmentation_input: str
    mask_class: str
    image_transport: str
    image_reliability: str
    buffer_seconds: float
    buffer_images: int
    image_rectified: str
    instance_timeout: float
    instance_distance: float
    follow: bool
    follow_rate: float
    smoothing_translation: float
    smoothing_rotation: float
    smoothing_jump_distance: float
    smoothing_jump_deg: float
    publish_tf: bool
    tf_prefix: str
    target_frame: str

    @property
    def smoothing(self) -> SmoothingSettings:
        """How poses are smoothed over time."""
        return SmoothingSettings(
            self.smoothing_translation,
            self.smoothing_rotation,
            self.smoothing_jump_distance,
            self.smoothing_jump_deg,
        )

    def check(self) -> None:
        """Look at what no value tells by itself.

        Raises:
            ConfigError: a parameter that the others require is not there.
        """
        if self.mesh_dir is None:
            raise ConfigError(
                "parameter mesh_dir is empty: set it to a folder with one mesh per object, e.g. "
                "--ros-args -p mesh_dir:=/path/to/meshes"
            )
        if self.segmentation_input == "mask" and not self.mask_class:
            raise ConfigError(
                "parameter mask_class is empty, but segmentation_input is mask: set it to the class of the "
                "object that the mask is of"
            )
        if self.fuse_views > 1 and not (self.target_frame and self.refinements):
            raise ConfigError(
                f"parameter fuse_views is {self.fuse_views}, which needs target_frame (a frame in which the "
                "objects stand still) and refinements above 0"
            )

    def text(self) -> str:
        """All values on one line each, those that are not the default marked."""
        lines = []
        for spec in PARAMETERS:
            value = getattr(self, _field(spec))
            shown = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            changed = value != (None if spec.name in _PATHS and not spec.default else spec.default)
            lines.append(f"  {spec.name}: {shown or repr('')}{'  (set)' if changed else ''}")
        return "\n".join(lines)


_ROS_PARAMETERS = ("qos_overrides.", "use_sim_time", "start_type_description_service")
"""What rclpy itself, or a topic, declares."""

_SEGMENTER = "segmenter."
"""Begins the names of the parameters that only segmenter_node has."""

_PATHS = ("mesh_dir", "weights", "cache_dir")


def _field(spec: ParameterSpec) -> str:
    return spec.name.replace(".", "_")


def as_declared(
    parameters: Sequence[Parameter[Any]], specs: Mapping[str, ParameterSpec] = SPECS
) -> list[Parameter[Any]]:
    """The parameters, with whole numbers made real ones where the parameter is one: ``min_score: 0``."""
    return [
        Parameter(one.name, Parameter.Type.DOUBLE, float(one.value))
        if one.type_ == Parameter.Type.INTEGER
        and one.name in specs
        and isinstance(specs[one.name].default, float)
        else one
        for one in parameters
    ]


def unknown_parameters(names: Iterable[str], specs: Mapping[str, ParameterSpec] = SPECS) -> list[str]:
    """What is to be said of names that no parameter of this node has, one sentence each.

    The two nodes may read one file: what the other one has is nothing to speak of.
    """
    others = () if specs is not SPECS else (_SEGMENTER,)
    said = []
    for name in sorted(names):
        if name in specs or name in SPECS or name.startswith((*_ROS_PARAMETERS, *others)):
            continue
        close = difflib.get_close_matches(name, specs, n=1)
        hint = f"did you mean {close[0]}?" if close else "`ros2 param list` shows those there are"
        said.append(f"there is no parameter {name}, so its value is not used: {hint}")
    return said


def declare_parameters(node: Node, specs: Mapping[str, ParameterSpec] = SPECS) -> None:
    """Declare every parameter on ``node``; warns of given ones that there are not.

    Raises:
        ConfigError: a value of the wrong type, out of range or not among the choices.
    """
    # Not public, but the only place that holds what was given and never declared.
    given: dict[str, Parameter[Any]] = node._parameter_overrides
    for sentence in unknown_parameters(given, specs):
        node.get_logger().warning(sentence)
    given.update({one.name: one for one in as_declared(list(given.values()), specs)})
    for spec in specs.values():
        try:
            value = node.declare_parameter(spec.name, spec.default, spec.descriptor()).value
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ConfigError(f"parameter {spec.name} can't be used: {error}") from error
        if reason := spec.refusal(value):
            raise ConfigError(reason)


def read_parameters(node: Node) -> NodeParameters:
    """The declared parameters' values now."""
    values = {_field(spec): node.get_parameter(spec.name).value for spec in PARAMETERS}
    for name in _PATHS:
        values[name] = resolve_path(values[name]) if values[name] else None
    return NodeParameters(**{field.name: values[field.name] for field in fields(NodeParameters)})


def judge_parameters(
    parameters: Sequence[Parameter[Any]], state: str, specs: Mapping[str, ParameterSpec] = SPECS
) -> SetParametersResult:
    """Whether parameters may be set in a lifecycle state (its label), and why not."""
    for parameter in parameters:
        spec = specs.get(parameter.name)
        if spec is None:
            continue
        if spec.changeable is Changeable.UNCONFIGURED and state != "unconfigured":
            return SetParametersResult(
                successful=False,
                reason=f"parameter {spec.name} {spec.changeable.value}, and it is {state}: "
                "`ros2 lifecycle set <node> deactivate` and `cleanup` come first",
            )
        if reason := spec.refusal(parameter.value):
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)
