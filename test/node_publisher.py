"""A camera and its segmenter as a process of their own: ``python node_publisher.py SCENE.npz NAMESPACE``.

Publishes ten frames a second, stamped with the wall clock, each segmentation two frames after its image,
until it is killed.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import numpy as np
import rclpy
from node_harness import Scene, camera_message, image_message, segments_message
from picopose_ros.msg import SegmentArray
from sensor_msgs.msg import CameraInfo, Image

from picopose_ros.segmentation import Segment

DELAY_FRAMES = 2


def save_scene(scene: Scene, path: str) -> None:
    """Write a scene for this program."""
    masks = np.stack([segment.mask for segment in scene.segments])
    np.savez(path, rgb=scene.rgb, masks=masks, classes=[segment.class_id for segment in scene.segments])


def main(path: str, namespace: str) -> None:
    """Publish until killed."""
    scene = np.load(path)
    segments = [
        Segment(str(name), 0.9, mask) for name, mask in zip(scene["classes"], scene["masks"], strict=True)
    ]
    rclpy.init()
    node = rclpy.create_node("publisher", namespace=namespace)
    images = node.create_publisher(Image, "image", 10)
    infos = node.create_publisher(CameraInfo, "camera_info", 10)
    segmentations = node.create_publisher(SegmentArray, "segmentation", 10)
    due: deque[int] = deque()

    def tick() -> None:
        stamp = time.time_ns()
        images.publish(image_message(scene["rgb"], stamp))
        infos.publish(camera_message(stamp))
        due.append(stamp)
        if len(due) > DELAY_FRAMES:
            segmentations.publish(segments_message(segments, due.popleft()))

    node.create_timer(0.1, tick)
    rclpy.spin(node)


if __name__ == "__main__":
    main(*sys.argv[1:])
