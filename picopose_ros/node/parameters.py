"""The node's parameters: declared in one table, read into one object."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node

from picopose_ros.errors import ConfigError


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its default says its type, ``minimum``/``maximum`` or ``choices`` what it may be."""

    name: str
    default: str | int | float | bool
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    dynamic: bool = False

    def descriptor(self) -> ParameterDescriptor:
        """What ``ros2 param describe`` shows."""
        descriptor = ParameterDescriptor(
            name=self.name,
            description=self.description,
            read_only=not self.dynamic,
            additional_constraints=f"one of {', '.join(map(str, self.choices))}" if self.choices else "",
        )
        if self.minimum is not None and self.maximum is not None:
            if isinstance(self.default, int):
                descriptor.integer_range = [
                    IntegerRange(from_value=int(self.minimum), to_value=int(self.maximum), step=1)
                ]
            else:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(self.minimum), to_value=float(self.maximum))
                ]
        return descriptor


PARAMETERS: tuple[ParameterSpec, ...] = (
    ParameterSpec(
        "mesh_dir", "", "Folder with one mesh file, or one folder holding it, per object. Required."
    ),
    ParameterSpec(
        "unit",
        "m",
        "Unit of the meshes' coordinates where objects.yaml or models_info.json does not say.",
        choices=("m", "mm", "cm", "in"),
    ),
    ParameterSpec("preset", "tiny", "Size of the network.", choices=("tiny", "vitl")),
    ParameterSpec("weights", "", "Checkpoint of the network; empty takes the one shipped with the preset."),
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
        "hypotheses",
        5,
        "Templates tried per segment. More are slower and survive a wrong first match.",
        minimum=1,
        maximum=32,
    ),
    ParameterSpec(
        "min_score",
        0.2,
        "Poses with a lower score are not published; wrong ones mostly stay below 0.2.",
        minimum=0.0,
        maximum=1.0,
        dynamic=True,
    ),
    ParameterSpec("publish_tf", True, "Whether every pose is also broadcast on /tf.", dynamic=True),
    ParameterSpec(
        "tf_prefix", "", "Put before the instance's name to make its TF frame, e.g. 'left_camera/'."
    ),
    ParameterSpec("cache_dir", "", "Where onboarded objects are kept; empty takes the user's cache folder."),
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
        "image_reliability",
        "auto",
        "QoS of image and camera_info: reliable, best_effort, or auto (reliable, until a publisher turns up "
        "that "
        "offers only best effort).",
        choices=("auto", "reliable", "best_effort"),
    ),
)


@dataclass(frozen=True)
class NodeParameters:
    """The parameters' values at start; the dynamic ones are read again at every frame."""

    mesh_dir: Path
    unit: str
    preset: str
    weights: Path | None
    device: str
    viewpoints: int
    hypotheses: int
    min_score: float
    publish_tf: bool
    tf_prefix: str
    cache_dir: Path | None
    buffer_seconds: float
    buffer_images: int
    image_reliability: str


def declare_parameters(node: Node) -> NodeParameters:
    """Declare every parameter on ``node`` and read it.

    Raises:
        ConfigError: a value of the wrong type, out of range or not among the choices; no mesh_dir.
    """
    values: dict[str, Any] = {}
    for spec in PARAMETERS:
        try:
            value = node.declare_parameter(spec.name, spec.default, spec.descriptor()).value
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ConfigError(f"parameter {spec.name} can't be used: {error}") from error
        if spec.choices and value not in spec.choices:
            raise ConfigError(
                f"parameter {spec.name} is {value!r}: it must be one of {', '.join(map(str, spec.choices))}"
            )
        values[spec.name] = value
    if not values["mesh_dir"]:
        raise ConfigError(
            "parameter mesh_dir is empty: set it to a folder with one mesh per object, e.g. "
            "--ros-args -p mesh_dir:=/path/to/meshes"
        )
    for name in ("mesh_dir", "weights", "cache_dir"):
        values[name] = Path(values[name]).expanduser() if values[name] else None
    return NodeParameters(**{field.name: values[field.name] for field in fields(NodeParameters)})
