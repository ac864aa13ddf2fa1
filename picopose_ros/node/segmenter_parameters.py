"""Parameters of ``segmenter_node``: those it shares with ``picopose_node``, and ``segmenter.*``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from rclpy.node import Node

from picopose_ros.errors import ConfigError
from picopose_ros.estimator import Backend, Precision
from picopose_ros.node.parameters import SPECS, Changeable, ParameterSpec, declare_parameters
from picopose_ros.segmentation.matching import MatchSettings
from picopose_ros.segmentation.proposals import SourceOptions
from picopose_ros.templates.meshes import resolve_path
from picopose_ros.templates.renderer import Shading

PREFIX = "segmenter."
"""Of the parameters that are the segmenter's alone: both nodes may read one file."""

SHARED = (
    *("autostart", "mesh_dir", "unit", "preset", "weights", "device", "viewpoints", "shading", "cache_dir"),
    *("backend", "onnx_dir", "precision", "image_transport", "image_reliability"),
)

_DEFAULTS = MatchSettings()

OWN: tuple[ParameterSpec, ...] = (
    ParameterSpec(
        "segmenter.proposals",
        "builtin",
        "Where masks without a class come from: builtin (no weights), boxes (of another detector, topic "
        "boxes), sam, sam2, fastsam (where those packages are installed), or module:function of your own.",
    ),
    ParameterSpec(
        "segmenter.weights", "", "File with the weights of the proposals' network: for sam, sam2, fastsam."
    ),
    ParameterSpec(
        "segmenter.model", "", "Which of its networks these are, e.g. vit_b for sam; empty: the usual one."
    ),
    ParameterSpec(
        "segmenter.rate",
        1.0,
        "Images per second that are looked at, the newest each time; 0: as many as can be.",
        minimum=0.0,
        maximum=100.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "segmenter.per_class",
        _DEFAULTS.per_class,
        "At most so many instances of an object are published.",
        minimum=1,
        maximum=100,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "segmenter.min_score",
        _DEFAULTS.min_score,
        "Segments with a lower score are not published.",
        minimum=0.0,
        maximum=1.0,
        changeable=Changeable.ALWAYS,
    ),
    ParameterSpec(
        "segmenter.depth",
        False,
        "Whether the builtin proposals look at depth, too: images of the same stamp on the topic depth.",
    ),
)

SEGMENTER_PARAMETERS: tuple[ParameterSpec, ...] = (*(SPECS[name] for name in SHARED), *OWN)

SEGMENTER_SPECS: dict[str, ParameterSpec] = {spec.name: spec for spec in SEGMENTER_PARAMETERS}

_PATHS = ("mesh_dir", "weights", "cache_dir", "segmenter_weights")


@dataclass(frozen=True)
class SegmenterParameters:
    """The parameters' values; a dot in a name is an underscore here."""

    autostart: bool
    mesh_dir: Path | None
    unit: str
    preset: str
    weights: Path | None
    device: str
    viewpoints: int
    shading: Shading | Literal["preset"]
    cache_dir: Path | None
    backend: Backend
    onnx_dir: str
    precision: Precision
    image_transport: str
    image_reliability: str
    segmenter_proposals: str
    segmenter_weights: Path | None
    segmenter_model: str
    segmenter_rate: float
    segmenter_per_class: int
    segmenter_min_score: float
    segmenter_depth: bool

    @property
    def matching(self) -> MatchSettings:
        """How proposals are judged."""
        return MatchSettings(min_score=self.segmenter_min_score, per_class=self.segmenter_per_class)

    def source_options(self, device: str) -> SourceOptions:
        """How the proposal source is set up."""
        return SourceOptions(self.segmenter_weights, self.segmenter_model, device)

    def check(self) -> None:
        """Look at what no value tells by itself.

        Raises:
            ConfigError: a parameter that the others require is not there.
        """
        if self.mesh_dir is None:
            raise ConfigError(
                "parameter mesh_dir is empty: set it to a folder with one mesh per object, the same as of "
                "picopose_node"
            )


def declare_segmenter_parameters(node: Node) -> None:
    """Declare every parameter on ``node``.

    Raises:
        ConfigError: a value of the wrong type, out of range or not among the choices.
    """
    declare_parameters(node, SEGMENTER_SPECS)


def read_segmenter_parameters(node: Node) -> SegmenterParameters:
    """The declared parameters' values now."""
    values = {
        spec.name.replace(".", "_"): node.get_parameter(spec.name).value for spec in SEGMENTER_PARAMETERS
    }
    for name in _PATHS:
        values[name] = resolve_path(values[name]) if values[name] else None
    return SegmenterParameters(**{field.name: values[field.name] for field in fields(SegmenterParameters)})
