"""``picopose_node``: images and masks in, detections and TF out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from picopose_ros.geometry.cameras import is_rectified_topic
from picopose_ros.messages.frames import FrameReader, FrameRefused
from picopose_ros.messages.reasons import DropReason, Problem
from picopose_ros.messages.segmentations import segment_reader
from picopose_ros.node.answers import Answers
from picopose_ros.node.diagnostics import Latencies, NodeStatus, Rates, diagnostics_message, memory_use
from picopose_ros.node.drops import DropLog
from picopose_ros.node.engine import Engine
from picopose_ros.node.finding import Finding
from picopose_ros.node.following import Following
from picopose_ros.node.lifecycle import LoadingInterrupted, ManagedNode
from picopose_ros.node.listener import Listener
from picopose_ros.node.logs import RosLogHandler
from picopose_ros.node.memory import Growth, give_back, trim
from picopose_ros.node.objects import ObjectSet
from picopose_ros.node.pairing import Pair, format_stamp
from picopose_ros.node.parameters import (
    as_declared,
    declare_parameters,
    judge_parameters,
    read_parameters,
)
from picopose_ros.node.services import estimate_poses, reload_objects
from picopose_ros.node.subscriptions import OutputPublisher
from picopose_ros.node.transforms import require_tf2_ros
from picopose_ros.node.worker import NewestWorker
from picopose_ros.srv import EstimatePoses, Follow

HOUSEKEEPING_PERIOD = 0.1
"""Seconds between looks at what waits too long."""

DRAIN_SECONDS = 60.0
"""How long a frame may be at work when the node is deactivated."""

STOP_SECONDS = 10.0
"""How long the worker may take to finish what it has in hand."""


class PicoPoseNode(ManagedNode):
    """Subscribes image, camera_info and segmentation; publishes detections, TF and diagnostics.

    A managed node: *configure* loads network and objects, *activate* subscribes and publishes, *deactivate*
    ends that and lets the worker finish, *cleanup* frees the memory. Loading and inference happen on a worker
    thread, and transitions and services on threads of their own, so it wants a multi-threaded executor.
    Whoever sees the input subscriptions on the graph knows that the node is active.

    One image takes this way: ``Listener`` pairs it with its segmentation, ``NewestWorker`` takes the newest
    pair, ``FrameReader`` decodes it, ``Engine`` estimates the poses, ``Answers`` names and publishes them.

    Raises:
        ConfigError: a parameter that can't be used.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("picopose_node", **kwargs)
        self._log_handler = RosLogHandler(self.get_logger())
        package = logging.getLogger("picopose_ros")
        package.addHandler(self._log_handler)
        if not package.isEnabledFor(logging.INFO):  # by default Python keeps what is no warning to itself
            package.setLevel(logging.INFO)
        declare_parameters(self)
        self._settings = read_parameters(self)
        self.start_life_cycle(self._settings.autostart)

        self._drops = DropLog(self.get_logger().warning)
        self._latencies = Latencies()
        self._listener = Listener(self, self._drops, self._latencies, self._submit, self._image_came)
        self._finding = Finding(self, self._class_of, lambda: self.state)
        self._answers = Answers(self, self._drops, self._latencies, self._finding.see)
        self._following = Following(self._answers, self._listener, self._drops, self._latencies)
        self.add_pre_set_parameters_callback(as_declared)
        self.add_on_set_parameters_callback(lambda some: judge_parameters(some, self.state))
        self.add_post_set_parameters_callback(self._on_parameters_set)
        # Made by configure, gone after cleanup.
        self._engine: Engine | None = None
        self._worker: NewestWorker[Pair] | None = None
        self._reader: FrameReader | None = None
        self._growth = Growth()
        # For those who ask while it happens.
        self._progress = ""
        self._loaded = ""
        self._serving: set[str] = set()
        self._finished = True
        # For the diagnostics.
        self._rates = Rates()
        self._drops_reported = 0
        self._problems: set[str] = set()
        self._problems_told: set[str] = set()
        self._diagnostics = OutputPublisher(
            self, self._drops, DiagnosticArray, "/diagnostics", 10, managed=False
        )

        guard = self._drops.guard
        # Not the node's clock: with simulated time a paused bag would stop the housekeeping too.
        self.create_timer(HOUSEKEEPING_PERIOD, guard(self._housekeeping), clock=self.steady)
        self.create_timer(1.0, guard(self._publish_diagnostics), clock=self.steady)
        for name, kind, callback in (
            ("~/estimate_poses", EstimatePoses, self._estimate_poses),
            ("~/reload_objects", Trigger, self._reload_objects),
            ("~/reset", Trigger, self._reset),
            ("~/follow", Follow, self._follow),
        ):
            # Each on a thread of its own, because it waits for the worker.
            self.create_service(kind, name, callback, callback_group=MutuallyExclusiveCallbackGroup())

    def destroy_node(self) -> None:
        """Destroy the node."""
        logging.getLogger("picopose_ros").removeHandler(self._log_handler)
        self._finding.close()
        super().destroy_node()

    # The life cycle.

    def configure(self) -> None:
        """Load network and objects, make the publishers."""
        started = time.monotonic()
        p = self._settings = read_parameters(self)
        p.check()
        require_tf2_ros(p.target_frame)
        self._listener.prepare(p)
        topics = self._listener.topics
        rectified = p.image_rectified == "yes" or (
            p.image_rectified == "auto" and is_rectified_topic(topics["image"])
        )
        read_segments = segment_reader(p.segmentation_input, p.mask_class, topics)
        self._reader = FrameReader(topics, read_segments, rectified)
        self.get_logger().info(f"configuration:\n{p.text()}")
        engine = self._engine = Engine(p)
        self.get_logger().info(f"loading {p.preset} on {engine.device} and the objects in {p.mesh_dir}")
        worker = self._worker = NewestWorker(
            lambda: engine.load(self._on_progress),
            self._process,
            self._drops.record_crash,
            order=lambda pair: pair.order,
            teardown=self._answers.close_painter,
        )
        self.stop_if_told()
        worker.start()
        worker.settled.wait()
        if worker.failure is not None:
            raise worker.failure
        trim()  # onboarding leaves as much behind as banks and network take
        self._progress = ""
        self._answers.open(p, topics["image"])
        self._answers.use_objects(engine.objects)
        self._following.open(engine, self._reader)
        objects = sorted(engine.objects.banks)
        self._loaded = (
            f"{len(objects)} object{'s' if len(objects) != 1 else ''} ({', '.join(objects)}), {p.preset} on "
            f"{engine.device}, {p.viewpoints} viewpoints, hypotheses per segment: {p.hypotheses}, loaded in "
            f"{time.monotonic() - started:.1f} s"
        )
        self.get_logger().info(f"picopose_node configured: {self._loaded}")

    def activate(self) -> None:
        """Begin to listen."""
        self._answers.clear_markers()
        self._listener.start(self._settings)
        self.get_logger().info(
            f"picopose_node ready: {self._loaded}; listening to {', '.join(self._listener.publishers)}"
        )

    def stop_listening(self) -> None:
        """Listen no more."""
        self._listener.stop()

    def deactivate(self) -> None:
        """Listen no more, let the worker finish the frame it has in hand."""
        self._listener.stop()
        dropped, idle = self._worker.drain(DRAIN_SECONDS)
        if dropped is not None:
            self._drops.record(
                DropReason.CLEARED,
                f"segmentation {format_stamp(dropped.stamp)} waited for the estimator when the node was "
                "deactivated",
            )
        self._on_worker(self._following.forget)
        if not idle:
            raise RuntimeError(f"a frame is still at work after {DRAIN_SECONDS:g} s")
        self._answers.forget()

    def release(self) -> None:
        """Let go of network, objects and publishers."""
        self._listener.release()
        worker, engine = self._worker, self._engine
        self._finished = worker is None or worker.close(STOP_SECONDS)
        if not self._finished:
            self.get_logger().error(f"the worker is still busy after {STOP_SECONDS:g} s; it is left behind")
        if engine is not None and self._finished:
            engine.close()
        self._answers.close()
        self._following.close()
        self._worker = self._engine = self._reader = None
        self._progress = ""
        del worker, engine  # the last that hold network and banks
        give_back()

    def interrupt(self) -> None:
        """Have a configuration that is under way end soon."""
        worker = self._worker
        if worker is not None:
            worker.interrupt()

    def at_work(self) -> bool:
        """Whether the worker or a service is still at work."""
        return not self._finished or bool(self._serving) or self._finding.busy

    def _on_progress(self, class_id: str, done: int, total: int) -> None:
        """Told by the engine as each object is begun and done."""
        worker = self._worker
        self.stop_if_told()
        if worker is None or worker.closing:
            raise LoadingInterrupted
        if not self._progress.startswith(f"{class_id} "):
            self.get_logger().info(f"loading object {class_id} ({done + 1} of {total})")
        self._progress = f"{class_id} {done}/{total}"

    def _on_parameters_set(self, parameters: list[Parameter[Any]]) -> None:
        self._settings = read_parameters(self)
        self._answers.use_parameters(self._settings)

    def _on_worker(self, function: Callable[[], None]) -> bool:
        """Have something done between two images and wait for it; False if the worker ends before."""
        try:
            self._worker.call(function).result(DRAIN_SECONDS)
        except (CancelledError, TimeoutError):
            return False
        return True

    # On the executor.

    def _image_came(self) -> None:
        worker = self._worker
        if worker is not None:
            self._following.wanted(self._settings, worker.call)

    def _submit(self, pair: Pair) -> None:
        # The one that loses its place is the older of two: pairs don't always come in order.
        replaced = self._worker.submit(pair)
        if replaced is not None:
            self._drops.record(
                DropReason.BUSY,
                f"segmentation {format_stamp(replaced.stamp)} was overtaken by a newer one before the "
                "estimator was free: segmentations come faster than poses can be computed",
            )

    def _housekeeping(self) -> None:
        self._listener.housekeeping()
        worker = self._worker
        if self._listener.listening and worker is not None and worker.idle:
            self._answers.retire_instances()

    def _publish_diagnostics(self) -> None:
        dropped = self._drops.total()
        engine, p = self._engine, self._settings
        listener, answers = self._listener, self._answers
        device = engine.device if engine is not None else "none"
        details = {"preset": p.preset, "viewpoints": str(p.viewpoints)}
        if engine is not None:
            details["objects"] = ", ".join(sorted(engine.objects.banks))
            if engine.objects.failed:
                details["objects_failed"] = "; ".join(engine.objects.failed.values())
        if (names := answers.names) is not None:
            details["instances"] = ", ".join(names)
        report = [f"{name}: {text}" for name, text in self._following.report.items()]
        details["following"] = "; ".join(report) if p.follow else "off"
        if self._progress:
            details["loading"] = self._progress
        self._growth.look(time.monotonic())
        details |= memory_use(device)
        details |= {f"publishers_{topic}": str(count) for topic, count in listener.publishers.items()}
        problems = list(
            dict.fromkeys([*listener.problems(), *answers.problems(), *self._diagnostics.problems()])
        )
        counts = {
            "images_received": listener.counts.images,
            "camera_infos_received": listener.counts.camera_infos,
            "segmentations_received": listener.counts.segmentations,
            "pairs_made": listener.counts.pairs,
            "images_buffered": listener.buffered,
            "time_jumps": listener.counts.jumps,
            "segmentations_answered": answers.frames,
            "poses_published": answers.poses,
        }
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
            failure=self.failure,
            problems=problems,
        )
        # What is there for a moment only, as while a publisher comes up, is not worth a line.
        lasting = set(problems) & self._problems
        for problem in sorted(lasting - self._problems_told):
            self.get_logger().warning(problem)
        self._problems, self._problems_told = set(problems), lasting
        self._drops_reported = dropped
        self._diagnostics.publish(diagnostics_message(status, self.get_clock().now().to_msg()))

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
            return estimate_poses(request, response, engine, worker, self._settings, self._reader.rectified)
        except Exception as error:  # noqa: BLE001 (whoever asks must get an answer)
            self._drops.record_crash(error)
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
            give_back()
        except LoadingInterrupted:
            response.message = "nothing changed: the node was cleaned up or shut down meanwhile"
        except Exception as error:  # noqa: BLE001 (whoever asks must get an answer)
            self._drops.record_crash(error)
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

    def _reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Forget all instances: names begin anew, nothing is followed until masks of a later image come."""
        names = self._answers.names
        if self._worker is None or names is None:
            response.message = self._nothing_loaded()
            return response

        def forget() -> None:
            self._following.reset()
            self._answers.forget()

        self._serving.add("reset")
        try:
            response.success = self._on_worker(forget)
        finally:
            self._serving.discard("reset")
        if response.success:
            response.message = f"forgot {', '.join(names) or 'nothing: there was no instance'}"
        else:
            response.message = "nothing changed: the node was cleaned up or shut down meanwhile"
        return response

    def _follow(self, request: Follow.Request, response: Follow.Response) -> Follow.Response:
        """Follow an instance, or don't."""
        if self._answers.names is None:
            response.status = self._nothing_loaded()
        elif not self._settings.follow:
            response.status = "nothing is followed: set the parameter follow to true"
        else:
            response.success, response.status = self._following.choose(
                request.id, request.follow, self._answers.names
            )
        return response

    def _class_of(self, name: str) -> str | None:
        engine = self._engine
        return None if engine is None else engine.objects.class_of(name)

    def _use_objects(self, objects: ObjectSet) -> None:
        self._answers.use_objects(objects)

    def _nothing_loaded(self) -> str:
        name = self.get_fully_qualified_name()
        return f"{name} is {self.state}, so nothing is loaded: ros2 lifecycle set {name} configure"

    # On the worker's thread.

    def _process(self, pair: Pair) -> None:
        started = time.monotonic()
        p, engine = self._settings, self._engine
        if not self._following.awaits(pair, p):
            return
        try:
            frame = self._reader.read(pair.image, pair.camera_info, pair.segmentation)
        except FrameRefused as refused:
            self._drops.record(refused.reason, str(refused))
            return
        self._drops.report(*frame.bad)
        before = time.monotonic()
        if p.follow:
            frame = self._following.only_new(frame, pair)
        depth = None
        if self._listener.depths is not None:
            depth = self._listener.depths.find(pair.image, (frame.camera.width, frame.camera.height))
            if isinstance(depth, Problem):
                self._drops.report(depth)
                depth = None
        result = engine.estimate(
            frame.rgb, frame.camera, frame.segments, p.hypotheses, p.prune, p.refinements, depth
        )
        judged = engine.judge(result, frame.segments, p.min_score)
        after = time.monotonic()
        self._drops.report(*judged.dropped)
        if p.follow:
            self._following.take(judged.poses, pair, frame, p, after - before)
        else:
            tracked_ids = [frame.segments[pose.segment].tracked_id for pose in judged.poses]
            answer = self._answers.publish(judged.poses, pair, p, tracked_ids, after - before)
        done = time.monotonic()
        self._latencies.record(
            {
                "pair": 1e3 * (pair.made - pair.received),
                "queue": 1e3 * (started - pair.made),
                "decode": 1e3 * (before - started),
                "estimate": 1e3 * (after - before),
                "publish": 1e3 * (done - after),
                "total": 1e3 * (done - pair.received),
                **{stage: ms for stage, ms in result.timings.items() if stage != "total"},
            }
        )
        if not p.follow:
            self._answers.show(*answer, frame, pair.image.header)
