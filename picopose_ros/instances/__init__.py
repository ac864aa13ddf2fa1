"""Instances over time: a name for every pose, one symmetric form per instance, smoothing."""

from picopose_ros.instances.naming import InstanceNamer, NamedPose
from picopose_ros.instances.smoothing import PoseFilter, SmoothingSettings
from picopose_ros.instances.symmetries import CANONICAL, SymmetryGroup

__all__ = [
    "CANONICAL",
    "InstanceNamer",
    "NamedPose",
    "PoseFilter",
    "SmoothingSettings",
    "SymmetryGroup",
]
