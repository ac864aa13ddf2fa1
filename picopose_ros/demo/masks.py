"""Compare the segments that were published with the recording's, which are the truth but for a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rclpy.serialization import deserialize_message

from picopose_ros.demo.world import CAMERA, SEGMENTATION_TOPIC
from picopose_ros.evaluation.found import FoundCounts, TrueInstance, count_found
from picopose_ros.messages import bags
from picopose_ros.messages.segmentations import segments_from_message
from picopose_ros.msg import SegmentArray
from picopose_ros.segmentation import Segment


def count_segments(
    bag: Path, visible: list[dict[str, float]], published: Mapping[int, bytes]
) -> FoundCounts:
    """Found, missed and false instances of a recording's images.

    Args:
        bag: the recording. visible: per image in stamp order: instance name -> visible share.
        published: by stamp (ns) the SegmentArray as bytes; an image without one counts as one where nothing
            was found.
    """
    counts = FoundCounts()
    with bags.BagReader(bag) as reader:
        recorded = {
            bags.stamp_of(message): message for _, _, message in reader.messages([SEGMENTATION_TOPIC])
        }
    for (stamp, message), shares in zip(sorted(recorded.items()), visible, strict=True):
        truth = []
        segments = _segments(message)
        for class_id in {segment.class_id for segment in segments}:
            own = [segment for segment in segments if segment.class_id == class_id]
            names = [name for name in shares if name.rsplit("_", 1)[0] == class_id]
            # One that is hidden altogether has no segment; the others come in the order of their names.
            names = sorted(sorted(names, key=lambda name: -shares[name])[: len(own)])
            truth += [TrueInstance(class_id, s.mask, shares[name]) for s, name in zip(own, names)]
        raw = published.get(stamp)
        found = [] if raw is None else _segments(deserialize_message(raw, SegmentArray))
        counts += count_found(found, truth)[0]
    return counts


def _segments(message: object) -> list[Segment]:
    return segments_from_message(message, CAMERA.height, CAMERA.width, SEGMENTATION_TOPIC)[0]
