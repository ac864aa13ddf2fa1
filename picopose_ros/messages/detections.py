"""Segmentations that come as detections of another program: boxes, and polygons of yolo_ros."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import numpy as np

from picopose_ros.errors import ConfigError, SegmentError
from picopose_ros.messages.reasons import BadSegment, DropReason
from picopose_ros.segmentation import Segment
from picopose_ros.segmentation.boxes import box_mask, polygon_mask


def yolo_message_type() -> type:
    """``yolo_msgs/DetectionArray``.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module("yolo_msgs.msg").DetectionArray
    except ImportError as error:
        raise ConfigError(
            f"segmentation_input is yolo, but the package yolo_msgs is not there ({error}): source the "
            "workspace that yolo_ros was built in"
        ) from error


def segments_from_boxes(
    message: Any, height: int, width: int, topic: str
) -> tuple[list[Segment], list[BadSegment]]:
    """The boxes of a ``vision_msgs/Detection2DArray`` as segments, each judged by itself.

    Class and score are those of the likeliest hypothesis; ``id`` is not looked at.

    Args:
        message: the Detection2DArray.
        height, width: of the image it belongs to, pixels.
        topic: where it came from, for the messages.

    Returns:
        The good segments, whose masks are the boxes, and the bad ones, both in the message's order.
    """
    good: list[Segment] = []
    bad: list[BadSegment] = []
    for index, detection in enumerate(message.detections):
        likeliest = max(detection.results, key=lambda r: r.hypothesis.score, default=None)
        name = "?" if likeliest is None else likeliest.hypothesis.class_id
        where = f"detection {index} ('{name}') on {topic}"
        if likeliest is None:
            problem = f"{where} has no result, so no class: fill in results[].hypothesis"
            bad.append(BadSegment(DropReason.BAD_SEGMENT, problem, index))
            continue
        box = detection.bbox
        try:
            mask = box_mask(_centre(box), (box.size_x, box.size_y), box.center.theta, height, width)
            segment = Segment(name, float(likeliest.hypothesis.score), mask, is_box=True)
        except SegmentError as error:
            bad.append(BadSegment(DropReason.BAD_SEGMENT, f"{where}: {error}", index))
            continue
        _keep(segment, index, where, good, bad)
    return good, bad


def segments_from_yolo(
    message: Any, height: int, width: int, topic: str
) -> tuple[list[Segment], list[BadSegment]]:
    """The detections of a ``yolo_msgs/DetectionArray`` as segments, each judged by itself.

    The mask is the polygon, scaled from its own resolution, or the box where there is no polygon. The class
    is ``class_name``, or the number ``class_id`` where that is empty. An ``id`` of yolo_ros' tracking that
    only one detection has goes with the segment.

    Args, returns: as :func:`segments_from_boxes`.
    """
    good: list[Segment] = []
    bad: list[BadSegment] = []
    ids = Counter(detection.id for detection in message.detections)
    for index, detection in enumerate(message.detections):
        name = detection.class_name or str(detection.class_id)
        where = f"detection {index} ('{name}') on {topic}"
        box, polygon = detection.bbox, detection.mask
        try:
            if polygon.data:
                corners = np.array([(point.x, point.y) for point in polygon.data])
                mask = polygon_mask(corners, (polygon.height, polygon.width), height, width)
            else:
                mask = box_mask(_centre(box), (box.size.x, box.size.y), box.center.theta, height, width)
            segment = Segment(
                name,
                float(detection.score),
                mask,
                is_box=not polygon.data,
                tracked_id=detection.id if ids[detection.id] == 1 else "",
            )
        except SegmentError as error:
            bad.append(BadSegment(DropReason.BAD_SEGMENT, f"{where}: {error}", index))
            continue
        _keep(segment, index, where, good, bad)
    return good, bad


def _centre(box: Any) -> tuple[float, float]:
    return box.center.position.x, box.center.position.y


def _keep(segment: Segment, index: int, where: str, good: list[Segment], bad: list[BadSegment]) -> None:
    if segment.mask.any():
        good.append(segment)
        return
    what = "box" if segment.is_box else "polygon"
    problem = f"{where}: its {what} lies outside the image of {segment.mask.shape[1]}x{segment.mask.shape[0]}"
    bad.append(BadSegment(DropReason.EMPTY_MASK, problem, index))


def boxes_without_class(
    message: Any, height: int, width: int, topic: str
) -> tuple[tuple[np.ndarray, ...], list[BadSegment]]:
    """Masks (H, W) bool of the boxes of a ``vision_msgs/Detection2DArray``, whatever is in them.

    Args: as of :func:`segments_from_boxes`.

    Returns:
        The masks, and the boxes that can't be used.
    """
    masks: list[np.ndarray] = []
    bad: list[BadSegment] = []
    for index, detection in enumerate(message.detections):
        box, where = detection.bbox, f"detection {index} on {topic}"
        try:
            mask = box_mask(_centre(box), (box.size_x, box.size_y), box.center.theta, height, width)
        except SegmentError as error:
            bad.append(BadSegment(DropReason.BAD_SEGMENT, f"{where}: {error}", index))
            continue
        if mask.any():
            masks.append(mask)
        else:
            problem = f"{where}: its box lies outside the image of {width}x{height}"
            bad.append(BadSegment(DropReason.EMPTY_MASK, problem, index))
    return tuple(masks), bad
