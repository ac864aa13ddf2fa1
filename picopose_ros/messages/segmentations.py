"""Segmentations of every kind as segments: SegmentArray, labels with boxes, the mask of one object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from picopose_ros.errors import SegmentError
from picopose_ros.messages.detections import segments_from_boxes, segments_from_yolo
from picopose_ros.messages.reasons import BadSegment, DropReason
from picopose_ros.segmentation import Segment, rle_decode

ENCODING_RLE = 0
ENCODING_BITMAP = 1
"""Constants of ``picopose_ros/msg/Segment``."""

ReadSegments = Callable[[Any, int, int], "tuple[list[Segment], list[BadSegment]]"]
"""A segmentation's message(s) and the image's height and width -> good and bad segments."""

_LABEL_TYPES = {
    "mono8": "u1",
    "8UC1": "u1",
    "mono16": "u2",
    "16UC1": "u2",
    "32SC1": "i4",
}
"""Type of a pixel by the encoding of a label image."""


def segment_reader(kind: str, mask_class: str, topics: Mapping[str, str]) -> ReadSegments:
    """How to read a segmentation of ``kind`` (parameter ``segmentation_input``).

    Args:
        mask_class: class of the object in a mask.
        topics: names of ``segmentation`` and, for detections, ``labels``, for the messages.
    """
    topic = topics["segmentation"]
    if kind == "detections":
        return lambda both, height, width: segments_from_detections(
            *both, height, width, topic, topics["labels"]
        )
    if kind == "boxes":
        return lambda boxes, height, width: segments_from_boxes(boxes, height, width, topic)
    if kind == "yolo":
        return lambda found, height, width: segments_from_yolo(found, height, width, topic)
    if kind == "mask":
        return lambda mask, height, width: segments_from_mask(mask, mask_class, height, width, topic)
    return lambda message, height, width: segments_from_message(message, height, width, topic)


def segments_from_message(
    message: Any, height: int, width: int, topic: str
) -> tuple[list[Segment], list[BadSegment]]:
    """The segments of a ``picopose_ros/SegmentArray``, each judged by itself.

    Args:
        message: the SegmentArray.
        height: of the image it belongs to, pixels.
        width: of the image it belongs to, pixels.
        topic: where it came from, for the messages.

    Returns:
        The good segments and the bad ones, both in the message's order.

    Raises:
        SegmentError: the masks are masks of an image of another size; none of them can be used.
    """
    if (message.height, message.width) != (height, width):
        raise SegmentError(
            f"segmentation on {topic} is of an image of {message.width}x{message.height} pixels, but the "
            "image with "
            f"its stamp has {width}x{height}: scale the masks to the image before publishing them"
        )
    good: list[Segment] = []
    bad: list[BadSegment] = []
    for index, segment in enumerate(message.segments):
        where = f"segment {index} ('{segment.class_id}') on {topic}"
        try:
            mask = _mask_from_message(segment, height, width)
            decoded = Segment(class_id=segment.class_id, score=float(segment.score), mask=mask)
        except SegmentError as error:
            bad.append(BadSegment(DropReason.BAD_SEGMENT, f"{where}: {error}", index))
            continue
        if not mask.any():
            bad.append(BadSegment(DropReason.EMPTY_MASK, f"{where} has an empty mask", index))
            continue
        good.append(decoded)
    return good, bad


def _mask_from_message(segment: Any, height: int, width: int) -> np.ndarray:
    roi = segment.roi
    top, left = int(roi.y_offset), int(roi.x_offset)
    rows, cols = int(roi.height), int(roi.width)
    mask = np.zeros((height, width), dtype=bool)
    if rows == 0 or cols == 0:
        return mask
    # Checked before anything is decoded: the sizes decide how much memory that takes.
    if top + rows > height or left + cols > width:
        raise SegmentError(
            f"its roi ({left}, {top}, {cols}x{rows}) leaves the image of {width}x{height} pixels"
        )
    if segment.encoding == ENCODING_RLE:
        inside = rle_decode(np.asarray(segment.rle, dtype=np.uint32), rows, cols)
    elif segment.encoding == ENCODING_BITMAP:
        packed = np.asarray(segment.bitmap, dtype=np.uint8)
        if packed.size != (rows * cols + 7) // 8:
            raise SegmentError(
                f"its bitmap has {packed.size} bytes, but its roi of {cols}x{rows} pixels takes "
                f"{(rows * cols + 7) // 8}"
            )
        inside = np.unpackbits(packed, count=rows * cols).astype(bool).reshape(rows, cols)
    else:
        raise SegmentError(
            f"its encoding is {segment.encoding}: use ENCODING_RLE or ENCODING_BITMAP of Segment.msg"
        )
    mask[top : top + rows, left : left + cols] = inside
    return mask


def label_image(message: Any, topic: str) -> np.ndarray:
    """Pixels (H, W) of a ``sensor_msgs/Image`` of labels, integers in this machine's byte order.

    Raises:
        SegmentError: another encoding, or fewer bytes than height and step promise.
    """
    kind = _LABEL_TYPES.get(message.encoding)
    if kind is None:
        raise SegmentError(
            f"label image on {topic} has encoding '{message.encoding}': use {', '.join(_LABEL_TYPES)}"
        )
    dtype = np.dtype((">" if message.is_bigendian else "<") + kind)
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.frombuffer(message.data, np.uint8)
    if step < width * dtype.itemsize or data.size < step * height:
        raise SegmentError(
            f"label image on {topic} is truncated: {data.size} bytes and step {step} for {width}x{height} "
            f"pixels of {message.encoding}: check the segmenter"
        )
    rows = data[: step * height].reshape(height, step)[:, : width * dtype.itemsize]
    labels = np.ascontiguousarray(rows).view(dtype)
    return labels.astype(dtype.newbyteorder("="), copy=False)


def segments_from_detections(
    detections: Any, labels: Any, height: int, width: int, topic: str, labels_topic: str
) -> tuple[list[Segment], list[BadSegment]]:
    """The segments of a ``vision_msgs/Detection2DArray``, each judged by itself.

    ``Detection2D.id`` is the value of the instance's pixels in the label image; class and score are those of
    its likeliest hypothesis. The boxes aren't looked at.

    Args:
        detections, labels: the two messages.
        height, width: of the image they belong to, pixels.
        topic, labels_topic: where they came from, for the messages.

    Returns:
        The good segments and the bad ones, both in the message's order.

    Raises:
        SegmentError: the label image is of another size or can't be read; no segment can be used.
    """
    _check_size("label image", labels, height, width, labels_topic)
    pixels = label_image(labels, labels_topic)
    claims = Counter(detection.id for detection in detections.detections)
    good: list[Segment] = []
    bad: list[BadSegment] = []
    for index, detection in enumerate(detections.detections):
        likeliest = max(detection.results, key=lambda r: r.hypothesis.score, default=None)
        name = None if likeliest is None else likeliest.hypothesis
        where = f"detection {index} ('{name.class_id if name else '?'}') on {topic}"
        problem = ""
        if name is None:
            problem = "has no result, so no class: fill in results[].hypothesis"
        elif not (detection.id.isascii() and detection.id.isdigit()) or int(detection.id) == 0:
            problem = (
                f"has id '{detection.id}': it must be the value of its pixels in the label image, 1 or more"
            )
        elif claims[detection.id] > 1:
            problem = f"has id {detection.id}, which others have too: give each its own label"
        elif not np.isfinite(name.score):
            problem = f"has score {name.score}: give a number in 0..1"
        if problem:
            bad.append(BadSegment(DropReason.BAD_SEGMENT, f"{where} {problem}", index))
            continue
        mask = pixels == int(detection.id)
        if not mask.any():
            message = f"{where} has an empty mask: no pixel of {labels_topic} has the value {detection.id}"
            bad.append(BadSegment(DropReason.EMPTY_MASK, message, index))
            continue
        good.append(Segment(name.class_id, float(name.score), mask))
    return good, bad


def segments_from_mask(
    message: Any, class_id: str, height: int, width: int, topic: str
) -> tuple[list[Segment], list[BadSegment]]:
    """The one segment of a mask image: every pixel that isn't 0 is the object's.

    Args:
        message: a ``sensor_msgs/Image``, mono8.
        class_id: of the object.
        height, width: of the image it belongs to, pixels.
        topic: where it came from, for the messages.

    Raises:
        SegmentError: it is of another size or encoding.
    """
    if message.encoding not in ("mono8", "8UC1"):
        raise SegmentError(f"mask on {topic} has encoding '{message.encoding}': use mono8")
    _check_size("mask", message, height, width, topic)
    mask = label_image(message, topic) != 0
    if not mask.any():
        return [], [BadSegment(DropReason.EMPTY_MASK, f"the mask on {topic} is empty")]
    return [Segment(class_id, 1.0, mask)], []


def _check_size(what: str, message: Any, height: int, width: int, topic: str) -> None:
    if (message.height, message.width) != (height, width):
        raise SegmentError(
            f"{what} on {topic} has {message.width}x{message.height} pixels, but the image with its stamp "
            f"has {width}x{height}: scale it to the image before publishing it"
        )
