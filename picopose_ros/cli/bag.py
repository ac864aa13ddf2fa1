"""``picopose bag IN OUT``: a recording in, the same recording with poses out. No ROS needed."""

from __future__ import annotations

import argparse
import bisect
import heapq
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Connection

from picopose_ros.arguments import (
    add_backend_arguments,
    add_onboarding_arguments,
    add_refinements,
    fraction,
    load_estimator,
    positive,
)
from picopose_ros.errors import BagError, ConfigError
from picopose_ros.estimation.follow import Follower, Verdict
from picopose_ros.estimator import ObjectPose, PoseEstimator
from picopose_ros.geometry.cameras import is_rectified_topic
from picopose_ros.instances import InstanceNamer
from picopose_ros.messages import bags, build
from picopose_ros.messages.answers import MIN_SCORE, judge, transforms
from picopose_ros.messages.frames import Frame, FrameReader, FrameRefused
from picopose_ros.messages.reasons import DropReason, Problem, no_stamp
from picopose_ros.messages.segmentations import ReadSegments, segment_reader
from picopose_ros.progress import progress_bar
from picopose_ros.templates.meshes import ObjectSpec, discover_objects
from picopose_ros.tf_names import prefix_refusal

_MOST_WARNINGS = 5


SEGMENTATION_TYPES = {
    "segments": bags.SEGMENTS,
    "detections": bags.BOXES,
    "boxes": bags.BOXES,
    "yolo": "yolo_msgs/msg/DetectionArray",
    "mask": bags.IMAGE,
}
"""Type of the topic of a segmentation by its kind, as of the node's parameter ``segmentation_input``."""

Answer = tuple[int, int, str, str, Any]
"""When it is to be written, its rank at that time, topic, type and message."""


@dataclass
class BagReport:
    """What became of the recording's segmentations."""

    frames: int = 0  # segmentations that were answered
    poses: int = 0
    problems: Counter[str] = field(default_factory=Counter)  # what was not, by the node's reasons
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first message of its kind
    notes: list[str] = field(default_factory=list)  # what else is to be said of the new recording
    milliseconds: dict[str, float] = field(default_factory=dict)  # per stage, sum over the frames

    def add(self, *problems: Problem) -> None:
        """Count something that went wrong."""
        for problem in problems:
            self.problems[problem.reason.value] += 1
            self.examples.setdefault(problem.reason.value, problem.message)


@dataclass(frozen=True)
class BagOptions:
    """How a recording is read and answered.

    Attributes:
        image, camera_info, segmentation, labels: topics; needed only where the recording has several of a
            type. A raw image is taken before a compressed one.
        segmentation_input: what the segmentation is, as the node's parameter: segments, detections (with
            ``labels``), boxes, yolo or mask.
        mask_class: class of the object in a mask.
        detections: topic to add, of vision_msgs/Detection3DArray.
        min_score: poses with a lower score are left out.
        tf_prefix: put before the instance's name to make its TF frame.
        follow: answer every image: what masks showed is followed to the images without.
        storage: "mcap" or "sqlite3"; the source's by default.
    """

    image: str | None = None
    camera_info: str | None = None
    segmentation: str | None = None
    labels: str | None = None
    segmentation_input: str = "segments"
    mask_class: str = ""
    detections: str = "/detections"
    min_score: float = MIN_SCORE
    tf_prefix: str = ""
    follow: bool = False
    storage: str | None = None

    def topics(self, reader: bags.BagReader) -> dict[str, str]:
        """The topics of a recording that are read, by what they are.

        Raises:
            BagError: there is no such topic, or several and none was named.
            ConfigError: these options don't go together.
        """
        if reason := prefix_refusal(self.tf_prefix):
            raise ConfigError(f"--tf-prefix is {self.tf_prefix!r}: {reason}")
        if self.segmentation_input == "mask" and not (self.mask_class and self.segmentation and self.image):
            raise ConfigError("--segmentation-input mask needs --mask-class, --segmentation and --image")
        topics = {
            "image": _image_topic(reader, self.image, {self.segmentation, self.labels}),
            "camera_info": reader.topic(bags.CAMERA_INFO, self.camera_info),
            "segmentation": reader.topic(SEGMENTATION_TYPES[self.segmentation_input], self.segmentation),
        }
        if self.segmentation_input == "detections":
            if self.labels is None:
                raise ConfigError("--segmentation-input detections needs --labels, the topic of label images")
            topics["labels"] = reader.topic(bags.IMAGE, self.labels)
        return topics


