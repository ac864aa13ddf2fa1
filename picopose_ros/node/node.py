"""``picopose_node``: images and masks in, detections and TF out."""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from std_srvs.srv import Trigger
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection2DArray, Detection3DArray
from visualization_msgs.msg import MarkerArray

from picopose_ros.errors import ConfigError, MeshError, PicoPoseError, RenderError
from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.cameras import is_rectified_topic
from picopose_ros.msg import SegmentArray
from picopose_ros.node.conversions import (
    detections_message,
    image_from_rgb,
    pose_in_frame,
    stamp_to_nanoseconds,
    transform_from_pose,
)
from picopose_ros.node.diagnostics import Latencies, NodeStatus, Rates, diagnostics_message, memory_use
from picopose_ros.node.drops import DropLog, DropReason
from picopose_ros.node.engine import Engine
from picopose_ros.node.frames import Frame, FrameRefused, ReadSegments, read_frame, segment_reader
from picopose_ros.node.logs import RosLogHandler
from picopose_ros.node.markers import MeshResource, clearing_markers, marker_array, mesh_resources
from picopose_ros.node.objects import ObjectSet
from picopose_ros.node.pairing import HalfJoin, Pair, PairingCounts, StampPairing, format_stamp
from picopose_ros.node.parameters import (
    NodeParameters,
    declare_parameters,
    judge_parameters,
    read_parameters,
)
from picopose_ros.node.services import estimate_poses, reload_objects
from picopose_ros.node.subscriptions import InputSubscription, OutputPublisher, reliability_is_given
from picopose_ros.node.transforms import TargetFrame, TransformUnknown, require_tf2_ros
from picopose_ros.node.worker import NewestWorker
from picopose_ros.overlay import OverlayPainter
from picopose_ros.srv import EstimatePoses
from picopose_ros.tracking import InstanceTracker, TrackedPose

try:
    from tf2_ros import TransformBroadcaster
except ImportError:  # a plain machine has tf2_msgs, but no tf2_ros
    TransformBroadcaster = None

IMAGE_DEPTH = 10
SEGMENTATION_DEPTH = 50
HOUSEKEEPING_PERIOD = 0.1
"""Seconds between looks at what waits too long."""

DRAIN_SECONDS = 60.0
"""How long a frame may be at work when the node is deactivated."""

STOP_SECONDS = 10.0
"""How long the worker may take to finish what it has in hand."""


class LoadingInterrupted(Exception):
    """The node was asked to stop while it was loading."""


