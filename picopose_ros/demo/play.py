"""Plays a bag into ROS topics in the order of recording, at the rate the node can follow.

A process of its own: ``python -m picopose_ros.demo.play BAG``. After every segmentation it waits for the
node's answer to that image before it goes on, so that a slow machine shows the same frames as a fast one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray

from picopose_ros.messages import bags
from picopose_ros.msg import SegmentArray

TYPES = {bags.IMAGE: Image, bags.CAMERA_INFO: CameraInfo, bags.SEGMENTS: SegmentArray, bags.TF: TFMessage}
DISCOVERY_SECONDS = 30.0


class Player(Node):
    """Publishes what a bag holds, byte for byte.

    Args:
        reader: the bag.
        answer_seconds: how long to wait for the answer to one segmentation.
    """

    def __init__(self, reader: bags.BagReader, answer_seconds: float) -> None:
        super().__init__("bag_player")
        self._reader = reader
        self._answer_seconds = answer_seconds
        self._answered: set[int] = set()
        self._topics = {c.topic: c.msgtype for c in reader.connections if c.msgtype in TYPES}
        self._publishers_by_topic = {
            topic: self.create_publisher(TYPES[kind], topic, QoSProfile(depth=20))
            for topic, kind in self._topics.items()
        }
        self.create_subscription(Detection3DArray, "/detections", self._on_detections, QoSProfile(depth=20))

    def _on_detections(self, message: Detection3DArray) -> None:
        self._answered.add(bags.stamp_of(message))

    def wait_for_listeners(self) -> bool:
        """Wait until somebody listens to each topic; False if nobody came."""
        deadline = time.monotonic() + DISCOVERY_SECONDS
        while time.monotonic() < deadline:
            if all(p.get_subscription_count() for p in self._publishers_by_topic.values()):
                return True
            rclpy.spin_once(self, timeout_sec=0.1)
        return False

    def play(self) -> int:
        """Publish everything; returns the number of segmentations without an answer."""
        missing = 0
        for connection, _, raw in self._reader.raw(list(self._topics)):
            self._publishers_by_topic[connection.topic].publish(bytes(raw))
            rclpy.spin_once(self, timeout_sec=0.0)
            if connection.msgtype == bags.SEGMENTS:
                stamp = bags.stamp_of(self._reader.decode(raw, connection))
                missing += not self._wait_for(stamp)
        return missing

    def _wait_for(self, stamp: int) -> bool:
        deadline = time.monotonic() + self._answer_seconds
        while stamp not in self._answered:
            if time.monotonic() > deadline:
                return False
            rclpy.spin_once(self, timeout_sec=0.2)
        return True


def main(argv: list[str] | None = None) -> int:
    """Play a bag; returns 0, or 1 if nobody listened."""
    parser = argparse.ArgumentParser(prog="python -m picopose_ros.demo.play", description=__doc__)
    parser.add_argument("bag", type=Path)
    parser.add_argument("--answer-seconds", type=float, default=60.0)
    args = parser.parse_args(argv)
    rclpy.init()
    try:
        with bags.BagReader(args.bag) as reader:
            player = Player(reader, args.answer_seconds)
            if not player.wait_for_listeners():
                print("nobody listens to the bag's topics", file=sys.stderr)
                return 1
            missing = player.play()
            if missing:
                print(f"{missing} segmentations had no answer in {args.answer_seconds:g} s", file=sys.stderr)
            player.destroy_node()
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
