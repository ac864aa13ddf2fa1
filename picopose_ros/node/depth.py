"""Depth images of lately, and the one that belongs to an image. No ROS in here but the messages' fields."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from picopose_ros.errors import ImageError
from picopose_ros.messages.images import depth_to_metres
from picopose_ros.messages.reasons import DropReason, Problem
from picopose_ros.node.conversions import stamp_to_nanoseconds

_KEPT = 30
"""Depth images that are kept: one second of a camera."""


class DepthBuffer:
    """The newest depth images by stamp; for any thread.

    Args:
        topic: where they come from, for the messages.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._lock = threading.Lock()
        self._messages: OrderedDict[int, Any] = OrderedDict()

    def add(self, message: Any) -> None:
        """Keep a ``sensor_msgs/Image``, the oldest goes."""
        with self._lock:
            self._messages[stamp_to_nanoseconds(message.header.stamp)] = message
            while len(self._messages) > _KEPT:
                self._messages.popitem(last=False)

    def find(self, image: Any, size: tuple[int, int]) -> np.ndarray | Problem | None:
        """The depths of an image.

        Args:
            image: the message that they must fit. size: its width and height.

        Returns:
            (H, W) float32 m; why the depth image can't be used; or None where none came at all.
        """
        stamp = stamp_to_nanoseconds(image.header.stamp)
        with self._lock:
            message = self._messages.get(stamp)
            others = [abs(one - stamp) for one in self._messages]
        if message is None:
            if not others:
                return None
            return self._problem(
                f"no depth image has the image's stamp, the nearest is {min(others) / 1e6:.1f} ms off: it "
                "must be registered to the image and have its stamp (aligned_depth_to_color, "
                "depth_image_proc/register)"
            )
        frame, other = message.header.frame_id, image.header.frame_id
        if frame and other and frame != other:
            return self._problem(
                f"depth images are in frame '{frame}', images in '{other}': register them to the image "
                "(aligned_depth_to_color, depth_image_proc/register)"
            )
        if (message.width, message.height) != size:
            return self._problem(
                f"depth images have {message.width}x{message.height} pixels, images {size[0]}x{size[1]}: "
                "register them to the image (aligned_depth_to_color, depth_image_proc/register)"
            )
        try:
            return depth_to_metres(message, self._topic)
        except ImageError as error:
            return self._problem(str(error))

    def _problem(self, message: str) -> Problem:
        return Problem(DropReason.BAD_DEPTH, f"{self._topic}: {message}; poses go on without depth")
