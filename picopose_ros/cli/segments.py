"""``picopose segments-from-cnos DETECTIONS.json``: CNOS's masks as SegmentArray, in step with their images.

CNOS (https://github.com/nv-nguyen/cnos) segments the images of a folder and writes one JSON list in the form
of the BOP challenge. An entry says of which image it is by ``scene_id`` and ``image_id``; ROS knows an image
by its stamp. What brings the two together is a `Timeline`: the images of a recording in the order of their
stamps, a table, or, where nothing moves, one image for all.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from picopose_ros.errors import BagError, ConfigError, SegmentError
from picopose_ros.messages import bags
from picopose_ros.progress import progress_bar
from picopose_ros.segmentation import CnosDetections, Problems, Segment


class Timeline:
    """Which image of the scene a stamp belongs to.

    Args:
        table: stamp (ns) -> image id.
        source: what to call it in messages.
    """

    def __init__(self, table: Mapping[int, int], source: str) -> None:
        self._table = dict(table)
        self.source = source

    def __len__(self) -> int:
        return len(self._table)

    def image_id(self, stamp: int) -> int | None:
        """The image's id, or None for a stamp that is not in the table."""
        return self._table.get(stamp)

    @classmethod
    def from_bag(cls, path: str | Path, topic: str | None = None, first: int = 0) -> Timeline:
        """The images of a recording in the order of their stamps, numbered from ``first``.

        Raises:
            BagError: the recording can't be read or has no such topic.
        """
        with bags.BagReader(path) as reader:
            topic = reader.topic(bags.IMAGE, topic)
            stamps = sorted({bags.stamp_of(image) for _, _, image in reader.messages([topic])})
        return cls({stamp: first + index for index, stamp in enumerate(stamps)}, f"{path}, {topic}")

    @classmethod
    def from_csv(cls, path: str | Path, scene_id: int | None = None) -> Timeline:
        """A table with the columns ``image_id`` and ``stamp`` (whole nanoseconds), and maybe ``scene_id``.

        Raises:
            SegmentError: the file can't be read, lacks a column, or a row is no row; names the row.
        """
        table: dict[int, int] = {}
        try:
            with Path(path).open(newline="") as file:
                rows = csv.DictReader(file, skipinitialspace=True)
                missing = {"image_id", "stamp"} - set(rows.fieldnames or ())
                if missing:
                    raise SegmentError(
                        f"{path}: has no column {' and '.join(sorted(missing))}; its first row must name them"
                    )
                for row in rows:
                    try:
                        if scene_id is None or int(row.get("scene_id") or scene_id) == scene_id:
                            table[int(row["stamp"])] = int(row["image_id"])
                    except (TypeError, ValueError) as error:
                        raise SegmentError(
                            f"{path}, line {rows.line_num}: image_id and stamp must be whole numbers, the "
                            f"stamp in nanoseconds ({error})"
                        ) from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SegmentError(f"{path}: can't be read ({error})") from error
        if not table:
            raise SegmentError(
                f"{path}: holds no stamp" + ("" if scene_id is None else f" of scene {scene_id}")
            )
        return cls(table, str(path))


class SegmentSource:
    """The segments of each image that comes, by its stamp.

    Args:
        detections: CNOS's.
        timeline: which image a stamp belongs to. None: images are counted as they come.
        still: masks of this image go with every image: neither camera nor objects move.
        first: id of the first image where images are counted.
    """

    def __init__(
        self,
        detections: CnosDetections,
        timeline: Timeline | None = None,
        still: int | None = None,
        first: int = 0,
    ) -> None:
        if still is not None and still not in detections.image_ids:
            known = ", ".join(map(str, detections.image_ids[:10]))
            raise SegmentError(f"{detections.path}: speaks of no image {still} (first it has: {known})")
        self._detections = detections
        self._timeline = timeline
        self._still = still
        self._first = self._next = first
        self._last_stamp: int | None = None
        self.answered = 0
        self.empty = 0
        self.segments = 0

    @property
    def problems(self) -> Problems:
        """What could not be used so far."""
        return self._detections.problems

    def answer(self, stamp: int, size: tuple[int, int] | None = None) -> list[Segment] | None:
        """Segments of the image with this stamp (ns), or None for an image that CNOS never saw.

        Args:
            stamp: of the image.
            size: its height and width, if they are known.
        """
        image_id = self._image_id(stamp)
        if image_id is None:
            return None
        found = self._detections.segments(image_id, size)
        self.answered += 1
        self.empty += not found
        self.segments += len(found)
        return found

    def _image_id(self, stamp: int) -> int | None:
        if self._still is not None:
            return self._still
        if self._timeline is not None:
            found = self._timeline.image_id(stamp)
            if found is None:
                self.problems.add(
                    "image without a number", f"stamp {stamp} ns is not in {self._timeline.source}"
                )
            return found
        if self._last_stamp is not None and stamp < self._last_stamp:  # a recording that starts again
            self._next = self._first
        self._last_stamp = stamp
        found, self._next = self._next, self._next + 1
        if found > self._detections.image_ids[-1]:
            self.problems.add(
                "image after the last one", f"image {found} (stamp {stamp} ns) is not in the file"
            )
            return None
        return found


