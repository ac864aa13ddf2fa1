"""Poses in a frame of the robot's: tf2_ros, where it is installed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.time import Time
from scipy.spatial.transform import Rotation
from std_msgs.msg import Header

from picopose_ros.errors import ConfigError
from picopose_ros.geometry.poses import make_transform

try:
    import tf2_ros
except ImportError:  # a plain machine has tf2_msgs, but no tf2_ros
    tf2_ros = None

PATIENCE = 0.1
MOST_PATIENCE = 0.5
"""Seconds that a transform may come later than the poses it is needed for, at least and at most."""


class TransformUnknown(Exception):
    """TF doesn't say where the camera was."""


def require_tf2_ros(target_frame: str) -> None:
    """Check that a target frame can be had.

    Raises:
        ConfigError: tf2_ros isn't installed.
    """
    if target_frame and tf2_ros is None:
        raise ConfigError(
            f"parameter target_frame is '{target_frame}', but the Python package tf2_ros isn't installed "
            "here: install it (apt: ros-$ROS_DISTRO-tf2-ros-py), or leave target_frame empty and transform "
            "the poses where they are used"
        )


class TargetFrame:
    """Where a camera is in the target frame, by TF.

    Args:
        node: listens to TF.
        name: of the target frame.

    Raises:
        ConfigError: tf2_ros isn't installed.
    """

    def __init__(self, node: Node, name: str) -> None:
        require_tf2_ros(name)
        self.name = name
        self._buffer = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node)

    def lookup(self, header: Header, spent: float = 0.0) -> np.ndarray:
        """T_target_cam (4, 4) at a stamp, for the frame of an image's header.

        Args:
            header: of the image.
            spent: seconds that the estimate took; a transform is waited for as long, within limits.

        Raises:
            TransformUnknown: TF doesn't know it, or not for this stamp.
        """
        stamp, deadline = Time.from_msg(header.stamp), time.monotonic()
        deadline += min(max(PATIENCE, spent), MOST_PATIENCE)
        while True:
            # Not with tf2's own timeout: that waits for the ROS clock, which may stand still.
            try:
                return _matrix(self._buffer.lookup_transform(self.name, header.frame_id, stamp).transform)
            except tf2_ros.TransformException as error:
                if time.monotonic() > deadline:
                    raise TransformUnknown(
                        f"no transform from '{header.frame_id}' to target_frame '{self.name}' at the image's "
                        f"stamp ({error}): check that the robot's state is published, and in time"
                    ) from error
            time.sleep(0.01)

    def known(self, header: Header) -> np.ndarray | None:
        """The same if it is known already, else None."""
        try:
            stamp = Time.from_msg(header.stamp)
            return _matrix(self._buffer.lookup_transform(self.name, header.frame_id, stamp).transform)
        except tf2_ros.TransformException:
            return None

    def close(self) -> None:
        """Stop listening."""
        self._listener.unregister()


def _matrix(transform: Any) -> np.ndarray:
    """A geometry_msgs/Transform as (4, 4)."""
    q, t = transform.rotation, transform.translation
    return make_transform(Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix(), np.array([t.x, t.y, t.z]))
