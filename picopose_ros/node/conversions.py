"""This package's types as messages of rclpy. Pure functions: no node, no state, no clock."""

from __future__ import annotations

import array
from functools import cache, partial
from importlib import import_module
from typing import Any

import numpy as np
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from picopose_ros.messages import build


def stamp_to_nanoseconds(stamp: Any) -> int:
    """A ``builtin_interfaces/Time`` as integer nanoseconds, exactly."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


@cache
def _message_type(name: str) -> type:
    package, _, short = name.split("/")
    return getattr(import_module(f"{package}.msg"), short)


def make(name: str, **fields: Any) -> Any:
    """A message of the type ``name`` (``package/msg/Type``) with these fields."""
    for field, value in fields.items():
        if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.uint32):
            # rclpy takes sequences of numbers as these; anything else is checked number by number.
            fields[field] = array.array("B" if value.dtype == np.uint8 else "I", value.tobytes())
    return _message_type(name)(**fields)


pose_to_message = partial(build.pose_message, make)
detections_message = partial(build.detections_message, make)
segments_to_message = partial(build.segments_message, make)


def image_from_rgb(rgb: np.ndarray, header: Header) -> Image:
    """An RGB image (H, W, 3) uint8 as ``sensor_msgs/Image``."""
    height, width = rgb.shape[:2]
    message = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(rgb))  # assigning bytes instead takes a hundred times as long
    message.data = data
    return message