def write_bag(
    source: SegmentSource,
    recording: str | Path,
    target: str | Path,
    image_topic: str | None = None,
    segmentation_topic: str = "/segmentation",
    storage: str | None = None,
) -> None:
    """Copy a recording and add the segments of its images, each at the time when its image was recorded.

    Raises:
        BagError: the recording can't be read, has no such image topic or already has the other topic, or the
            target can't be written.
    """
    with bags.BagReader(recording) as reader:
        image_topic = reader.topic(bags.IMAGE, image_topic)
        if any(connection.topic == segmentation_topic for connection in reader.connections):
            raise BagError(f"bag {recording} already has a topic {segmentation_topic}: name another one")
        with (
            bags.BagWriter(target, storage or reader.storage) as writer,
            progress_bar(total=reader.message_count, unit="message") as bar,
        ):
            for connection in reader.connections:
                writer.add_like(connection)
            writer.add_topic(segmentation_topic, bags.SEGMENTS)
            for connection, recorded, raw in reader.raw():
                writer.write_raw(connection.topic, recorded, raw)
                bar.update()
                if connection.topic != image_topic:
                    continue
                try:
                    image = reader.decode(raw, connection)
                except BagError as error:  # one damaged image is no reason to give up the others
                    source.problems.add("damaged image", str(error))
                    continue
                stamp, size = bags.stamp_of(image), (int(image.height), int(image.width))
                segments = source.answer(stamp, size)
                if segments is not None:
                    head = bags.header(stamp, image.header.frame_id)
                    message = bags.segments_message(segments, head, *size)
                    writer.write(segmentation_topic, bags.SEGMENTS, recorded, message)


def read_class_names(path: str | Path) -> dict[int, str]:
    """``{"5": "mug"}``: the class id of every category.

    Raises:
        SegmentError: the file can't be read or is no such table.
    """
    try:
        table = json.loads(Path(path).read_text())
        return {int(category): _text(name) for category, name in table.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise SegmentError(f"{path}: can't be read ({error})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise SegmentError(
            f'{path}: must be a JSON object of category and class id, like {{"5": "mug"}} ({error})'
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is no class id")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``picopose segments-from-cnos``."""
    parser.add_argument("detections", metavar="DETECTIONS.json", type=Path, help="the file that CNOS wrote")
    parser.add_argument(
        "--image",
        metavar="TOPIC",
        help="the images: live (default: image), or those of the recording if it has several",
    )
    parser.add_argument(
        "--segmentation", metavar="TOPIC", default="/segmentation", help="topic to publish on or to add"
    )
    parser.add_argument(
        "--bag",
        metavar="IN",
        type=Path,
        help="rosbag2 folder with the images that CNOS was given, in that order",
    )
    parser.add_argument(
        "--out", metavar="OUT", type=Path, help="write IN and the segments to this bag instead of publishing"
    )
    parser.add_argument("--storage", choices=tuple(bags.STORAGES), help="of OUT; that of IN by default")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--stamps",
        metavar="TABLE.csv",
        type=Path,
        help="columns image_id and stamp (ns), as `picopose images-from-bag` writes it",
    )
    which.add_argument(
        "--still",
        metavar="IMAGE_ID",
        type=int,
        help="nothing moves: the masks of this image go with every image",
    )
    parser.add_argument(
        "--first-image-id", type=int, default=0, help="id of a recording's or stream's first image (0)"
    )
    parser.add_argument("--scene-id", type=int, help="needed only if the file has several scenes")
    parser.add_argument(
        "--classes",
        metavar="NAMES.json",
        type=Path,
        help='class ids by category, {"5": "mug"}; else obj_000005',
    )
    parser.add_argument(
        "--min-score", type=float, default=0.0, help="leave out what CNOS is less sure of (0)"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``picopose segments-from-cnos``; returns 0, or 1 if something could not be used.

    Raises:
        PicoPoseError: input that can't be used.
    """
    if args.out is not None and args.bag is None:
        raise ConfigError("--out needs --bag, the recording that the segments are added to")
    names = None if args.classes is None else read_class_names(args.classes)
    detections = CnosDetections(args.detections, args.scene_id, names, args.min_score)
    print(f"{args.detections}: {len(detections)} masks of {len(detections.image_ids)} images")
    timeline = None
    if args.stamps is not None:
        timeline = Timeline.from_csv(args.stamps, args.scene_id)
    elif args.bag is not None and args.still is None:
        timeline = Timeline.from_bag(args.bag, _topic_of_bag(args), args.first_image_id)
    source = SegmentSource(detections, timeline, args.still, args.first_image_id)
    _say(source.problems.lines())
    before = dict(source.problems.counts)
    if args.out is not None:
        write_bag(source, args.bag, args.out, args.image, args.segmentation, args.storage)
    else:
        from picopose_ros.node.segments import publish_segments  # ROS, which the other way does without

        publish_segments(source, args.image or "image", args.segmentation)
    nothing = f", {source.empty} of them with nothing seen" if source.empty else ""
    print(f"{source.segments} segments for {source.answered} images{nothing}")
    if source.problems.counts != before:
        _say(source.problems.lines())
    return 1 if source.problems or not source.answered else 0


def _topic_of_bag(args: argparse.Namespace) -> str | None:
    """The images' topic in the recording: live, they may come under another name than they were recorded."""
    if args.image is None or args.out is not None:
        return args.image
    with bags.BagReader(args.bag) as reader:
        return args.image if any(c.topic == args.image for c in reader.connections) else None


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)