def _image_topic(reader: bags.BagReader, wanted: str | None, others: set[str | None]) -> str:
    if wanted is not None and wanted in reader.topics(bags.COMPRESSED_IMAGE):
        return wanted
    raw = [topic for topic in reader.topics(bags.IMAGE) if topic not in others]
    compressed = [
        topic for topic in reader.topics(bags.COMPRESSED_IMAGE) if not topic.endswith("compressedDepth")
    ]
    if wanted is None and len(raw or compressed) == 1:
        return (raw or compressed)[0]
    return reader.topic(bags.IMAGE if raw or not compressed else bags.COMPRESSED_IMAGE, wanted)


def process_bag(
    estimator: PoseEstimator,
    source: str | Path,
    target: str | Path,
    options: BagOptions | None = None,
    specs: Mapping[str, ObjectSpec] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BagReport:
    """Estimate the poses of every segmentation in a recording and write them beside everything that was in
    it.

    A segmentation belongs to the image of exactly its stamp, recorded earlier or later; the camera_info is
    the one of that stamp, else the last one recorded before the image, else the first. Messages are read,
    and poses sorted by score, named and written, by the same code as in the node. The answers are written at
    the time of recording of the later of image and segmentation: the earliest moment a robot could have had
    them.

    Args:
        estimator: with the objects onboarded.
        source: rosbag2 folder to read.
        target: rosbag2 folder to make.
        options: see there.
        specs: of the objects, by class id: symmetries, TF frames, further names.
        progress: called as ``progress(done, segmentations)``.

    Raises:
        BagError: the recording can't be read, has no such topic, or the target can't be written.
        ConfigError: the options don't go together.
    """
    options, specs = options or BagOptions(), specs or {}
    report = BagReport()
    with bags.BagReader(source) as reader:
        topics = options.topics(reader)
        if any(c.topic == options.detections for c in reader.connections):
            raise BagError(f"bag {source} already has a topic {options.detections}: name another one")
        _check_tf(reader, [spec.tf_base for spec in specs.values()], options.tf_prefix)
        segmentations = _Segmentations(reader, topics, options.segmentation_input, report)
        cameras = _Cameras(reader, topics["camera_info"], report)
        read = FrameReader(
            topics,
            _reader_of_some(segment_reader(options.segmentation_input, options.mask_class, topics)),
            is_rectified_topic(topics["image"]),
        )
        answerer = _Answerer(estimator, specs, options, topics["image"], report)
        total = len(segmentations)
        with bags.BagWriter(target, options.storage or reader.storage) as writer:
            left_out = set()
            for connection in reader.connections:
                if note := writer.add_like(connection):
                    report.notes.append(note)
                    left_out.add(connection.id)
            writer.add_topic(options.detections, bags.DETECTIONS)
            writer.add_topic("/tf", bags.TF)
            answers: list[Answer] = []  # heap by time of recording
            for connection, recorded, raw in reader.raw():
                _flush(writer, answers, recorded)
                if connection.id not in left_out:
                    writer.write_raw(connection.topic, recorded, raw)
                if connection.topic != topics["image"]:
                    continue
                try:
                    image = reader.decode(raw, connection)
                except BagError as error:  # one damaged image is no reason to give up the others
                    report.add(Problem(DropReason.BAD_IMAGE, str(error)))
                    continue
                stamp = bags.stamp_of(image)
                if stamp <= 0:
                    report.add(no_stamp("image", topics["image"]))
                    continue
                masks = list(segmentations.take(stamp))
                if options.follow and not masks:
                    masks = [(recorded, None)]
                for when, segmentation in masks:
                    camera_info = cameras.at(stamp, recorded)
                    if camera_info is None:
                        message = f"no camera_info was recorded on {topics['camera_info']}"
                        report.add(Problem(DropReason.NO_CAMERA_INFO, message))
                        continue
                    for order, answer in enumerate(
                        answerer.answer(read, image, camera_info, segmentation, stamp)
                    ):
                        heapq.heappush(answers, (max(recorded, when), 2 * stamp + order, *answer))
                if progress is not None:
                    progress(total - len(segmentations), total)
            _flush(writer, answers, None)
    for stamp in segmentations.stamps:
        message = f"segmentation {stamp} ns has no image of its stamp on {topics['image']}"
        report.add(Problem(DropReason.NO_IMAGE, message))
    return report


def _reader_of_some(read: ReadSegments) -> ReadSegments:
    """Reads segmentations as ``read`` does, and None as one without segments."""
    return lambda message, height, width: ([], []) if message is None else read(message, height, width)


def _check_tf(reader: bags.BagReader, bases: Sequence[str], prefix: str) -> None:
    """Check that the recording doesn't have the TF frames already that are to be added.

    Raises:
        BagError: it has one.
    """
    ours = re.compile(re.escape(prefix) + f"(?:{'|'.join(map(re.escape, bases))})_\\d+")
    for connection, _, raw in reader.raw(reader.topics(bags.TF)) if bases else ():
        try:
            transforms = reader.decode(raw, connection).transforms
        except BagError:
            continue
        for transform in transforms:
            if ours.fullmatch(transform.child_frame_id):
                raise BagError(
                    f"bag {reader.path} already has the TF frame '{transform.child_frame_id}' on "
                    f"{connection.topic}, which would be there twice: give --tf-prefix"
                )


class _Segmentations:
    """The segmentations of a recording by stamp; packed, because label images are large."""

    def __init__(
        self, reader: bags.BagReader, topics: Mapping[str, str], kind: str, report: BagReport
    ) -> None:
        self._reader = reader
        self._names = ("segmentation", "labels") if kind == "detections" else ("segmentation",)
        self._kept: dict[int, list[tuple[int, tuple[tuple[Connection, bytes], ...]]]] = {}
        parts: dict[str, dict[int, list[tuple[int, tuple[Connection, bytes]]]]] = {}
        for name in self._names:
            parts[name] = {}
            for connection, recorded, raw in reader.raw([topics[name]]):
                try:
                    stamp = bags.stamp_of(reader.decode(raw, connection))
                except BagError as error:
                    report.add(Problem(DropReason.BAD_SEGMENT, str(error)))
                    continue
                if stamp <= 0:
                    report.add(no_stamp(name, topics[name]))
                    continue
                packed = connection, zlib.compress(raw, 1)
                parts[name].setdefault(stamp, []).append((recorded, packed))
        for stamp, first in parts["segmentation"].items():
            if kind != "detections":
                self._kept[stamp] = [(recorded, (packed,)) for recorded, packed in first]
                continue
            second = parts["labels"].pop(stamp, [])
            self._kept[stamp] = [(max(a[0], b[0]), (a[1], b[1])) for a, b in zip(first, second, strict=False)]
            self._alone(report, topics, "segmentation", "labels", stamp, len(first) - len(second))
        for stamp, second in parts.get("labels", {}).items():
            self._alone(report, topics, "labels", "segmentation", stamp, len(second))

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    @property
    def stamps(self) -> list[int]:
        """Stamps (ns) of those that were not taken, each as often as there are segmentations of it."""
        return [stamp for stamp, kept in self._kept.items() for _ in kept]

    def take(self, stamp: int) -> Iterator[tuple[int, Any]]:
        """Time of recording (ns) and message, or pair of messages, of each that has this stamp."""
        for recorded, packed in self._kept.pop(stamp, []):
            messages = [self._reader.decode(zlib.decompress(data), connection) for connection, data in packed]
            yield recorded, messages[0] if len(messages) == 1 else tuple(messages)

    @staticmethod
    def _alone(
        report: BagReport, topics: Mapping[str, str], mine: str, other: str, stamp: int, count: int
    ) -> None:
        for _ in range(count):
            message = f"{topics[mine]} has a message with stamp {stamp} ns, but {topics[other]} has none"
            report.add(Problem(DropReason.INCOMPLETE_SEGMENTATION, message))


class _Cameras:
    """The camera_infos of a recording, by stamp and by time."""

    def __init__(self, reader: bags.BagReader, topic: str, report: BagReport) -> None:
        entries = []
        for connection, recorded, raw in reader.raw([topic]):
            try:
                entries.append((recorded, reader.decode(raw, connection)))
            except BagError as error:
                report.add(Problem(DropReason.BAD_CAMERA_INFO, str(error)))
        self._times = [recorded for recorded, _ in entries]
        self._messages = [message for _, message in entries]
        self._by_stamp = {bags.stamp_of(message): message for message in self._messages}

    def at(self, stamp: int, recorded: int) -> Any:
        """The camera_info of an image of this stamp that was recorded then; None if there is none at all."""
        if not self._messages:
            return None
        message = self._by_stamp.get(stamp)
        if message is None:
            message = self._messages[max(bisect.bisect_right(self._times, recorded) - 1, 0)]
        return message


class _Answerer:
    """Makes the answers to one frame after the other."""

    def __init__(
        self,
        estimator: PoseEstimator,
        specs: Mapping[str, ObjectSpec],
        options: BagOptions,
        image_topic: str,
        report: BagReport,
    ) -> None:
        self._estimator = estimator
        self._specs = specs
        self._options = options
        self._image_topic = image_topic
        self._report = report
        self._known = set(estimator.banks).union(
            *(spec.aliases for name, spec in specs.items() if name in estimator.banks)
        )
        self._follower = Follower(estimator, nearest=self._nearest) if options.follow else None
        self._newest = 0
        self._namer = InstanceNamer(symmetries={name: spec.symmetries for name, spec in specs.items()})

    def answer(
        self, read: FrameReader, image: Any, camera_info: Any, segmentation: Any, stamp: int
    ) -> list[tuple[str, str, Any]]:
        """The answers to one frame as (topic, type, message); what can't be answered is counted."""
        report, options = self._report, self._options
        try:
            frame = read.read(image, camera_info, segmentation)
        except FrameRefused as refused:
            report.add(Problem(refused.reason, str(refused)))
            return []
        poses, tracked_ids = [], []
        if segmentation is not None:
            poses, tracked_ids = self._estimated(frame)
        if self._follower is not None and stamp > self._newest:
            poses, tracked_ids = self._followed(frame, poses, 1e-9 * stamp)
            self._newest = stamp
        named = self._namer.update(1e-9 * stamp, poses, None, tracked_ids)
        report.frames += 1
        report.poses += len(named)
        # Of this package's types, whatever the recording's are.
        head = bags.header(stamp, image.header.frame_id)
        poses, names = [one.pose for one in named], [one.name for one in named]
        detections = build.detections_message(bags.message, poses, names, head)
        answers = [(options.detections, bags.DETECTIONS, detections)]
        made, problems = transforms(
            bags.message, named, head, self._image_topic, self._specs, options.tf_prefix
        )
        report.add(*problems)
        if made:
            answers.append(("/tf", bags.TF, bags.message(bags.TF, transforms=made)))
        return answers

    def _estimated(self, frame: Frame) -> tuple[list[ObjectPose], list[str]]:
        """Poses of a frame's segments, and per pose what the detector calls the instance."""
        report = self._report
        result = self._estimator.estimate(frame.rgb, frame.camera, frame.segments)
        least = self._estimator.settings.min_mask_pixels
        judged = judge(result, frame.segments, self._options.min_score, least, self._known.__contains__)
        report.add(*frame.bad, *judged.dropped)
        for stage, milliseconds in result.timings.items():
            report.milliseconds[stage] = report.milliseconds.get(stage, 0.0) + milliseconds
        return judged.poses, [frame.segments[pose.segment].tracked_id for pose in judged.poses]

    def _followed(
        self, frame: Frame, poses: list[ObjectPose], stamp: float
    ) -> tuple[list[ObjectPose], list[str]]:
        """The poses that masks gave, and those of the objects that were followed here, with their keys."""
        image = frame.rgb, frame.camera
        keys = self._follower.see_all(poses, stamp, self._namer.max_distance, None, image)
        others = [key for key in self._follower.status if key not in keys]
        found = self._follower.step(frame.rgb, frame.camera, stamp, keys=others)
        shown = [one for one in found if one.verdict is not Verdict.LOST]
        return [*poses, *(one.pose for one in shown)], [*keys, *(one.key for one in shown)]

    def _nearest(self, class_id: str, T_cam_obj: np.ndarray, R_cam_obj: np.ndarray) -> np.ndarray:
        return self._namer.nearest(class_id, T_cam_obj, R_cam_obj)


def _flush(writer: bags.BagWriter, answers: list[Answer], until: int | None) -> None:
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
    add_backend_arguments(parser)
    parser.add_argument("--hypotheses", type=positive, default=2, help="templates tried per segment (2)")
    add_refinements(parser)
    parser.add_argument(
        "--min-score",
        type=fraction,
        default=MIN_SCORE,
        help=f"poses with a lower score are left out, 0 to 1 ({MIN_SCORE:g})",
    )
    parser.add_argument(
        "--image", metavar="TOPIC", help="raw or compressed; needed only if the bag has several images"
    )
    parser.add_argument("--camera-info", metavar="TOPIC", help="needed only if the bag has several")
    parser.add_argument("--segmentation", metavar="TOPIC", help="needed only if the bag has several")
    parser.add_argument(
        "--segmentation-input",
        choices=tuple(SEGMENTATION_TYPES),
        default="segments",
        help="what the segmentation is, as the node's parameter (segments)",
    )
    parser.add_argument("--labels", metavar="TOPIC", help="label images, for --segmentation-input detections")
    parser.add_argument("--mask-class", metavar="CLASS", default="", help="for --segmentation-input mask")
    parser.add_argument("--detections", metavar="TOPIC", default="/detections", help="topic to add")
    parser.add_argument("--tf-prefix", default="", help="put before the instance's name in TF")
    parser.add_argument(
        "--follow", action="store_true", help="answer every image: objects are followed between masks"
    )
    parser.add_argument("--storage", choices=tuple(bags.STORAGES), help="of OUT; that of IN by default")


def run(args: argparse.Namespace) -> int:
    """Run ``picopose bag`` with parsed arguments; returns 0, or 1 if no segmentation was answered.

    Raises:
        PicoPoseError: input that can't be used.
    """
    options = BagOptions(
        args.image,
        args.camera_info,
        args.segmentation,
        args.labels,
        args.segmentation_input,
        args.mask_class,
        args.detections,
        args.min_score,
        args.tf_prefix,
        args.follow,
        args.storage,
    )
    with bags.BagReader(args.source) as reader:  # before the long work, so that a wrong path is said at once
        options.topics(reader)
    if args.target.exists():
        raise BagError(f"bag {args.target} exists already: give a folder that doesn't")
    estimator = load_estimator(args)
    with progress_bar(unit="frame") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        specs = {spec.class_id: spec for spec in discover_objects(args.meshes, args.unit)}
        report = process_bag(estimator, args.source, args.target, options, specs, show)
    print(f"{args.target}: {report.poses} poses in {report.frames} frames")
    if report.frames:
        means = {name: total / report.frames for name, total in report.milliseconds.items()}
        print("milliseconds per frame: " + ", ".join(f"{name} {mean:.0f}" for name, mean in means.items()))
    for reason, count in report.problems.most_common(_MOST_WARNINGS):
        print(f"{count} x {reason}; first: {report.examples[reason]}", file=sys.stderr)
    for note in report.notes:
        print(note, file=sys.stderr)
    return 0 if report.frames else 1
