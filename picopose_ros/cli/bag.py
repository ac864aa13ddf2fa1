"""``picopose bag IN OUT``: a recording in, the same recording with poses out. No ROS needed."""

from __future__ import annotations

import argparse
import bisect
import heapq
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosbags.interfaces import Connection

from picopose_ros.arguments import add_onboarding_arguments, load_estimator, positive
from picopose_ros.errors import BagError, CameraError, ImageError, SegmentError
from picopose_ros.estimator import EstimateResult, PoseEstimator
from picopose_ros.geometry.cameras import CameraModel, is_rectified_topic
from picopose_ros.instances import InstanceTracker, TrackedPose
from picopose_ros.messages import bags
from picopose_ros.messages.images import image_to_rgb
from picopose_ros.progress import progress_bar
from picopose_ros.templates.meshes import Symmetries, discover_objects

_MOST_WARNINGS = 5


@dataclass
class BagReport:
    """What became of the recording's segmentations."""

    frames: int = 0  # segmentations that were answered
    poses: int = 0
    problems: Counter[str] = field(default_factory=Counter)  # why others were not, and how often
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first message of its kind
    milliseconds: dict[str, float] = field(default_factory=dict)  # per stage, sum over the frames

    def add_problem(self, reason: str, message: str) -> None:
        """Count something that went wrong."""
        self.problems[reason] += 1
        self.examples.setdefault(reason, message)


def process_bag(
    estimator: PoseEstimator,
    source: str | Path,
    target: str | Path,
    image_topic: str | None = None,
    camera_info_topic: str | None = None,
    segmentation_topic: str | None = None,
    detections_topic: str = "/detections",
    tf_prefix: str = "",
    storage: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    symmetries: Mapping[str, Symmetries] | None = None,
) -> BagReport:
    """Estimate the poses of every segmentation in a recording and write them beside everything that was in
    it.

    A segmentation belongs to the image of exactly its stamp, recorded earlier or later; the camera_info is
    the one of that stamp, else the last one recorded before the image, else the first. The answers are
    written at the time of recording of the later of image and segmentation: the earliest moment a robot
    could have had them.

    Args:
        estimator: with the objects onboarded.
        source: rosbag2 folder to read.
        target: rosbag2 folder to make.
        image_topic, camera_info_topic, segmentation_topic: needed only where the recording has several of a
        type. detections_topic: topic to add, of vision_msgs/Detection3DArray.
        tf_prefix: put before the instance's name to make its TF frame.
        storage: "mcap" or "sqlite3"; the source's by default.
        progress: called as ``progress(done, segmentations)``.
        symmetries: by class id; of equivalent poses the one nearest to the frame before is written.

    Raises:
        BagError: the recording can't be read, has no such topic, or the target can't be written.
    """
    report = BagReport()
    with bags.BagReader(source) as reader:
        image_topic = reader.topic(bags.IMAGE, image_topic)
        camera_info_topic = reader.topic(bags.CAMERA_INFO, camera_info_topic)
        segmentation_topic = reader.topic(bags.SEGMENTS, segmentation_topic)
        if any(c.topic == detections_topic for c in reader.connections):
            raise BagError(f"bag {source} already has a topic {detections_topic}: name another one")
        segmentations = {
            bags.stamp_of(message): (recorded, message)
            for _, recorded, message in reader.messages([segmentation_topic])
        }
        cameras = _Cameras(reader, camera_info_topic, is_rectified_topic(image_topic))
        total = len(segmentations)
        tracker = InstanceTracker(symmetries=symmetries)
        with bags.BagWriter(target, storage or reader.storage) as writer:
            for connection in reader.connections:
                writer.add_like(connection)
            writer.add_topic(detections_topic, bags.DETECTIONS)
            writer.add_topic("/tf", bags.TF)
            answers: list[tuple[int, int, str, str, Any]] = []  # heap by time of recording
            for connection, recorded, raw in reader.raw():
                _flush(writer, answers, recorded)
                writer.write_raw(connection.topic, recorded, raw)
                if connection.topic != image_topic:
                    continue
                image = _decode(reader, raw, connection, report)
                if image is None:
                    continue
                stamp = bags.stamp_of(image)
                found = segmentations.pop(stamp, None)
                if found is None:
                    continue
                when, segmentation = max(recorded, found[0]), found[1]
                try:
                    camera = cameras.at(stamp, recorded)
                    result = _answer(estimator, image, camera, segmentation, report, image_topic)
                except CameraError as error:
                    report.add_problem("bad camera_info", str(error))
                    continue
                if result is not None:
                    tracked = tracker.update(1e-9 * stamp, result.poses)
                    for order, (topic, kind, message) in enumerate(
                        _messages(tracked, image.header, detections_topic, tf_prefix)
                    ):
                        heapq.heappush(answers, (when, 2 * stamp + order, topic, kind, message))
                if progress is not None:
                    progress(total - len(segmentations), total)
            _flush(writer, answers, None)
    for stamp in segmentations:
        report.add_problem("no image", f"segmentation {stamp} ns has no image of its stamp on {image_topic}")
    return report


