"""rosbag2 recordings without ROS, under the name by which other packages import them."""

from picopose_ros.messages.bags import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    DETECTIONS,
    IMAGE,
    SEGMENTS,
    TF,
    BagReader,
    BagWriter,
    header,
    message,
    stamp_of,
)

__all__ = [
    "CAMERA_INFO",
    "COMPRESSED_IMAGE",
    "DETECTIONS",
    "IMAGE",
    "SEGMENTS",
    "TF",
    "BagReader",
    "BagWriter",
    "header",
    "message",
    "stamp_of",
]
