"""The node's peers, each a process that can be killed: a camera with its segmenter, and a listener.

    peers.py publisher RECORDING LOG --image-rate 30 --segmentation-rate 10
    peers.py listener LOG

LOG gets a line per segmentation that was sent, or per answer that has come: its stamp in ns.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import rclpy
from picopose_ros.msg import SegmentArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, Image
from vision_msgs.msg import Detection3DArray
from world import load_views, stamped

from picopose_ros.messages.bags import stamp_of

DELAY_FRAMES = 3
"""How many images later a segmentation is sent: 100 ms at 30 Hz."""

NAMESPACE = "soak"


class Stop:
    """Whether SIGTERM or SIGINT has come."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


def be_camera(node: Node, args: argparse.Namespace, stop: Stop) -> None:
    """Images at a steady rate, some with a segmentation later, until told to stop; then all is delivered."""
    views = load_views(args.recording)
    images = node.create_publisher(Image, "image", QoSProfile(depth=10))
    infos = node.create_publisher(CameraInfo, "camera_info", QoSProfile(depth=10))
    segmentations = node.create_publisher(SegmentArray, "segmentation", QoSProfile(depth=50))
    while not stop.requested and not all(p.get_subscription_count() for p in (images, infos, segmentations)):
        time.sleep(0.05)
    every = round(args.image_rate / args.segmentation_rate) if args.segmentation_rate else 0
    due: deque[tuple[int, int, int]] = deque()  # frame number, stamp, view

    def publish(publisher: Publisher, message: Any) -> bool:
        """Whether the middleware took it; it may refuse while a killed reader is still on the graph."""
        try:
            publisher.publish(message)
        except RuntimeError as error:
            print(f"{publisher.topic_name}: {error}", file=sys.stderr)
            return False
        return True

    with args.log.open("a", buffering=1) as log:

        def send_due(before: int) -> None:
            while due and due[0][0] <= before:
                _, stamp, view = due.popleft()
                if publish(segmentations, stamped(views[view].segmentation, stamp)):
                    log.write(f"{stamp}\n")

        started, number = time.monotonic(), 0
        while not stop.requested:
            stamp, view = time.time_ns(), number % len(views)
            publish(images, stamped(views[view].image, stamp))
            publish(infos, stamped(views[view].camera_info, stamp))
            if every and number % every == 0:
                due.append((number + DELAY_FRAMES, stamp, view))
            send_due(number)
            number += 1
            time.sleep(max(started + number / args.image_rate - time.monotonic(), 0))
        send_due(number + DELAY_FRAMES)
    for publisher in (images, infos, segmentations):
        publisher.wait_for_all_acked(Duration(seconds=30))


def be_listener(node: Node, args: argparse.Namespace, stop: Stop) -> None:
    """Write down what comes, until told to stop."""
    with args.log.open("a", buffering=1) as log:
        node.create_subscription(
            Detection3DArray, "detections", lambda message: log.write(f"{stamp_of(message)}\n"), 50
        )
        while not stop.requested:
            rclpy.spin_once(node, timeout_sec=0.2)


def main() -> None:
    """Be the peer that the command line names."""
    parser = argparse.ArgumentParser()
    roles = parser.add_subparsers(required=True)
    publisher = roles.add_parser("publisher")
    publisher.add_argument("recording", type=Path)
    publisher.add_argument("log", type=Path)
    publisher.add_argument("--image-rate", type=float, default=30.0)
    publisher.add_argument("--segmentation-rate", type=float, default=10.0)
    publisher.set_defaults(run=be_camera)
    listener = roles.add_parser("listener")
    listener.add_argument("log", type=Path)
    listener.set_defaults(run=be_listener)
    args = parser.parse_args()
    stop = Stop()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(args.run.__name__, namespace=NAMESPACE)
    try:
        args.run(node, args, stop)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