class _Cameras:
    """The camera_infos of a recording, by stamp and by time."""

    def __init__(self, reader: bags.BagReader, topic: str, rectified: bool) -> None:
        self._topic = topic
        self._rectified = rectified
        entries = [(recorded, message) for _, recorded, message in reader.messages([topic])]
        self._times = [recorded for recorded, _ in entries]
        self._messages = [message for _, message in entries]
        self._by_stamp = {bags.stamp_of(message): message for message in self._messages}

    def at(self, stamp: int, recorded: int) -> CameraModel:
        """The camera of an image of this stamp that was recorded then.

        Raises:
            CameraError: there is none, or it can't be used.
        """
        if not self._messages:
            raise CameraError(f"no camera_info was recorded on {self._topic}: record it with the images")
        message = self._by_stamp.get(stamp)
        if message is None:
            message = self._messages[max(bisect.bisect_right(self._times, recorded) - 1, 0)]
        return bags.camera_from_message(message, self._topic, self._rectified)


def _decode(reader: bags.BagReader, raw: bytes, connection: Connection, report: BagReport) -> Any:
    try:
        return reader.decode(raw, connection)
    except BagError as error:  # one damaged image is no reason to give up the others
        report.add_problem("bad image", str(error))
        return None


def _answer(
    estimator: PoseEstimator,
    image: Any,
    camera: CameraModel,
    segmentation: Any,
    report: BagReport,
    image_topic: str,
) -> EstimateResult | None:
    """Poses of one image; bad input is counted and gives None. A bad camera raises CameraError."""
    try:
        rgb = image_to_rgb(image, image_topic)
        segments = bags.segments_from_message(segmentation, *rgb.shape[:2], "segmentation")
        result = estimator.estimate(rgb, camera, segments)
    except ImageError as error:
        report.add_problem("bad image", str(error))
        return None
    except SegmentError as error:
        report.add_problem("bad segmentation", str(error))
        return None
    for index, reason in result.skipped:
        report.add_problem("no pose", f"segment '{segments[index].class_id}' gave no pose: {reason}")
    report.frames += 1
    report.poses += len(result.poses)
    for stage, milliseconds in result.timings.items():
        report.milliseconds[stage] = report.milliseconds.get(stage, 0.0) + milliseconds
    return result


def _messages(
    tracked: Sequence[TrackedPose], head: Any, detections_topic: str, tf_prefix: str
) -> list[tuple[str, str, Any]]:
    """The answers to one image as (topic, type, message)."""
    stamp = head.stamp.sec * 1_000_000_000 + head.stamp.nanosec
    head = bags.header(stamp, head.frame_id)  # of this package's types, whatever the recording's are
    detections = [
        bags.detection_message(
            one.pose.class_id,
            one.name,
            one.pose.confidence,
            one.pose.T_cam_obj,
            one.pose.covariance,
            one.pose.bbox_centre,
            one.pose.bbox_size,
            head,
        )
        for one in tracked
    ]
    messages = [
        (
            detections_topic,
            bags.DETECTIONS,
            bags.message(bags.DETECTIONS, header=head, detections=detections),
        )
    ]
    if tracked:
        transforms = [
            bags.transform_message(one.pose.T_cam_obj, head, tf_prefix + one.name) for one in tracked
        ]
        messages.append(("/tf", bags.TF, bags.message(bags.TF, transforms=transforms)))
    return messages


def _flush(writer: bags.BagWriter, answers: list[tuple[int, int, str, str, Any]], until: int | None) -> None:
    """Write the answers that were due before ``until`` (all of them for None), in order."""
    while answers and (until is None or answers[0][0] < until):
        when, _, topic, kind, message = heapq.heappop(answers)
        writer.write(topic, kind, when, message)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``picopose bag``."""
    parser.add_argument("source", metavar="IN", type=Path, help="rosbag2 folder, mcap or sqlite3")
    parser.add_argument("target", metavar="OUT", type=Path, help="rosbag2 folder to make")
    parser.add_argument("--meshes", type=Path, required=True, help="folder with one mesh per object")
    add_onboarding_arguments(parser)
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument("--image", metavar="TOPIC", help="needed only if the bag has several images")
    parser.add_argument("--camera-info", metavar="TOPIC", help="needed only if the bag has several")
    parser.add_argument("--segmentation", metavar="TOPIC", help="needed only if the bag has several")
    parser.add_argument("--detections", metavar="TOPIC", default="/detections", help="topic to add")
    parser.add_argument("--tf-prefix", default="", help="put before the instance's name in TF")
    parser.add_argument("--storage", choices=tuple(bags.STORAGES), help="of OUT; that of IN by default")


def run(args: argparse.Namespace) -> int:
    """Run ``picopose bag`` with parsed arguments; returns 0, or 1 if no segmentation was answered.

    Raises:
        PicoPoseError: input that can't be used.
    """
    with bags.BagReader(args.source) as reader:  # before the long work, so that a wrong path is said at once
        reader.topic(bags.SEGMENTS, args.segmentation)
    if args.target.exists():
        raise BagError(f"bag {args.target} exists already: give a folder that doesn't")
    estimator = load_estimator(args)
    with progress_bar(unit="frame") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = process_bag(
            estimator,
            args.source,
            args.target,
            args.image,
            args.camera_info,
            args.segmentation,
            args.detections,
            args.tf_prefix,
            args.storage,
            show,
            {spec.class_id: spec.symmetries for spec in discover_objects(args.meshes, args.unit)},
        )
    print(f"{args.target}: {report.poses} poses in {report.frames} frames")
    if report.frames:
        means = {name: total / report.frames for name, total in report.milliseconds.items()}
        print("milliseconds per frame: " + ", ".join(f"{name} {mean:.0f}" for name, mean in means.items()))
    for reason, count in report.problems.most_common(_MOST_WARNINGS):
        print(f"{count} x {reason}; first: {report.examples[reason]}", file=sys.stderr)
    return 0 if report.frames else 1
