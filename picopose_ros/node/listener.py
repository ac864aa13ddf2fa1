"""What the node listens to: images, camera_infos and segmentations, and which of them belong together."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from vision_msgs.msg import Detection2DArray

from picopose_ros.errors import ConfigError
from picopose_ros.messages.detections import yolo_message_type
from picopose_ros.messages.reasons import no_stamp
from picopose_ros.msg import SegmentArray
from picopose_ros.node.conversions import stamp_to_nanoseconds
from picopose_ros.node.depth import DepthBuffer
from picopose_ros.node.diagnostics import Latencies
from picopose_ros.node.drops import DropLog
from picopose_ros.node.pairing import HalfJoin, Pair, PairingCounts, StampPairing
from picopose_ros.node.parameters import NodeParameters
from picopose_ros.node.subscriptions import InputSubscription, reliability_is_given

IMAGE_DEPTH = 10
SEGMENTATION_DEPTH = 50


def resolve_topics(node: Node, p: NodeParameters) -> dict[str, str]:
    """Full names of the inputs, by what they are.

    Raises:
        ConfigError: two of them are the same.
    """
    names = ["image", "camera_info", "segmentation"]
    if p.segmentation_input == "detections":
        names.append("labels")
    if p.depth == "auto":
        names.append("depth")
    topics = {name: node.resolve_topic_name(name) for name in names}
    if p.image_transport == "compressed":
        # As image_transport does it: a remapping of the image's topic holds for all its transports.
        topics["image"] += "/compressed"
    for name, topic in topics.items():
        other = next(one for one in topics if topics[one] == topic)
        if other != name:
            raise ConfigError(f"topics {other} and {name} are both {topic}: remap one of them")
    return topics


def segmentation_type(kind: str) -> type:
    """Type of the topic ``segmentation`` (parameter ``segmentation_input``).

    Raises:
        ConfigError: the package of the message is not installed.
    """
    if kind == "yolo":
        return yolo_message_type()
    types = {"segments": SegmentArray, "mask": Image}
    return types.get(kind, Detection2DArray)


class Listener:
    """The subscriptions of a node and the pairing of their messages; all is called on the executor's threads.

    :meth:`prepare`, then :meth:`start` and :meth:`stop` any number of times, then :meth:`release`.

    Args:
        node: owner of the subscriptions.
        drops: what can't be paired is recorded there.
        latencies: how long a segmentation lay in the middleware is recorded there.
        deliver: called with every pair, in the order in which they are made, one at a time.
        image_came: called after every image and camera_info.

    Attributes:
        counts: messages that came and pairs that went, since the node was started.
        topics: full names of the inputs, by what they are.
        depths: depth images of lately, where they are asked for.
    """

    def __init__(
        self,
        node: Node,
        drops: DropLog,
        latencies: Latencies,
        deliver: Callable[[Pair], None],
        image_came: Callable[[], None] = lambda: None,
    ) -> None:
        self._node = node
        self._drops = drops
        self._latencies = latencies
        self._deliver = deliver
        self._image_came = image_came
        self._lock = threading.RLock()
        self._subscriptions: list[InputSubscription] = []
        self._pairing: StampPairing | None = None
        self._halves: HalfJoin | None = None
        self._reliability_given: dict[str, bool] = {}
        self.counts = PairingCounts()
        self.depths: DepthBuffer | None = None
        self.topics: dict[str, str] = {}

    def prepare(self, p: NodeParameters) -> None:
        """Find the topics' names, make the buffers.

        Raises:
            ConfigError: two topics are the same, or the segmentation's package is not installed.
        """
        self.topics = resolve_topics(self._node, p)
        segmentation_type(p.segmentation_input)  # told of now, not when the node is activated
        with self._lock:
            self.depths = DepthBuffer(self.topics["depth"]) if p.depth == "auto" else None
            self._pairing = StampPairing(
                p.buffer_seconds,
                p.buffer_images,
                self._drops.record,
                on_jump=self._on_jump,
                counts=self.counts,
            )
            if p.segmentation_input == "detections":
                self._halves = HalfJoin(
                    (self.topics["segmentation"], self.topics["labels"]), self._drops.record
                )

    def start(self, p: NodeParameters) -> None:
        """Subscribe.

        Raises:
            ConfigError: a QoS override that can't be used; what was subscribed to before stays.
        """
        image_type = CompressedImage if p.image_transport == "compressed" else Image
        self._subscribe("image", image_type, self._on_image, IMAGE_DEPTH, p.image_reliability)
        if self.depths is not None:
            depths = self.depths
            self._subscribe("depth", Image, lambda m, _: depths.add(m), IMAGE_DEPTH, p.image_reliability)
        self._subscribe("camera_info", CameraInfo, self._on_camera_info, IMAGE_DEPTH, p.image_reliability)
        if p.segmentation_input == "detections":
            labels, boxes = (functools.partial(self._on_half, half) for half in (1, 0))
            self._subscribe("labels", Image, labels, SEGMENTATION_DEPTH)
            self._subscribe("segmentation", Detection2DArray, boxes, SEGMENTATION_DEPTH)
        else:
            kind = segmentation_type(p.segmentation_input)
            self._subscribe("segmentation", kind, self._on_segmentation, SEGMENTATION_DEPTH)

    def stop(self) -> None:
        """Unsubscribe and forget what waits; it is reported."""
        with self._lock:
            for subscription in self._subscriptions:
                subscription.destroy()
            self._subscriptions.clear()
            if self._halves is not None:
                self._halves.clear()
            if self._pairing is not None:
                self._pairing.clear("the node was deactivated")

    def release(self) -> None:
        """Unsubscribe and let go of the buffers."""
        with self._lock:
            self.stop()
            self._pairing = self._halves = None

    @property
    def listening(self) -> bool:
        """Whether it is subscribed."""
        with self._lock:
            return bool(self._subscriptions)

    @property
    def buffered(self) -> int:
        """Images that wait for a segmentation."""
        with self._lock:
            return 0 if self._pairing is None else len(self._pairing)

    def images_after(self, stamp: int) -> list[Pair]:
        """Images that are buffered, newer than a stamp (ns), oldest first; for any thread."""
        with self._lock:
            return [] if self._pairing is None else self._pairing.images_after(stamp, time.monotonic())

    @property
    def epoch(self) -> int:
        """How often the images' time has started over."""
        with self._lock:
            return 0 if self._pairing is None else self._pairing.epoch

    @property
    def publishers(self) -> dict[str, int]:
        """How many publishers each input has, by the full name of its topic."""
        with self._lock:
            return {one.topic: one.publishers for one in self._subscriptions}

    def problems(self) -> list[str]:
        """What keeps messages of publishers that are there from coming."""
        with self._lock:
            return [problem for one in self._subscriptions for problem in one.problems()]

    def housekeeping(self) -> None:
        """Adapt to publishers, give up what waits too long; to be called a few times a second."""
        with self._lock:
            if not self._subscriptions:
                return
            for subscription in self._subscriptions:
                subscription.adapt()
            now = time.monotonic()
            if self._halves is not None:
                self._halves.expire(now)
            self._hand_over(self._pairing.expire(now))

    def _subscribe(
        self,
        name: str,
        message_type: type,
        callback: Callable[[Any, Any], None],
        depth: int,
        reliability: str = "auto",
    ) -> None:
        topic = self.topics[name]
        if topic not in self._reliability_given:
            self._reliability_given[topic] = reliability_is_given(self._node, topic)
        subscription = InputSubscription(
            self._node,
            message_type,
            topic,
            self._drops.guard(callback),
            depth,
            reliability,
            self._reliability_given[topic],
        )
        with self._lock:
            self._subscriptions.append(subscription)

    def _on_image(self, message: Image | CompressedImage, info: Mapping[str, Any]) -> None:
        self._pair("image", lambda pairing, stamp, now: pairing.add_image(stamp, message, now), message)
        self._image_came()

    def _on_camera_info(self, message: CameraInfo, info: Mapping[str, Any]) -> None:
        self._pair(
            "camera_info", lambda pairing, stamp, now: pairing.add_camera_info(stamp, message, now), message
        )
        self._image_came()

    def _on_segmentation(self, message: SegmentArray | Image, info: Mapping[str, Any]) -> None:
        self._note_receipt(info)
        self._pair(
            "segmentation", lambda pairing, stamp, now: pairing.add_segmentation(stamp, message, now), message
        )

    def _on_half(self, half: int, message: Detection2DArray | Image, info: Mapping[str, Any]) -> None:
        self._note_receipt(info)

        def add(pairing: StampPairing, stamp: int, now: float) -> list[Pair]:
            both = self._halves.add(half, stamp, message, now)
            return [] if both is None else pairing.add_segmentation(stamp, both, now)

        self._pair("labels" if half else "segmentation", add, message)

    def _note_receipt(self, info: Mapping[str, Any]) -> None:
        """How long a segmentation lay between the middleware and this node."""
        received = info["received_timestamp"]
        if received:  # not every middleware tells; the clock may have been set meanwhile
            self._latencies.record({"receive": max(time.time_ns() - received, 0) / 1e6})

    def _pair(self, name: str, add: Callable[[StampPairing, int, float], list[Pair]], message: Any) -> None:
        with self._lock:
            # A message may have been taken before its subscription was destroyed.
            if not self._subscriptions:
                return
            stamp = stamp_to_nanoseconds(message.header.stamp)
            # A camera_info that is published once needs no stamp.
            if stamp <= 0 and name != "camera_info":
                self.counts.images += name == "image"
                self.counts.segmentations += name == "segmentation"
                self._drops.report(no_stamp(name, self.topics[name]))
                return
            self._hand_over(add(self._pairing, stamp, time.monotonic()))

    def _hand_over(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            self._deliver(pair)

    def _on_jump(self, message: str) -> None:
        self._node.get_logger().warning(message)
