"""The soak's own place on the graph: what the node answers and says of itself."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from peers import NAMESPACE
from picopose_ros.msg import SegmentArray
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image
from vision_msgs.msg import Detection3DArray
from world import View, stamped

from picopose_ros.bags import stamp_of

OF_A_PART = frozenset(
    {
        *("bad_segment", "empty_mask", "small_mask", "unknown_class", "no_pose", "low_score"),
        *("bad_frame_id", "no_transform", "no_overlay"),
    }
)
"""Reasons that drop a segment or an output beside the detections: the segmentation is still answered."""


class Client:
    """Publishes frames and remembers answers and diagnostics."""

    def __init__(self) -> None:
        self._context = Context()
        rclpy.init(context=self._context, args=[])
        self._node = rclpy.create_node("soak", namespace=NAMESPACE, context=self._context)
        self._changed = threading.Condition()
        self.answered: dict[int, int] = {}
        self.values: dict[str, str] = {}
        self.publishers = {
            "image": self._node.create_publisher(Image, "image", QoSProfile(depth=10)),
            "camera_info": self._node.create_publisher(CameraInfo, "camera_info", QoSProfile(depth=10)),
            "segmentation": self._node.create_publisher(SegmentArray, "segmentation", QoSProfile(depth=50)),
        }
        self._node.create_subscription(Detection3DArray, "detections", self._on_detections, 100)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the graph."""
        self._context.try_shutdown()
        self._thread.join(10)
        self._node.destroy_node()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass

    def _on_detections(self, message: Detection3DArray) -> None:
        with self._changed:
            stamp = stamp_of(message)
            self.answered[stamp] = self.answered.get(stamp, 0) + 1
            self._changed.notify_all()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        with self._changed:
            for status in message.status:
                if status.name.startswith(f"/{NAMESPACE}/picopose_node"):
                    self.values = {pair.key: pair.value for pair in status.values}
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], object], seconds: float) -> bool:
        """Whether the condition came true in time; looked at after every message and ten times a second."""
        end = time.monotonic() + seconds
        with self._changed:
            while not condition():
                if time.monotonic() > end:
                    return False
                self._changed.wait(0.1)
        return True

    def ready(self) -> bool:
        """Whether the node says that it is active, and its topics are connected.

        The graph alone does not tell: for seconds it holds a node that was killed.
        """
        return self.values.get("state") == "active" and all(
            publisher.get_subscription_count() for publisher in self.publishers.values()
        )

    def forget(self) -> None:
        """Forget what a node that is no more said of itself."""
        with self._changed:
            self.values = {}

    def publish(self, topic: str, message: Any) -> None:
        """Publish a message, or the bytes of one."""
        self.publishers[topic].publish(message)

    def send(self, view: View) -> int:
        """Publish a good frame with its segmentation; returns its stamp (ns)."""
        stamp = time.time_ns()
        for topic in self.publishers:
            self.publish(topic, stamped(getattr(view, topic), stamp))
        return stamp

    def ask(self, view: View, seconds: float) -> float | None:
        """Milliseconds until a good frame was answered, or None if it was not in time."""
        started = time.monotonic()
        stamp = self.send(view)
        if not self.wait_for(lambda: stamp in self.answered, seconds):
            return None
        return 1e3 * (time.monotonic() - started)

    # What the diagnostics say.

    def count(self, key: str) -> int:
        """A counter, 0 if it is not there."""
        return int(self.values.get(key, 0))

    def dropped(self) -> dict[str, int]:
        """Segmentations that were not answered, by reason."""
        found = {}
        for key, value in self.values.items():
            reason = re.fullmatch(r"dropped_(\w+)", key)
            if reason and reason[1] not in OF_A_PART:
                found[reason[1]] = int(value)
        return found

    def latency(self, stage: str) -> float | None:
        """Median of a stage in milliseconds."""
        found = re.search(r"median ([\d.]+)", self.values.get(f"latency_{stage}_ms", ""))
        return float(found[1]) if found else None
