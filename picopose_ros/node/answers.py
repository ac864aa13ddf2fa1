"""What the node answers: detections, TF, markers and the overlay, with names that last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import Header, String
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import MarkerArray

from picopose_ros.errors import MeshError, RenderError
from picopose_ros.estimation.views import Views
from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.motion import CameraMotion
from picopose_ros.instances import InstanceNamer, NamedPose
from picopose_ros.instances.overlay import OverlayPainter
from picopose_ros.messages.answers import image_frame_problem, transforms
from picopose_ros.messages.build import pose_in_frame, symmetries_text
from picopose_ros.messages.frames import Frame
from picopose_ros.messages.reasons import DropReason
from picopose_ros.node.conversions import detections_message, image_from_rgb, make
from picopose_ros.node.diagnostics import Latencies
from picopose_ros.node.drops import DropLog
from picopose_ros.node.markers import MeshResource, clearing_markers, marker_array, mesh_resources
from picopose_ros.node.objects import ObjectSet
from picopose_ros.node.pairing import Pair
from picopose_ros.node.parameters import NodeParameters
from picopose_ros.node.subscriptions import OutputPublisher, counting_refusals
from picopose_ros.node.transforms import TargetFrame, TransformUnknown
from picopose_ros.templates.meshes import ObjectSpec

try:
    from tf2_ros import TransformBroadcaster
except ImportError:  # a plain machine has tf2_msgs, but no tf2_ros
    TransformBroadcaster = None


class Answers:
    """The publishers of a node, and the names of the instances that they are about.

    :meth:`open`, :meth:`use_objects`, then :meth:`publish` and :meth:`show` for each image, then
    :meth:`close`. These are for the worker's thread, or for while it has nothing to do; the rest is for any.

    Args:
        node: owner of the publishers; a lifecycle node.
        drops: what can't be published is recorded there.
        latencies: how long the overlay takes is recorded there.
        watch: told of the poses of every answer, its header, and T_target_cam (4, 4) where that is known.

    Attributes:
        frames, poses: published since the node was started.
    """

    def __init__(
        self,
        node: Node,
        drops: DropLog,
        latencies: Latencies,
        watch: Callable[[Sequence[NamedPose], Header, np.ndarray | None], None],
    ) -> None:
        self._node = node
        self._watch = watch
        self._drops = drops
        self._latencies = latencies
        self._broadcaster = TransformBroadcaster(node) if TransformBroadcaster is not None else None
        self._outputs: dict[str, OutputPublisher] = {}
        self._target: TargetFrame | None = None
        self._image_topic = ""
        self._specs: Mapping[str, ObjectSpec] = {}
        self._painter: OverlayPainter | None = None
        self._mesh_resources: dict[str, MeshResource] = {}
        self._epoch = 0
        self._motion = CameraMotion()
        self._views: Views | None = None
        # Shared by the worker and the executor's threads.
        self._lock = threading.Lock()
        self._namer: InstanceNamer | None = None
        self._last_answer: tuple[float, float, Header] | None = None
        self.frames = 0
        self.poses = 0

    def open(self, p: NodeParameters, image_topic: str) -> None:
        """Make the publishers; they work once the node is active.

        Args:
            p: the node's parameters. image_topic: of the images that are answered, for the messages.

        Raises:
            ConfigError: a QoS override that can't be used.
        """
        self._image_topic = image_topic
        self._epoch = 0
        self._views = Views(p.fuse_views) if p.fuse_views > 1 else None
        with self._lock:
            self._namer = InstanceNamer(
                timeout=p.instance_timeout, max_distance=p.instance_distance, smoothing=p.smoothing
            )
        kinds: list[tuple[str, type, str, int]] = [
            ("detections", Detection3DArray, "detections", 10),
            ("markers", MarkerArray, "markers", 10),
            ("overlay", Image, "overlay", 1),
        ]
        # Whoever comes later gets the last one, as with robot_description.
        self._outputs["symmetries"] = OutputPublisher(
            self._node, self._drops, String, "object_symmetries", 1, managed=False, latched=True
        )
        if self._broadcaster is None:
            kinds.append(("tf", TFMessage, "/tf", 100))
        if p.target_frame:
            kinds.append(("target", Detection3DArray, "detections_in_target_frame", 10))
        for name, kind, topic, depth in kinds:
            self._outputs[name] = OutputPublisher(self._node, self._drops, kind, topic, depth)
        if p.target_frame:
            self._target = TargetFrame(self._node, p.target_frame)

    def close(self) -> None:
        """Leave the topics, let go of everything; the worker has ended."""
        if self._target is not None:
            self._target.close()
        for output in self._outputs.values():
            output.destroy()
        self._outputs = {}
        self._target = self._painter = None
        self._specs, self._mesh_resources = {}, {}
        with self._lock:
            self._namer = self._last_answer = None

    def use_objects(self, objects: ObjectSet) -> None:
        """From now on these are the objects."""
        self._specs = objects.specs
        self._outputs["symmetries"].publish(String(data=symmetries_text(objects.specs)))
        with self._lock:
            self._namer.set_symmetries({name: spec.symmetries for name, spec in objects.specs.items()})
        try:
            self._mesh_resources = mesh_resources(objects.specs)
        except MeshError as error:
            self._mesh_resources = {}
            self._node.get_logger().warning(f"no meshes among the markers: {error}")
        self.close_painter()

    def use_parameters(self, p: NodeParameters) -> None:
        """Take over what can be set at any time; for any thread."""
        with self._lock:
            if self._namer is not None:
                self._namer.settings = p.smoothing
                self._namer.timeout = p.instance_timeout
                self._namer.max_distance = p.instance_distance

    @property
    def names(self) -> list[str] | None:
        """Of the instances that are there or may come back; None before :meth:`open`."""
        with self._lock:
            return None if self._namer is None else self._namer.names

    def problems(self) -> list[str]:
        """Who listens in vain."""
        return [problem for one in list(self._outputs.values()) for problem in one.problems()]

    def forget(self) -> None:
        """Forget all instances and delete all markers."""
        with self._lock:
            self._namer.clear()
            self._namer.retired()
            self._last_answer = None
            self._motion.clear()
            if self._views is not None:
                self._views.clear()
        self.clear_markers()

    def clear_markers(self) -> None:
        """Delete all markers, also those of a node that was killed before this one started."""
        header = Header(stamp=self._node.get_clock().now().to_msg())
        self._outputs["markers"].publish(clearing_markers(header))

    def publish(
        self,
        poses: list[ObjectPose],
        pair: Pair,
        p: NodeParameters,
        tracked_ids: Sequence[str] | None = None,
        spent: float = 0.0,
    ) -> tuple[list[NamedPose], list[str]]:
        """Publish the poses of an image; returns them with their names, and names that are no more.

        Args:
            poses: of the image. pair: the image. p: the node's parameters.
            tracked_ids: per pose what its detector calls the instance, see `InstanceNamer.update`.
            spent: seconds that the estimate took.
        """
        header: Header = pair.image.header
        T_target_cam = None
        if self._target is not None and image_frame_problem(header.frame_id, self._image_topic) is None:
            try:
                T_target_cam = self._target.lookup(header, spent)
            except TransformUnknown as error:
                self._drops.record(DropReason.NO_TRANSFORM, str(error))
        stamp = pair.stamp * 1e-9
        with self._lock:
            if pair.epoch != self._epoch:
                self._namer.clear()
                self._motion.clear()
                self._epoch = pair.epoch
                if self._views is not None:
                    self._views.clear()
            if T_target_cam is not None:
                self._motion.know(stamp, T_target_cam)
                if self._views is not None:
                    fused = self._views.fuse(poses, T_target_cam)
                    poses = fused.poses
                    for position, why in fused.remarks:
                        said = f"'{poses[position].class_id}': {why}"
                        self._drops.record(DropReason.VIEWS_FORGOTTEN, said)
            # An image whose transform is late is named as if the camera had moved on as before.
            named = self._namer.update(stamp, poses, self._motion.at(stamp), tracked_ids)
            retired = self._namer.retired()
            self._last_answer = stamp, time.monotonic(), header
        names, poses = [one.name for one in named], [one.pose for one in named]
        self._outputs["detections"].publish(detections_message(poses, names, header))
        if T_target_cam is not None:
            there = [pose_in_frame(pose, T_target_cam) for pose in poses]
            target_header = Header(stamp=header.stamp, frame_id=self._target.name)
            self._outputs["target"].publish(detections_message(there, names, target_header))
        if p.publish_tf:
            self._send_transforms(named, header, p.tf_prefix)
        elif p.target_frame and poses:
            problem = image_frame_problem(header.frame_id, self._image_topic)
            self._drops.report(*([problem] if problem else []))
        self.frames += 1
        self.poses += len(poses)
        self._watch(named, header, T_target_cam)
        return named, retired

    def camera_at(self, pair: Pair) -> np.ndarray | None:
        """T_target_cam (4, 4) of an image by TF, without waiting for it; None: not known."""
        return None if self._target is None else self._target.known(pair.image.header)

    def nearest(self, class_id: str, T_cam_obj: np.ndarray, R_cam_obj: np.ndarray) -> np.ndarray:
        """The symmetric form (4, 4) of a pose that is nearest to a rotation."""
        with self._lock:
            return self._namer.nearest(class_id, T_cam_obj, R_cam_obj)

    def show(self, named: list[NamedPose], retired: list[str], frame: Frame, header: Header) -> None:
        """Publish what is for the eye only: markers, and the overlay where somebody looks."""
        if named or retired:
            self._outputs["markers"].publish(marker_array(named, retired, header, self._mesh_resources))
        if self._outputs["overlay"].wanted:
            started = time.monotonic()
            if self._painter is None:
                self._painter = OverlayPainter(self._specs)
            try:
                picture = self._painter.paint(frame.rgb, frame.camera, named)
            except RenderError as error:
                self._drops.record(DropReason.NO_OVERLAY, f"the overlay can't be drawn: {error}")
                return
            self._outputs["overlay"].publish(image_from_rgb(picture, header))
            self._latencies.record({"overlay": 1e3 * (time.monotonic() - started)})

    def close_painter(self) -> None:
        """Let go of the overlay's renderer; on the thread that painted."""
        if self._painter is not None:
            self._painter.close()
            self._painter = None

    def retire_instances(self) -> None:
        """Retire instances also when no segmentations come; on the executor, while the worker is idle."""
        markers = self._outputs.get("markers")
        if markers is None:
            return
        with self._lock:
            if self._namer is None or self._last_answer is None:
                return
            stamp, when, header = self._last_answer
            self._namer.expire(stamp + time.monotonic() - when)
            retired = self._namer.retired()
        if retired:
            markers.publish(marker_array([], retired, header, self._mesh_resources))

    def _send_transforms(self, named: list[NamedPose], header: Header, prefix: str) -> None:
        made, problems = transforms(make, named, header, self._image_topic, self._specs, prefix)
        self._drops.report(*problems)
        if not made:
            return
        if self._broadcaster is not None:
            with counting_refusals(self._drops, "/tf"):
                self._broadcaster.sendTransform(made)
        else:
            self._outputs["tf"].publish(TFMessage(transforms=made))