class PicoPoseNode(LifecycleNodeMixin, Node):
    """Subscribes image, camera_info and segmentation; publishes detections, TF and diagnostics.

    A managed node: *configure* loads network and objects, *activate* subscribes and publishes, *deactivate*
    ends that and lets the worker finish, *cleanup* frees the memory. Loading and inference happen on a worker
    thread, and transitions and services on threads of their own, so it wants a multi-threaded executor.
    Whoever sees the input subscriptions on the graph knows that the node is active.

    Raises:
        ConfigError: a parameter that can't be used.
    """

    def __init__(self, **kwargs: Any) -> None:
        Node.__init__(self, "picopose_node", **kwargs)
        self._log_handler = RosLogHandler(self.get_logger())
        logging.getLogger("picopose_ros").addHandler(self._log_handler)
        declare_parameters(self)
        self._settings = read_parameters(self)
        # A transition may last; meanwhile its progress is asked for.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.add_on_set_parameters_callback(lambda some: judge_parameters(some, self.state))
        self.add_post_set_parameters_callback(self._on_parameters_set)

        self._failure = ""
        self._progress = ""
        self._loaded = ""
        self._stopping = threading.Event()
        self._finished = True
        self._serving: set[str] = set()
        self._drops = DropLog(self.get_logger().warning)
        self._drops_reported = 0
        self._problems: set[str] = set()
        self._problems_told: set[str] = set()
        self._latencies = Latencies()
        self._rates = Rates()
        self._counts = PairingCounts()
        self._frames_answered = 0
        self._poses_published = 0
        self._topics: dict[str, str] = {}
        self._reliability_given: dict[str, bool] = {}

        # What there is once the node is configured.
        self._engine: Engine | None = None
        self._worker: NewestWorker[Pair] | None = None
        self._outputs: dict[str, OutputPublisher] = {}
        self._target: TargetFrame | None = None
        self._read_segments: ReadSegments | None = None
        self._rectified = False
        # On the worker's thread, or while it has nothing to do.
        self._painter: OverlayPainter | None = None
        self._mesh_resources: dict[str, MeshResource] = {}
        self._epoch = 0
        # What the executor's threads share with the transitions.
        self._stream = threading.RLock()
        self._inputs: list[InputSubscription] = []
        self._pairing: StampPairing | None = None
        self._halves: HalfJoin | None = None
        # What the worker shares with the housekeeping.
        self._tracking = threading.Lock()
        self._tracker: InstanceTracker | None = None
        self._last_answer: tuple[float, float, Header] | None = None

        self._broadcaster = TransformBroadcaster(self) if TransformBroadcaster is not None else None
        self._diagnostics = OutputPublisher(self, DiagnosticArray, "/diagnostics", 10, managed=False)
        # Not the node's clock: with simulated time a paused bag would stop the housekeeping too.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(HOUSEKEEPING_PERIOD, self._guard(self._housekeeping), clock=steady)
        self.create_timer(1.0, self._guard(self._publish_diagnostics), clock=steady)
        for name, kind, callback in (
            ("~/estimate_poses", EstimatePoses, self._estimate_poses),
            ("~/reload_objects", Trigger, self._reload_objects),
        ):
            # Each on a thread of its own, because it waits for the worker.
            self.create_service(kind, name, callback, callback_group=MutuallyExclusiveCallbackGroup())
        self._autostart = None
        if self._settings.autostart:
            self._autostart = self.create_timer(
                0.01, self._guard(self._start), MutuallyExclusiveCallbackGroup(), clock=steady
            )

    @property
    def failure(self) -> str:
        """Why the last transition failed; empty if it did not."""
        return self._failure

    @property
    def state(self) -> str:
        """Label of the life cycle's state."""
        return self._state_machine.current_state[1]

    def close(self, timeout: float) -> bool:
        """End from whatever state; False if something is still at work after ``timeout`` seconds.

        To be called when the executor spins no more. A transition on one of its threads is interrupted.
        """
        deadline = time.monotonic() + timeout
        self._stopping.set()
        while self.state not in ("unconfigured", "inactive", "active", "finalized"):
            worker = self._worker
            if worker is not None:
                worker.interrupt()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        if self.state != "finalized":
            self.trigger_shutdown()
        while self._serving and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._finished and not self._serving

    def destroy_node(self) -> None:
        """Destroy the node."""
        logging.getLogger("picopose_ros").removeHandler(self._log_handler)
        super().destroy_node()

    # The life cycle. On any thread; the state machine lets only one transition happen at a time.

    def _start(self) -> None:
        self._autostart.cancel()
        if self._stopping.is_set() or self.state != "unconfigured":
            return
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS and not self._stopping.is_set():
            self.trigger_activate()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load network and objects, make the publishers."""
        return self._transition("configure", state, self._configure, self._release)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to listen and to publish."""
        return self._transition("activate", state, self._activate, self._undo_activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listen and publish no more; what is at work is finished and published before."""
        return self._transition("deactivate", state, self._deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of network, objects and publishers."""
        return self._transition("cleanup", state, self._cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything, for good."""
        return self._transition("shutdown", state, self._shutdown)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a transition that went wrong halfway: let go of everything, be unconfigured."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def _transition(
        self,
        name: str,
        state: LifecycleState,
        action: Callable[[LifecycleState], None],
        undo: Callable[[], None] | None = None,
    ) -> TransitionCallbackReturn:
        """Do what a transition is for; a failure is told, and leaves the node in the state it was in."""
        try:
            action(state)
        except LoadingInterrupted:
            self.get_logger().info("stopped while it was loading")
        except Exception as error:  # noqa: BLE001 (rclpy would swallow it)
            expected = isinstance(error, PicoPoseError)
            reason = str(error) if expected else "".join(traceback.format_exception(error))
            self._failure = f"{name} failed: {reason}"
            stays = state.label if undo is not None else "unconfigured"
            self.get_logger().error(
                f"{self._failure}\npicopose_node stays {stays}; once that is mended: "
                f"ros2 lifecycle set {self.get_fully_qualified_name()} {name if undo else 'configure'}"
            )
        else:
            self._failure = ""
            return TransitionCallbackReturn.SUCCESS
        if undo is None:
            return TransitionCallbackReturn.ERROR
        undo()
        return TransitionCallbackReturn.FAILURE

    def _configure(self, state: LifecycleState) -> None:
        started = time.monotonic()
        p = self._settings = read_parameters(self)
        p.check()
        require_tf2_ros(p.target_frame)
        self._topics = self._resolve_topics(p)
        self._rectified = p.image_rectified == "yes" or (
            p.image_rectified == "auto" and is_rectified_topic(self._topics["image"])
        )
        self._read_segments = segment_reader(p.segmentation_input, p.mask_class, self._topics)
        self.get_logger().info(f"configuration:\n{p.text()}")
        engine = self._engine = Engine(p)
        self.get_logger().info(f"loading {p.preset} on {engine.device} and the objects in {p.mesh_dir}")
        worker = self._worker = NewestWorker(
            lambda: engine.load(self._on_progress),
            self._process,
            self._on_crash,
            order=lambda pair: pair.order,
            teardown=self._close_painter,
        )
        if self._stopping.is_set():
            raise LoadingInterrupted
        worker.start()
        worker.settled.wait()
        if worker.failure is not None:
            raise worker.failure
        self._progress = ""
        with self._tracking:
            self._tracker = InstanceTracker(
                timeout=p.instance_timeout, max_distance=p.instance_distance, smoothing=p.smoothing
            )
        self._use_objects(engine.objects)
        self._outputs = {
            name: OutputPublisher(self, kind, name, depth)
            for name, kind, depth in (
                ("detections", Detection3DArray, 10),
                ("markers", MarkerArray, 10),
                ("overlay", Image, 1),
            )
        }
        if self._broadcaster is None:
            self._outputs["tf"] = OutputPublisher(self, TFMessage, "/tf", 100)
        if p.target_frame:
            self._target = TargetFrame(self, p.target_frame)
            self._outputs["target"] = OutputPublisher(
                self, Detection3DArray, "detections_in_target_frame", 10
            )
        with self._stream:
            self._pairing = StampPairing(
                p.buffer_seconds,
                p.buffer_images,
                self._drops.record,
                on_jump=self._on_jump,
                counts=self._counts,
            )
            self._epoch = 0
            if p.segmentation_input == "detections":
                self._halves = HalfJoin(
                    (self._topics["segmentation"], self._topics["labels"]), self._drops.record
                )
        objects = sorted(engine.objects.banks)
        self._loaded = (
            f"{len(objects)} object{'s' if len(objects) != 1 else ''} ({', '.join(objects)}), {p.preset} on "
            f"{engine.device}, {p.viewpoints} viewpoints, hypotheses per segment: {p.hypotheses}, loaded in "
            f"{time.monotonic() - started:.1f} s"
        )
        self.get_logger().info(f"picopose_node configured: {self._loaded}")

    def _activate(self, state: LifecycleState) -> None:
        if self._stopping.is_set():
            raise LoadingInterrupted
        LifecycleNodeMixin.on_activate(self, state)
        self._outputs["markers"].publish(clearing_markers(Header(stamp=self.get_clock().now().to_msg())))
        p = self._settings
        image_type = CompressedImage if p.image_transport == "compressed" else Image
        kinds: list[tuple[str, type, Callable[[Any, Any], None], int, str]] = [
            ("image", image_type, self._on_image, IMAGE_DEPTH, p.image_reliability),
            ("camera_info", CameraInfo, self._on_camera_info, IMAGE_DEPTH, p.image_reliability),
        ]
        if p.segmentation_input == "detections":
            kinds += [
                ("labels", Image, functools.partial(self._on_half, 1), SEGMENTATION_DEPTH, "auto"),
                (
                    "segmentation",
                    Detection2DArray,
                    functools.partial(self._on_half, 0),
                    SEGMENTATION_DEPTH,
                    "auto",
                ),
            ]
        else:
            kind = Image if p.segmentation_input == "mask" else SegmentArray
            kinds.append(("segmentation", kind, self._on_segmentation, SEGMENTATION_DEPTH, "auto"))
        for name, message_type, callback, depth, reliability in kinds:
            topic = self._topics[name]
            if topic not in self._reliability_given:
                self._reliability_given[topic] = reliability_is_given(self, topic)
            subscription = InputSubscription(
                self,
                message_type,
                topic,
                self._guard(callback),
                depth,
                reliability,
                self._reliability_given[topic],
            )
            with self._stream:
                self._inputs.append(subscription)
        self.get_logger().info(
            f"picopose_node ready: {self._loaded}; listening to "
            f"{', '.join(one.topic for one in self._inputs)}"
        )

    def _undo_activate(self) -> None:
        self._stop_listening()
        LifecycleNodeMixin.on_deactivate(self, LifecycleState("inactive", State.PRIMARY_STATE_INACTIVE))

    def _deactivate(self, state: LifecycleState) -> None:
        self._stop_listening()
        dropped, idle = self._worker.drain(DRAIN_SECONDS)
        if dropped is not None:
            self._drops.record(
                DropReason.CLEARED,
                f"segmentation {format_stamp(dropped.stamp)} waited for the estimator when the node was "
                "deactivated",
            )
        if not idle:
            raise RuntimeError(f"a frame is still at work after {DRAIN_SECONDS:g} s")
        with self._tracking:
            self._tracker.clear()
            self._tracker.retired()
            self._last_answer = None
        self._outputs["markers"].publish(clearing_markers(Header(stamp=self.get_clock().now().to_msg())))
        LifecycleNodeMixin.on_deactivate(self, state)
        self.get_logger().info("picopose_node deactivated: it listens and publishes no more")

    def _cleanup(self, state: LifecycleState) -> None:
        LifecycleNodeMixin.on_cleanup(self, state)
        self._release()
        self.get_logger().info("picopose_node cleaned up: network and objects are gone from memory")

    def _shutdown(self, state: LifecycleState) -> None:
        if self._autostart is not None:
            self._autostart.cancel()
        LifecycleNodeMixin.on_shutdown(self, state)
        self._release()

    def _stop_listening(self) -> None:
        with self._stream:
            for subscription in self._inputs:
                subscription.destroy()
            self._inputs.clear()
            if self._halves is not None:
                self._halves.clear()
            if self._pairing is not None:
                self._pairing.clear("the node was deactivated")

    def _release(self) -> None:
        """Let go of all that there is once the node is configured; from whatever state."""
        self._stop_listening()
        worker, engine = self._worker, self._engine
        self._finished = worker is None or worker.close(STOP_SECONDS)
        if not self._finished:
            self.get_logger().error(f"the worker is still busy after {STOP_SECONDS:g} s; it is left behind")
        if engine is not None and self._finished:
            engine.close()
        if self._target is not None:
            self._target.close()
        for output in self._outputs.values():
            output.destroy()
        self._outputs = {}
        self._worker = self._engine = self._target = self._painter = None
        self._mesh_resources = {}
        self._progress = ""
        with self._stream:
            self._pairing = self._halves = None
        with self._tracking:
            self._tracker = self._last_answer = None

    def _resolve_topics(self, p: NodeParameters) -> dict[str, str]:
        """Full names of the inputs.

        Raises:
            ConfigError: two of them are the same.
        """
        names = ["image", "camera_info", "segmentation"]
        if p.segmentation_input == "detections":
            names.append("labels")
        topics = {name: self.resolve_topic_name(name) for name in names}
        if p.image_transport == "compressed":
            # As image_transport does it: a remapping of the image's topic holds for all its transports.
            topics["image"] += "/compressed"
        for name, topic in topics.items():
            other = next(one for one in topics if topics[one] == topic)
            if other != name:
                raise ConfigError(f"topics {other} and {name} are both {topic}: remap one of them")
        return topics

    def _on_progress(self, class_id: str, done: int, total: int) -> None:
        """Told by the engine as each object is begun and done."""
        worker = self._worker
        if self._stopping.is_set() or worker is None or worker.closing:
            raise LoadingInterrupted
        if not self._progress.startswith(f"{class_id} "):
            self.get_logger().info(f"loading object {class_id} ({done + 1} of {total})")
        self._progress = f"{class_id} {done}/{total}"

    def _on_parameters_set(self, parameters: list[Parameter[Any]]) -> None:
        p = self._settings = read_parameters(self)
        with self._tracking:
            if self._tracker is not None:
                self._tracker.settings = p.smoothing
                self._tracker.timeout = p.instance_timeout
                self._tracker.max_distance = p.instance_distance

    def _use_objects(self, objects: ObjectSet) -> None:
        """Tell everything that knows the objects; on the worker's thread, or while it has nothing to do."""
        with self._tracking:
            self._tracker.set_symmetries({name: spec.symmetries for name, spec in objects.specs.items()})
        try:
            self._mesh_resources = mesh_resources(objects.specs)
        except MeshError as error:
            self._mesh_resources = {}
            self.get_logger().warning(f"no meshes among the markers: {error}")
        self._close_painter()

    def _close_painter(self) -> None:
        if self._painter is not None:
            self._painter.close()
            self._painter = None

    # On the executor: receive, pair, look after things.

    def _on_image(self, message: Image | CompressedImage, info: Mapping[str, Any]) -> None:
        self._pair(lambda pairing, stamp, now: pairing.add_image(stamp, message, now), message)

    def _on_camera_info(self, message: CameraInfo, info: Mapping[str, Any]) -> None:
        self._pair(lambda pairing, stamp, now: pairing.add_camera_info(stamp, message, now), message)

    def _on_segmentation(self, message: SegmentArray | Image, info: Mapping[str, Any]) -> None:
        self._note_receipt(info)
        self._pair(lambda pairing, stamp, now: pairing.add_segmentation(stamp, message, now), message)

    def _on_half(self, half: int, message: Detection2DArray | Image, info: Mapping[str, Any]) -> None:
        self._note_receipt(info)

        def add(pairing: StampPairing, stamp: int, now: float) -> list[Pair]:
            both = self._halves.add(half, stamp, message, now)
            return [] if both is None else pairing.add_segmentation(stamp, both, now)

        self._pair(add, message)

    def _note_receipt(self, info: Mapping[str, Any]) -> None:
        """How long a segmentation lay between the middleware and this node."""
        received = info["received_timestamp"]
        if received:  # not every middleware tells; the clock may have been set meanwhile
            self._latencies.record({"receive": max(time.time_ns() - received, 0) / 1e6})

    def _pair(self, add: Callable[[StampPairing, int, float], list[Pair]], message: Any) -> None:
        with self._stream:
            # A message may have been taken before its subscription was destroyed.
            if self._inputs:
                self._submit(add(self._pairing, stamp_to_nanoseconds(message.header.stamp), time.monotonic()))

    def _submit(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            # The one that loses its place is the older of two: pairs don't always come in order.
            replaced = self._worker.submit(pair)
            if replaced is not None:
                self._drops.record(
                    DropReason.BUSY,
                    f"segmentation {format_stamp(replaced.stamp)} was overtaken by a newer one before the "
                    "estimator was free: segmentations come faster than poses can be computed",
                )

    def _on_jump(self, message: str) -> None:
        self.get_logger().warning(message)

    def _housekeeping(self) -> None:
        with self._stream:
            if not self._inputs:
                return
            for subscription in self._inputs:
                subscription.adapt()
            now = time.monotonic()
            if self._halves is not None:
                self._halves.expire(now)
            self._submit(self._pairing.expire(now))
        self._retire_instances()

    def _retire_instances(self) -> None:
        """Retire instances also when no more segmentations come."""
        worker, markers = self._worker, self._outputs.get("markers")
        if worker is None or markers is None or not worker.idle:
            return
        with self._tracking:
            if self._tracker is None or self._last_answer is None:
                return
            stamp, when, header = self._last_answer
            self._tracker.expire(stamp + time.monotonic() - when)
            retired = self._tracker.retired()
        if retired:
            markers.publish(marker_array([], retired, header, self._mesh_resources))

    def _publish_diagnostics(self) -> None:
        dropped = self._drops.total()
        engine, p = self._engine, self._settings
        details = {"preset": p.preset, "viewpoints": str(p.viewpoints)}
        if engine is not None:
            details["objects"] = ", ".join(sorted(engine.objects.banks))
            if engine.objects.failed:
                details["objects_failed"] = "; ".join(engine.objects.failed.values())
        if self._progress:
            details["loading"] = self._progress
        device = engine.device if engine is not None else "none"
        details |= memory_use(device)
        with self._stream:
            ends = (*self._inputs, *self._outputs.values(), self._diagnostics)
            problems = list(dict.fromkeys(problem for one in ends for problem in one.problems()))
            details |= {f"publishers_{one.topic}": str(one.publishers) for one in self._inputs}
            counts = {
                "images_received": self._counts.images,
                "camera_infos_received": self._counts.camera_infos,
                "segmentations_received": self._counts.segmentations,
                "pairs_made": self._counts.pairs,
                "images_buffered": 0 if self._pairing is None else len(self._pairing),
                "time_jumps": self._counts.jumps,
                "segmentations_answered": self._frames_answered,
                "poses_published": self._poses_published,
            }
        with self._tracking:
            if self._tracker is not None:
                details["instances"] = ", ".join(self._tracker.names)
        rated = ("images_received", "segmentations_received", "segmentations_answered", "poses_published")
        status = NodeStatus(
            name=self.get_fully_qualified_name(),
            state=self.state,
            hardware=device,
            counts=counts,
            rates=self._rates.update(time.monotonic(), {name: counts[name] for name in rated}),
            drops=self._drops.snapshot(),
            new_drops=dropped - self._drops_reported,
            latencies=self._latencies.summary(),
            details=details,
            failure=self._failure,
            problems=problems,
        )
        # What is there for a moment only, as while a publisher comes up, is not worth a line.
        lasting = set(problems) & self._problems
        for problem in sorted(lasting - self._problems_told):
            self.get_logger().warning(problem)
        self._problems, self._problems_told = set(problems), lasting
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

    # Services, each on a thread of its own.

    def _estimate_poses(
        self, request: EstimatePoses.Request, response: EstimatePoses.Response
    ) -> EstimatePoses.Response:
        engine, worker = self._engine, self._worker
        if engine is None or worker is None or not worker.ready.is_set():
            response.status = self._nothing_loaded()
            return response
        self._serving.add("estimate_poses")
        try:
            return estimate_poses(request, response, engine, worker, self._settings, self._rectified)
        except Exception as error:  # noqa: BLE001 (whoever asks must get an answer)
            self._on_crash(error)
            response.success, response.status = False, f"unexpected error: {error}"
            return response
        finally:
            self._serving.discard("estimate_poses")

    def _reload_objects(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        engine, worker = self._engine, self._worker
        if engine is None or worker is None or not worker.ready.is_set():
            response.message = self._nothing_loaded()
            return response
        self._serving.add("reload_objects")
        try:
            reload_objects(response, engine, worker, self._on_progress, self._use_objects)
        except LoadingInterrupted:
            response.message = "nothing changed: the node was cleaned up or shut down meanwhile"
        except Exception as error:  # noqa: BLE001 (whoever asks must get an answer)
            self._on_crash(error)
            response.success, response.message = False, f"unexpected error: {error}"
        finally:
            self._serving.discard("reload_objects")
        self._progress = ""
        # One call per severity: a rclpy logger refuses another severity from the same line.
        if response.success:
            self.get_logger().info(f"reload_objects: {response.message}")
        else:
            self.get_logger().error(f"reload_objects: {response.message}")
        return response

    def _nothing_loaded(self) -> str:
        name = self.get_fully_qualified_name()
        return f"{name} is {self.state}, so nothing is loaded: ros2 lifecycle set {name} configure"

    # Inference, on the worker's thread.

    def _process(self, pair: Pair) -> None:
        started = time.monotonic()
        p, engine = self._settings, self._engine
        try:
            frame = read_frame(
                pair.image,
                pair.camera_info,
                pair.segmentation,
                self._read_segments,
                self._topics,
                self._rectified,
            )
        except FrameRefused as refused:
            self._drops.record(refused.reason, str(refused))
            return
        for problem in frame.bad:
            self._drops.record(problem.reason, problem.message)
        before = time.monotonic()
        result = engine.estimate(frame.rgb, frame.camera, frame.segments, p.hypotheses, p.prune)
        judged = engine.judge(result, frame.segments, p.min_score)
        after = time.monotonic()
        for reason, message in judged.dropped:
            self._drops.record(reason, message)
        tracked, retired = self._publish(judged.poses, pair, p)
        done = time.monotonic()
        self._latencies.record(
            {
                "queue": 1e3 * (started - pair.received),
                "decode": 1e3 * (before - started),
                "estimate": 1e3 * (after - before),
                "publish": 1e3 * (done - after),
                "total": 1e3 * (done - pair.received),
                **{stage: ms for stage, ms in result.timings.items() if stage != "total"},
            }
        )
        self._show(tracked, retired, frame, pair.image.header)

    def _publish(
        self, poses: list[ObjectPose], pair: Pair, p: NodeParameters
    ) -> tuple[list[TrackedPose], list[str]]:
        """Publish the poses of an image; returns them with their names, and names that are no more."""
        header: Header = pair.image.header
        T_target_cam = None
        in_tf = self._fit_for_tf(header, poses, p)
        if self._target is not None and in_tf:
            try:
                T_target_cam = self._target.lookup(header)
            except TransformUnknown as error:
                self._drops.record(DropReason.NO_TRANSFORM, str(error))
        stamp = pair.stamp * 1e-9
        with self._tracking:
            if pair.epoch != self._epoch:
                self._tracker.clear()
                self._epoch = pair.epoch
            tracked = self._tracker.update(stamp, poses, T_target_cam)
            retired = self._tracker.retired()
            self._last_answer = stamp, time.monotonic(), header
        names, poses = [one.name for one in tracked], [one.pose for one in tracked]
        self._outputs["detections"].publish(detections_message(poses, names, header))
        if T_target_cam is not None:
            there = [pose_in_frame(pose, T_target_cam) for pose in poses]
            target_header = Header(stamp=header.stamp, frame_id=self._target.name)
            self._outputs["target"].publish(detections_message(there, names, target_header))
        if p.publish_tf and poses and in_tf:
            self._send_transforms([self._transform(one, header, p.tf_prefix) for one in tracked])
        self._frames_answered += 1
        self._poses_published += len(poses)
        return tracked, retired

    def _fit_for_tf(self, header: Header, poses: list[ObjectPose], p: NodeParameters) -> bool:
        """Whether an image's frame can be one of TF's; told if it should be and can't."""
        fit = bool(header.frame_id) and not header.frame_id.startswith("/")
        if not fit and poses and (p.publish_tf or p.target_frame):
            self._drops.record(
                DropReason.BAD_FRAME_ID,
                f"images on {self._topics['image']} have frame_id '{header.frame_id}', which can't be a "
                "TF parent: set it in the camera driver, without a leading slash",
            )
        return fit

    def _transform(self, one: TrackedPose, header: Header, prefix: str) -> Any:
        """The TF frame of an instance: named by the object's frame_id, if objects.yaml gives it one."""
        class_id = one.pose.class_id
        spec = self._engine.objects.specs.get(class_id)
        name = (spec.frame_id if spec is not None else None) or class_id
        return transform_from_pose(one.pose, name + one.name.removeprefix(class_id), header, prefix)

    def _send_transforms(self, transforms: list[Any]) -> None:
        if self._broadcaster is not None:
            self._broadcaster.sendTransform(transforms)
        else:
            self._outputs["tf"].publish(TFMessage(transforms=transforms))

    def _show(self, tracked: list[TrackedPose], retired: list[str], frame: Frame, header: Header) -> None:
        """What is for the eye only, where somebody looks."""
        if tracked or retired:
            self._outputs["markers"].publish(marker_array(tracked, retired, header, self._mesh_resources))
        if self._outputs["overlay"].wanted:
            started = time.monotonic()
            if self._painter is None:
                self._painter = OverlayPainter(self._engine.objects.specs)
            try:
                picture = self._painter.paint(frame.rgb, frame.camera, tracked)
            except RenderError as error:
                self._drops.record(DropReason.NO_OVERLAY, f"the overlay can't be drawn: {error}")
                return
            self._outputs["overlay"].publish(image_from_rgb(picture, header))
            self._latencies.record({"overlay": 1e3 * (time.monotonic() - started)})
