"""Segmentations that come as images: labels with boxes, and the mask of one object."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from picopose_ros.errors import SegmentError
from picopose_ros.node.conversions import BadSegment
from picopose_ros.node.drops import DropReason
from picopose_ros.segmentation import Segment

_LABEL_TYPES = {
    "mono8": "u1",
    "8UC1": "u1",
    "mono16": "u2",
    "16UC1": "u2",
    "32SC1": "i4",
}
"""Type of a pixel by the encoding of a label image."""


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
            bad.append(BadSegment(index, DropReason.BAD_SEGMENT, f"{where} {problem}"))
            continue
        mask = pixels == int(detection.id)
        if not mask.any():
            message = f"{where} has an empty mask: no pixel of {labels_topic} has the value {detection.id}"
            bad.append(BadSegment(index, DropReason.EMPTY_MASK, message))
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
        return [], [BadSegment(0, DropReason.EMPTY_MASK, f"the mask on {topic} is empty")]
    return [Segment(class_id, 1.0, mask)], []


def _check_size(what: str, message: Any, height: int, width: int, topic: str) -> None:
    if (message.height, message.width) != (height, width):
        raise SegmentError(
            f"{what} on {topic} has {message.width}x{message.height} pixels, but the image with its stamp "
            f"has {width}x{height}: scale it to the image before publishing it"
        )
