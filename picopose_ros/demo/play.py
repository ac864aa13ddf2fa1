"""Plays a bag into ROS topics in the order of recording, at the rate the node can follow.

A process of its own: ``python -m picopose_ros.demo.play BAG``. After every segmentation it waits for the
node's answer to that image before it goes on, so that a slow machine shows the same frames as a fast one.
With ``--no-masks`` it leaves the segmentations out, for a segmenter that listens, and waits after every
image. With ``--late`` it plays a segmentation a second alone, each as late as it was recorded, and waits for
no answer: the images come at the recording's rate, or at a share of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
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
MASK_PERIOD = 1_000_000_000
"""Of late masks, ns of the images' clock between two segmentations."""
QUIET_SECONDS = 15.0
"""Without a new answer, after which none is expected any more."""


class Player(Node):
    """Publishes what a bag holds, byte for byte.

    Args:
        reader: the bag.
        answer_seconds: how long to wait for the answer to one segmentation.
        masks: whether the segmentations are published.
    """

    def __init__(self, reader: bags.BagReader, answer_seconds: float, masks: bool = True) -> None:
        super().__init__("bag_player")
        self._reader = reader
        self._answer_seconds = answer_seconds
        self._answered: set[int] = set()
        self._topics = {c.topic: c.msgtype for c in reader.connections if c.msgtype in TYPES}
        if not masks:
            self._topics = {topic: kind for topic, kind in self._topics.items() if kind != bags.SEGMENTS}
        # What completes what is to be answered: the camera_info comes after its image.
        self._last = bags.SEGMENTS if masks else bags.CAMERA_INFO
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
            counts = {t: p.get_subscription_count() for t, p in self._publishers_by_topic.items()}
            # Without masks the images are for a segmenter, too.
            two = self._last == bags.CAMERA_INFO
            if all(counts[t] > (two and kind == bags.IMAGE) for t, kind in self._topics.items()):
                return True
            rclpy.spin_once(self, timeout_sec=0.1)
        return False

    def play(self) -> int:
        """Publish everything; returns the number of images without an answer."""
        missing = 0
        for connection, _, raw in self._reader.raw(list(self._topics)):
            self._publishers_by_topic[connection.topic].publish(bytes(raw))
            rclpy.spin_once(self, timeout_sec=0.0)
            if connection.msgtype == self._last:
                stamp = bags.stamp_of(self._reader.decode(raw, connection))
                missing += not self._wait_for(stamp)
        return missing

    def play_late(self, speed: float) -> None:
        """Publish everything when it was recorded, of the segmentations one a second.

        It is done when no new answer comes any more.

        Args:
            speed: seconds of the recording per second.
        """
        begun, first, due = time.monotonic(), None, 0
        for connection, recorded, raw in self._reader.raw(list(self._topics)):
            if connection.msgtype == bags.SEGMENTS:
                stamp = bags.stamp_of(self._reader.decode(raw, connection))
                if stamp < due:
                    continue
                due = stamp + MASK_PERIOD
            first = recorded if first is None else first
            self._spin_until(begun + (recorded - first) * 1e-9 / speed)
            self._publishers_by_topic[connection.topic].publish(bytes(raw))
        # The first answer waits for an estimate of everything in the image.
        self._spin_until(time.monotonic() + self._answer_seconds, lambda: bool(self._answered))
        answered = -1
        while len(self._answered) > answered:
            answered = len(self._answered)
            self._spin_until(time.monotonic() + QUIET_SECONDS)

    def _spin_until(self, moment: float, done: Callable[[], bool] = lambda: False) -> None:
        while (left := moment - time.monotonic()) > 0 and not done():
            rclpy.spin_once(self, timeout_sec=left)

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
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-masks", action="store_true", help="leave the segmentations out")
    how.add_argument(
        "--late", type=float, metavar="SPEED", help="one segmentation a second; seconds of the bag per second"
    )
    args = parser.parse_args(argv)
    rclpy.init()
    try:
        with bags.BagReader(args.bag) as reader:
            player = Player(reader, args.answer_seconds, not args.no_masks)
            if not player.wait_for_listeners():
                print("nobody listens to the bag's topics", file=sys.stderr)
                return 1
            missing = 0
            if args.late:
                player.play_late(args.late)
            else:
                missing = player.play()
            if missing:
                print(f"{missing} images had no answer in {args.answer_seconds:g} s", file=sys.stderr)
            player.destroy_node()
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
