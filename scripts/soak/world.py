"""What the soak's camera sees: frames of a recording as messages, four masks each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picopose_ros.msg import SegmentArray
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, Image

from picopose_ros.errors import BagError
from picopose_ros.messages import bags

SEGMENTS = 4


@dataclass(frozen=True)
class View:
    """One frame; the messages are published again and again under new stamps."""

    image: Image
    camera_info: CameraInfo
    segmentation: SegmentArray


def demo_world(folder: Path, frames: int) -> tuple[Path, Path]:
    """Meshes and recording of the demo's world (640x480); made on the first call.

    Args:
        folder: where it is put.
        frames: images that are rendered.
    """
    from picopose_ros.demo.world import build_world  # a renderer and all: the peers do without

    files = build_world(folder, frames)
    return files.meshes, files.bag


def load_views(recording: Path) -> list[View]:
    """The frames of a recording that have at least four masks, cut to four.

    Raises:
        BagError: the recording can't be read, or has no such topics.
    """
    found: dict[int, dict[str, Any]] = {}
    with bags.BagReader(recording) as reader:
        kinds = {bags.IMAGE: Image, bags.CAMERA_INFO: CameraInfo, bags.SEGMENTS: SegmentArray}
        names = {
            reader.topic(kind): name for kind, name in zip(kinds, ("image", "camera_info", "segmentation"))
        }
        for connection, _, raw in reader.raw(list(names)):
            message = deserialize_message(bytes(raw), kinds[connection.msgtype])
            found.setdefault(bags.stamp_of(message), {})[names[connection.topic]] = message
    views = []
    for messages in found.values():
        if len(messages) == len(names) and len(messages["segmentation"].segments) >= SEGMENTS:
            view = View(**messages)
            view.segmentation.segments = view.segmentation.segments[:SEGMENTS]
            views.append(view)
    if not views:
        raise BagError(f"bag {recording} has no frame of {SEGMENTS} masks with its image and camera_info")
    return views


def stamped(message: Any, stamp: int) -> Any:
    """The same message under another stamp (ns); changed in place, publishing copies it."""
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 1_000_000_000)
    return message
