"""``picopose_node``: images and masks in, detections and TF out."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray

from picopose_ros.errors import CameraError, ConfigError, ImageError, SegmentError
from picopose_ros.estimator import ObjectPose, PoseEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.images import image_to_rgb
from picopose_ros.instances import InstanceNamer
from picopose_ros.msg import SegmentArray
from picopose_ros.node.conversions import (
    camera_from_message,
    detections_message,
    segments_from_message,
    stamp_to_nanoseconds,
    transform_from_pose,
)
from picopose_ros.node.diagnostics import Latencies, NodeStatus, diagnostics_message
from picopose_ros.node.drops import DropLog, DropReason
from picopose_ros.node.logs import RosLogHandler
from picopose_ros.node.pairing import Pair, StampPairing, format_stamp
from picopose_ros.node.parameters import declare_parameters
from picopose_ros.node.subscriptions import InputSubscription
from picopose_ros.node.worker import NewestWorker
from picopose_ros.segmentation import Segment

try:
    from tf2_ros import TransformBroadcaster
except ImportError:  # a plain machine has tf2_msgs, but no tf2_ros
    TransformBroadcaster = None

IMAGE_DEPTH = 10
SEGMENTATION_DEPTH = 50
HOUSEKEEPING_PERIOD = 0.1
"""Seconds between looks at what waits too long; also how long after loading the node turns ready at most."""


class LoadingInterrupted(Exception):
    """The node was asked to stop while it was loading."""


class PicoPoseNode(Node):
    """Subscribes image, camera_info and segmentation; publishes detections, TF and diagnostics.

    Loading (weights, banks, warm-up) and inference happen on a worker thread, so the executor always answers.
    The input subscriptions are made once loading is done: whoever sees them on the graph knows that the node
    is ready.

    Attributes:
        failure: what ended the loading, or None.

    Raises:
        ConfigError: a parameter that can't be used.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("picopose_node", **kwargs)
        self._settings = declare_parameters(self)
        self.failure: Exception | None = None
        self._state = "loading"
        self._progress = ""
        logging.getLogger("picopose_ros").addHandler(RosLogHandler(self.get_logger()))
        self._device = _resolve_device(self._settings.device)
        self._started = time.monotonic()
        self._estimator: PoseEstimator | None = None
        self._namer = InstanceNamer()
        self._drops = DropLog(self.get_logger().warning)
        self._drops_reported = 0
        self._latencies = Latencies()
        self._frames_answered = 0
        self._poses_published = 0
        self._inputs: list[InputSubscription] = []
        self._topics = {"image": "image", "camera_info": "camera_info", "segmentation": "segmentation"}

        self._detections = self.create_publisher(Detection3DArray, "detections", QoSProfile(depth=10))
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self._send_transforms = self._make_transform_sender()

        self._pairing = StampPairing(
            self._settings.buffer_seconds, self._settings.buffer_images, self._drops.record
        )
        self._worker: NewestWorker[Pair] = NewestWorker(
            self._load, self._process, self._on_crash, order=lambda pair: pair.order
        )
        # Not the node's clock: with simulated time a paused bag would stop the housekeeping too.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(HOUSEKEEPING_PERIOD, self._guard(self._housekeeping), clock=steady)
        self.create_timer(1.0, self._guard(self._publish_diagnostics), clock=steady)
        self._worker.start()

    def close(self, timeout: float) -> bool:
        """Stop listening and end the worker; False if it is still at work after ``timeout`` seconds."""
        for subscription in self._inputs:
            subscription.destroy()
        self._inputs.clear()
        return self._worker.close(timeout)

    # Loading, on the worker thread.

    def _load(self) -> None:
        p = self._settings
        self.get_logger().info(f"loading {p.preset} on {self._device} and the objects in {p.mesh_dir}")
        estimator = PoseEstimator.from_mesh_dir(
            p.mesh_dir,
            preset=p.preset,
            weights=p.weights,
            device=self._device,
            unit=p.unit,
            viewpoints=p.viewpoints,
            cache_dir=p.cache_dir,
            hypotheses=p.hypotheses,
            progress=self._on_progress,
        )
        self._warm_up(estimator)
        self._estimator = estimator

    def _on_progress(self, class_id: str, done: int, total: int) -> None:
        if self._worker.closing:
            raise LoadingInterrupted
        self._progress = f"{class_id} {done}/{total}"

    @staticmethod
    def _warm_up(estimator: PoseEstimator) -> None:
        """One frame that means nothing: allocations and lazy set-up are done before the first real one."""
        height, width = 480, 640
        rows, cols = np.mgrid[:height, :width]
        rgb = np.stack([rows % 256, cols % 256, (rows + cols) % 256], -1).astype(np.uint8)
        mask = (rows - height / 2) ** 2 + (cols - width / 2) ** 2 < 100**2
        K = np.array([[600.0, 0, width / 2], [0, 600.0, height / 2], [0, 0, 1]])
        segment = Segment(class_id=next(iter(estimator.banks)), score=1.0, mask=mask)
        estimator.estimate(rgb, CameraModel(K, width, height, "", ()), [segment])

    # On the executor: receive, pair, look after things.

    def _activate(self) -> None:
        p = self._settings
        for name, message_type, callback, depth, reliability in (
            ("image", Image, self._on_image, IMAGE_DEPTH, p.image_reliability),
            ("camera_info", CameraInfo, self._on_camera_info, IMAGE_DEPTH, p.image_reliability),
            ("segmentation", SegmentArray, self._on_segmentation, SEGMENTATION_DEPTH, "auto"),
        ):
            subscription = InputSubscription(
                self, message_type, name, self._guard(callback), depth, reliability
            )
            self._inputs.append(subscription)
            self._topics[name] = subscription.topic
        self._state = "ready"
        objects = sorted(self._estimator.banks)
        self.get_logger().info(
            f"picopose_node ready: {len(objects)} object{'s' if len(objects) != 1 else ''} "
            f"({', '.join(objects)}), {p.preset} on {self._device}, {p.viewpoints} viewpoints, "
            f"hypotheses per segment: {p.hypotheses}, loaded in {time.monotonic() - self._started:.1f} s; "
            f"listening to {', '.join(self._topics.values())}"
        )

    def _on_image(self, message: Image) -> None:
        self._submit(
            self._pairing.add_image(stamp_to_nanoseconds(message.header.stamp), message, time.monotonic())
        )

    def _on_camera_info(self, message: CameraInfo) -> None:
        stamp = stamp_to_nanoseconds(message.header.stamp)
        self._submit(self._pairing.add_camera_info(stamp, message, time.monotonic()))

    def _on_segmentation(self, message: SegmentArray) -> None:
        stamp = stamp_to_nanoseconds(message.header.stamp)
        self._submit(self._pairing.add_segmentation(stamp, message, time.monotonic()))

    def _submit(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            # The one that loses its place is the older of two: pairs don't always come in order.
            replaced = self._worker.submit(pair)
            if replaced is not None:
                self._drops.record(
                    DropReason.BUSY,
                    f"segmentation {format_stamp(replaced.stamp)} was overtaken by a newer one before the "
                    "estimator was "
                    "free: segmentations come faster than poses can be computed",
                )

    def _housekeeping(self) -> None:
        if self._worker.failure is not None:
            self._state, self.failure = "failed", self._worker.failure
            return
        if self._state == "loading" and self._worker.ready.is_set():
            self._activate()
        for subscription in self._inputs:
            subscription.adapt()
        self._submit(self._pairing.expire(time.monotonic()))

    def _publish_diagnostics(self) -> None:
        counts = self._pairing.counts
        dropped = self._drops.total()
        details = {"preset": self._settings.preset, "viewpoints": str(self._settings.viewpoints)}
        if self._estimator is not None:
            details["objects"] = ", ".join(sorted(self._estimator.banks))
        elif self._progress:
            details["loading"] = self._progress
        status = NodeStatus(
            name=self.get_fully_qualified_name(),
            state=self._state,
            hardware=self._device,
            counts={
                "images_received": counts.images,
                "camera_infos_received": counts.camera_infos,
                "segmentations_received": counts.segmentations,
                "pairs_made": counts.pairs,
                "images_buffered": len(self._pairing),
                "segmentations_answered": self._frames_answered,
                "poses_published": self._poses_published,
            },
            drops=self._drops.snapshot(),
            new_drops=dropped - self._drops_reported,
            latencies=self._latencies.summary(),
            details=details,
        )
        self._drops_reported = dropped
        self._diagnostics.publish(diagnostics_message(status, self.get_clock().now().to_msg()))

    def _guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """``callback``, with whatever it raises counted and logged instead of ending the node."""

        @functools.wraps(callback)
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001 (one bad message must not end the node)
                self._on_crash(error)

        return guarded

    def _on_crash(self, error: Exception) -> None:
        trace = "".join(traceback.format_exception(error))
        self._drops.record(DropReason.INTERNAL_ERROR, f"unexpected error, please report it: {trace}")

    # Inference, on the worker thread.

    def _process(self, pair: Pair) -> None:
        started = time.monotonic()
        header: Header = pair.image.header
        try:
            rgb = image_to_rgb(pair.image, self._topics["image"])
            camera = camera_from_message(pair.camera_info, self._topics["camera_info"])
            segments = self._segments(pair, rgb.shape[:2])
        except ImageError as error:
            self._drops.record(DropReason.BAD_IMAGE, str(error))
            return
        except CameraError as error:
            self._drops.record(DropReason.BAD_CAMERA_INFO, str(error))
            return
        except SegmentError as error:
            self._drops.record(DropReason.MASK_SIZE, str(error))
            return
        if (camera.height, camera.width) != rgb.shape[:2]:
            size, other = f"{rgb.shape[1]}x{rgb.shape[0]}", f"{camera.width}x{camera.height}"
            self._drops.record(
                DropReason.BAD_CAMERA_INFO,
                f"camera_info on {self._topics['camera_info']} is of an image of {other} pixels, but "
                f"the image has {size}: use the camera_info that belongs to {self._topics['image']}",
            )
            return
        before = time.monotonic()
        poses = self._estimate(rgb, camera, segments)
        after = time.monotonic()
        self._publish(poses, header)
        done = time.monotonic()
        self._latencies.record(
            {
                "queue": 1e3 * (started - pair.received),
                "decode": 1e3 * (before - started),
                "estimate": 1e3 * (after - before),
                "publish": 1e3 * (done - after),
                "total": 1e3 * (done - pair.received),
            }
        )

    def _segments(self, pair: Pair, size: tuple[int, int]) -> list[Segment]:
        segments, bad = segments_from_message(pair.segmentation, *size, self._topics["segmentation"])
        for problem in bad:
            self._drops.record(problem.reason, problem.message)
        return segments

    def _estimate(self, rgb: np.ndarray, camera: CameraModel, segments: list[Segment]) -> list[ObjectPose]:
        result = self._estimator.estimate(rgb, camera, segments)
        self._latencies.record({k: ms for k, ms in result.timings.items() if k != "total"})
        for index, reason in result.skipped:
            self._drops.record(
                self._kind_of_skip(segments[index]),
                f"segment '{segments[index].class_id}' gave no pose: {reason}",
            )
        min_score = self.get_parameter("min_score").value
        poses = []
        for pose in result.poses:
            if pose.confidence < min_score:
                self._drops.record(
                    DropReason.LOW_SCORE,
                    f"a pose of '{pose.class_id}' has score {pose.confidence:.2f}, below min_score "
                    f"{min_score:g}",
                )
            else:
                poses.append(pose)
        return poses

    def _kind_of_skip(self, segment: Segment) -> DropReason:
        """What the estimator's reason for skipping a segment comes down to."""
        if np.count_nonzero(segment.mask) < self._estimator.settings.min_mask_pixels:
            return DropReason.SMALL_MASK
        return DropReason.NO_POSE if segment.class_id in self._estimator.banks else DropReason.UNKNOWN_CLASS

    def _publish(self, poses: list[ObjectPose], header: Header) -> None:
        names = self._namer.assign(
            [pose.class_id for pose in poses], [pose.T_cam_obj[:3, 3] for pose in poses]
        )
        self._detections.publish(detections_message(poses, names, header))
        self._frames_answered += 1
        self._poses_published += len(poses)
        if not poses or not self.get_parameter("publish_tf").value:
            return
        if not header.frame_id or header.frame_id.startswith("/"):
            self._drops.record(
                DropReason.BAD_FRAME_ID,
                f"images on {self._topics['image']} have frame_id '{header.frame_id}', which can't be a "
                "TF parent: set it in the camera driver, without a leading slash",
            )
            return
        prefix = self._settings.tf_prefix
        self._send_transforms(
            [transform_from_pose(pose, name, header, prefix) for pose, name in zip(poses, names, strict=True)]
        )

    def _make_transform_sender(self) -> Callable[[list[Any]], None]:
        if TransformBroadcaster is not None:
            return TransformBroadcaster(self).sendTransform
        publisher = self.create_publisher(TFMessage, "/tf", QoSProfile(depth=100))
        return lambda transforms: publisher.publish(TFMessage(transforms=transforms))


def _resolve_device(name: str) -> str:
    """``auto`` and names of devices to a device that is there.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"parameter device is '{name}', which can't be used here ({reason}): try cpu"
        ) from error
    return name
