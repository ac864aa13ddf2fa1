"""Segments of another program's, published for the images of a topic as they come."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from picopose_ros.msg import SegmentArray
from picopose_ros.node.conversions import segments_to_message, stamp_to_nanoseconds
from picopose_ros.segmentation import Segment

_TYPES = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage}
_DEPTH = 50


class Source(Protocol):
    """Where the segments come from."""

    def answer(self, stamp: int, size: tuple[int, int] | None = None) -> list[Segment] | None:
        """Segments of the image with this stamp (ns) and size (height, width), None if there are none."""


class SegmentPublisher(Node):
    """Publishes the segments of a source, each under the header of its image.

    The images' publisher decides between raw and compressed images and between reliable and best effort: the
    subscription is made when it turns up and made anew when it turns up as another.

    Args:
        source: of the segments.
        image_topic, segmentation_topic: names.
    """

    def __init__(self, source: Source, image_topic: str, segmentation_topic: str, **kwargs: Any) -> None:
        super().__init__("segments_from_cnos", **kwargs)
        self._source = source
        self._publisher = self.create_publisher(SegmentArray, segmentation_topic, QoSProfile(depth=_DEPTH))
        self._topic = self.resolve_topic_name(image_topic)
        self._offer: tuple[str, ReliabilityPolicy] | None = None
        self._subscription: Subscription | None = None
        self.create_timer(0.2, self._look_for_images)
        self.get_logger().info(f"waiting for images on {self._topic}")

    def _look_for_images(self) -> None:
        reliable, best_effort = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
        offers = [
            (
                publisher.topic_type,
                reliable if publisher.qos_profile.reliability == reliable else best_effort,
            )
            for publisher in self.get_publishers_info_by_topic(self._topic)
            if publisher.topic_type in _TYPES
        ]
        if not offers or self._offer in offers:
            return
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
        self._offer = offers[0]
        kind, reliability = self._offer
        # Reliable where it is offered: large best-effort messages are mostly lost on the default transports.
        qos = QoSProfile(depth=_DEPTH, reliability=reliability)
        self._subscription = self.create_subscription(_TYPES[kind], self._topic, self._on_image, qos)
        self.get_logger().info(
            f"publishing {self._publisher.topic_name} for the images on {self._topic} ({kind}, "
            f"{reliability.name.lower()})"
        )

    def _on_image(self, message: Image | CompressedImage) -> None:
        size = (message.height, message.width) if isinstance(message, Image) else None
        segments = self._source.answer(stamp_to_nanoseconds(message.header.stamp), size)
        if segments is None:
            return
        if size is None:  # a compressed image doesn't say its size; of no use where nothing was seen
            if not segments:
                return
            size = segments[0].mask.shape
        self._publisher.publish(segments_to_message(segments, message.header, *size))


def publish_segments(source: Source, image_topic: str, segmentation_topic: str) -> None:
    """Publish until SIGINT or SIGTERM.

    Args:
        source: of the segments.
        image_topic: of the images; raw or compressed.
        segmentation_topic: to publish on.
    """
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    handlers: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = SegmentPublisher(source, image_topic, segmentation_topic)
    try:
        while not stopped and rclpy.ok():
            rclpy.spin_once(node, timeout_sec=0.2)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)
