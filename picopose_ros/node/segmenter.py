"""``segmenter_node``: images in, the masks of the objects in a mesh folder out."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image
from vision_msgs.msg import Detection2DArray

from picopose_ros.errors import ConfigError, ImageError, PicoPoseError
from picopose_ros.estimation.settings import resolve_precision
from picopose_ros.estimator import encode_by
from picopose_ros.messages.build import segments_message
from picopose_ros.messages.detections import boxes_without_class
from picopose_ros.messages.images import BitDepth, compressed_to_rgb, depth_to_metres, image_to_rgb
from picopose_ros.messages.reasons import DropReason, no_stamp
from picopose_ros.model import load_model
from picopose_ros.msg import SegmentArray
from picopose_ros.node.conversions import make, stamp_to_nanoseconds
from picopose_ros.node.diagnostics import Latencies, NodeStatus, Rates, diagnostics_message, memory_use
from picopose_ros.node.drops import DropLog
from picopose_ros.node.engine import resolve_device
from picopose_ros.node.lifecycle import LoadingInterrupted, ManagedNode
from picopose_ros.node.memory import Growth
from picopose_ros.node.objects import MeshFolder, ObjectSet
from picopose_ros.node.pairing import format_stamp
from picopose_ros.node.parameters import judge_parameters
from picopose_ros.node.segmenter_parameters import (
    SEGMENTER_SPECS,
    declare_segmenter_parameters,
    read_segmenter_parameters,
)
from picopose_ros.node.subscriptions import InputSubscription, OutputPublisher, reliability_is_given
from picopose_ros.node.worker import NewestWorker
from picopose_ros.segmentation.proposals import Picture, proposal_source
from picopose_ros.segmentation.segmenter import Segmenter

HOUSEKEEPING_PERIOD = 0.05
"""Seconds between looks at whether the next image is due."""

KEPT = 60
"""Images, depth images and boxes that wait for each other at most, of each."""

PATIENCE = 2.0
"""Seconds that boxes wait for their image."""

STOP_SECONDS = 10.0
"""How long the worker may take to finish what it has in hand."""


@dataclass(frozen=True)
class Look:
    """An image that is to be looked at. ``boxes``: of another detector. ``received``: monotonic s."""

    stamp: int
    image: Image | CompressedImage
    boxes: Detection2DArray | None
    received: float


class SegmenterNode(ManagedNode):
    """Subscribes image (and boxes, depth), publishes segmentation: masks with classes of the mesh folder.

    A managed node like ``picopose_node``, whose cache of template banks it shares. It looks at ``rate``
    images per second, always the newest; each answer carries its image's stamp. With the proposals ``boxes``
    it looks at the images that boxes came for.

    Raises:
        ConfigError: a parameter that can't be used.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("segmenter_node", **kwargs)
        declare_segmenter_parameters(self)
        self._settings = read_segmenter_parameters(self)
        self.start_life_cycle(self._settings.autostart)
        self._drops = DropLog(self.get_logger().warning)
        self._latencies = Latencies()
        self._rates = Rates()
        self.add_on_set_parameters_callback(lambda some: judge_parameters(some, self.state, SEGMENTER_SPECS))
        self.add_post_set_parameters_callback(self._on_parameters_set)
        # Made by configure, gone after cleanup.
        self._segmenter: Segmenter | None = None
        self._worker: NewestWorker[Look] | None = None
        self._objects = ObjectSet()
        self._output: OutputPublisher | None = None
        self._topics: dict[str, str] = {}
        # Shared by the executor's threads.
        self._lock = threading.RLock()
        self._inputs: list[InputSubscription] = []
        self._newest: Look | None = None
        self._images: OrderedDict[int, Look] = OrderedDict()
        self._depths: OrderedDict[int, Image] = OrderedDict()
        self._boxes: OrderedDict[int, tuple[Detection2DArray, float]] = OrderedDict()
        self._due = 0.0
        self._bits = BitDepth()
        self._given: dict[str, bool] = {}
        self._counts = {"images_received": 0, "images_segmented": 0, "segments_published": 0}
        self._finished = True
        self._drops_reported = 0
        self._growth = Growth()
        self._progress = ""
        self._diagnostics = OutputPublisher(
            self, self._drops, DiagnosticArray, "/diagnostics", 10, managed=False
        )
        guard = self._drops.guard
        self.create_timer(HOUSEKEEPING_PERIOD, guard(self._housekeeping), clock=self.steady)
        self.create_timer(1.0, guard(self._publish_diagnostics), clock=self.steady)

    # The life cycle.

    def configure(self) -> None:
        """Load network, objects and proposal source, make the publisher."""
        started = time.monotonic()
        p = self._settings = read_segmenter_parameters(self)
        p.check()
        names = ["image", "segmentation"]
        names += ["boxes"] * (p.segmenter_proposals == "boxes") + ["depth"] * p.segmenter_depth
        self._topics = {name: self.resolve_topic_name(name) for name in names}
        if p.image_transport == "compressed":
            self._topics["image"] += "/compressed"
        if len(set(self._topics.values())) < len(self._topics):
            raise ConfigError(f"two of the topics {', '.join(self._topics.values())} are the same: remap one")
        device = resolve_device(p.device)

        def load() -> None:
            propose = proposal_source(p.segmenter_proposals, p.source_options(device))
            model = load_model(p.preset, p.weights, torch.device(device))
            encode_by(model, torch.device(device), p.backend, p.onnx_dir, p.precision)
            folder = MeshFolder(p.mesh_dir, p.unit, p.viewpoints, p.cache_dir, p.shading)
            self._objects = folder.load(model, device, self._on_progress)
            search = p.segmenter_proposals == "builtin"
            dtype = resolve_precision(p.precision, torch.device(device))
            banks = self._objects.banks
            self._segmenter = Segmenter(model, banks, propose, search, p.matching, device, dtype)

        worker = self._worker = NewestWorker(
            load, self._process, self._drops.record_crash, order=lambda look: look.received
        )
        self.stop_if_told()
        worker.start()
        worker.settled.wait()
        if worker.failure is not None:
            raise worker.failure
        self._output = OutputPublisher(self, self._drops, SegmentArray, "segmentation", 10)
        self._progress = ""
        objects = ", ".join(sorted(self._objects.banks))
        self.get_logger().info(
            f"segmenter_node configured: {len(self._objects.banks)} objects ({objects}), {p.preset} on "
            f"{device}, proposals {p.segmenter_proposals}, loaded in {time.monotonic() - started:.1f} s"
        )

    def activate(self) -> None:
        """Begin to listen."""
        p = self._settings
        image_type = CompressedImage if p.image_transport == "compressed" else Image
        self._subscribe("image", image_type, self._on_image, p.image_reliability)
        if "depth" in self._topics:
            self._subscribe("depth", Image, self._on_depth, p.image_reliability)
        if "boxes" in self._topics:
            self._subscribe("boxes", Detection2DArray, self._on_boxes)
        self.get_logger().info(
            f"segmenter_node ready: listening to {', '.join(one.topic for one in self._inputs)}, "
            f"publishing {self._topics['segmentation']}"
        )

    def stop_listening(self) -> None:
        """Listen no more."""
        with self._lock:
            for one in self._inputs:
                one.destroy()
            self._inputs.clear()
            self._newest = None
            for waiting in (self._images, self._depths, self._boxes):
                waiting.clear()

    def deactivate(self) -> None:
        """Listen no more, let the worker finish the image it has in hand."""
        self.stop_listening()
        self._worker.drain(STOP_SECONDS)

    def release(self) -> None:
        """Let go of network, objects and publisher."""
        self.stop_listening()
        self._finished = self._worker is None or self._worker.close(STOP_SECONDS)
        if self._output is not None:
            self._output.destroy()
        self._output = self._worker = None
        if self._finished:
            self._segmenter = None
        self._objects = ObjectSet()

    def interrupt(self) -> None:
        """Have a configuration that is under way end soon."""
        worker = self._worker
        if worker is not None:
            worker.interrupt()

    def at_work(self) -> bool:
        """Whether the worker is still at work."""
        return not self._finished

    def _on_progress(self, class_id: str, done: int, total: int) -> None:
        worker = self._worker
        self.stop_if_told()
        if worker is None or worker.closing:
            raise LoadingInterrupted
        self._progress = f"{class_id} {done}/{total}"

    def _on_parameters_set(self, parameters: list[Parameter[Any]]) -> None:
        self._settings = read_segmenter_parameters(self)

    # On the executor.

    def _subscribe(self, name: str, kind: type, callback: Any, reliability: str = "auto") -> None:
        topic = self._topics[name]
        if topic not in self._given:
            self._given[topic] = reliability_is_given(self, topic)
        one = InputSubscription(
            self, kind, topic, self._drops.guard(callback), 10, reliability, self._given[topic]
        )
        with self._lock:
            self._inputs.append(one)

    def _on_image(self, message: Image | CompressedImage, info: Mapping[str, Any]) -> None:
        stamp = stamp_to_nanoseconds(message.header.stamp)
        if stamp == 0:
            problem = no_stamp("image", self._topics["image"])
            self._drops.record(problem.reason, problem.message)
            return
        look = Look(stamp, message, None, time.monotonic())
        with self._lock:
            self._counts["images_received"] += 1
            if "boxes" in self._topics:
                _keep(self._images, stamp, look)
                self._match_boxes()
            else:
                self._newest = look
        self._submit_if_due()

    def _on_depth(self, message: Image, info: Mapping[str, Any]) -> None:
        with self._lock:
            _keep(self._depths, stamp_to_nanoseconds(message.header.stamp), message)

    def _on_boxes(self, message: Detection2DArray, info: Mapping[str, Any]) -> None:
        with self._lock:
            stamp = stamp_to_nanoseconds(message.header.stamp)
            _keep(self._boxes, stamp, (message, time.monotonic()))
            self._match_boxes()
        self._submit_if_due()

    def _match_boxes(self) -> None:
        """The newest image that boxes came for is the one to look at."""
        for stamp in [stamp for stamp in self._boxes if stamp in self._images]:
            boxes, _ = self._boxes.pop(stamp)
            image = self._images[stamp]
            self._newest = Look(stamp, image.image, boxes, image.received)

    def _submit_if_due(self) -> None:
        with self._lock:
            now, worker, rate = time.monotonic(), self._worker, self._settings.segmenter_rate
            if self._newest is None or worker is None or not worker.idle or now < self._due:
                return
            look, self._newest = self._newest, None
            self._due = now + (1 / rate if rate > 0 else 0.0)
            worker.submit(look)

    def _housekeeping(self) -> None:
        with self._lock:
            for one in self._inputs:
                one.adapt()
            now = time.monotonic()
            late = [stamp for stamp, (_, came) in self._boxes.items() if now - came > PATIENCE]
            for stamp in late:
                del self._boxes[stamp]
        for stamp in late:
            self._drops.record(
                DropReason.NO_IMAGE,
                f"no image on {self._topics['image']} has the stamp {format_stamp(stamp)} of boxes on "
                f"{self._topics['boxes']}: the detector must copy the image's header.stamp",
            )
        self._submit_if_due()

    def _publish_diagnostics(self) -> None:
        dropped = self._drops.total()
        p, segmenter = self._settings, self._segmenter
        device = p.device if segmenter is None else str(segmenter.matcher.device)
        self._growth.look(time.monotonic())
        details = {"proposals": p.segmenter_proposals, "objects": ", ".join(sorted(self._objects.banks))}
        if self._progress:
            details["loading"] = self._progress
        with self._lock:
            problems = [problem for one in self._inputs for problem in one.problems()]
            counts = dict(self._counts)
        status = NodeStatus(
            name=self.get_fully_qualified_name(),
            state=self.state,
            hardware=device,
            counts=counts,
            rates=self._rates.update(time.monotonic(), counts),
            drops=self._drops.snapshot(),
            new_drops=dropped - self._drops_reported,
            latencies=self._latencies.summary(),
            details=details | memory_use(device),
            failure=self.failure,
            problems=problems,
        )
        self._drops_reported = dropped
        message = diagnostics_message(status, self.get_clock().now().to_msg(), "segmentation")
        self._diagnostics.publish(message)

    # On the worker's thread.

    def _process(self, look: Look) -> None:
        started = time.monotonic()
        segmenter, image = self._segmenter, look.image
        try:
            to_rgb = image_to_rgb if isinstance(image, Image) else compressed_to_rgb
            rgb = np.ascontiguousarray(to_rgb(image, self._topics["image"], self._bits))
            depth = self._depth_of(look.stamp, rgb.shape[:2])
        except ImageError as error:
            self._drops.record(DropReason.BAD_IMAGE, str(error))
            return
        boxes: tuple[np.ndarray, ...] = ()
        if look.boxes is not None:
            boxes, bad = boxes_without_class(look.boxes, *rgb.shape[:2], self._topics["boxes"])
            for problem in bad:
                self._drops.record(problem.reason, problem.message)
        segmenter.matcher.settings = self._settings.matching
        try:
            found = segmenter.segment(Picture(rgb, depth, boxes))
        except PicoPoseError as error:
            self._drops.record(DropReason.BAD_PROPOSALS, f"{self._settings.segmenter_proposals}: {error}")
            return
        if found.problem:
            self._drops.record(DropReason.BAD_PROPOSALS, found.problem)
        message = segments_message(make, found.segments, image.header, *rgb.shape[:2])
        self._output.publish(message)
        with self._lock:
            self._counts["images_segmented"] += 1
            self._counts["segments_published"] += len(found.segments)
        done = time.monotonic()
        timings = {"total": 1e3 * (done - started), "age": 1e3 * (done - look.received)}
        self._latencies.record({**found.timings, **timings})

    def _depth_of(self, stamp: int, size: tuple[int, int]) -> np.ndarray | None:
        with self._lock:
            message = self._depths.get(stamp)
        if message is None:
            return None
        depth = depth_to_metres(message, self._topics["depth"])
        if depth.shape != size:
            raise ImageError(
                f"depth on {self._topics['depth']} has {depth.shape[1]}x{depth.shape[0]} pixels, its image "
                f"{size[1]}x{size[0]}: give depth that is registered to the image"
            )
        return depth


def _keep(kept: OrderedDict[int, Any], stamp: int, value: Any) -> None:
    kept.pop(stamp, None)
    kept[stamp] = value
    while len(kept) > KEPT:
        kept.popitem(last=False)
