"""From messages to what the estimator takes; what can't be used is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from picopose_ros.errors import CameraError, ImageError, SegmentError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages.images import compressed_to_rgb, image_to_rgb
from picopose_ros.node.conversions import BadSegment, camera_from_message, segments_from_message
from picopose_ros.node.detections import segments_from_boxes, segments_from_yolo
from picopose_ros.node.drops import DropReason
from picopose_ros.node.masks import segments_from_detections, segments_from_mask
from picopose_ros.segmentation import Segment

ReadSegments = Callable[[Any, int, int], tuple[list[Segment], list[BadSegment]]]
"""A segmentation's message(s) and the image's height and width -> good and bad segments."""


class FrameRefused(Exception):
    """Nothing of a frame can be used."""

    def __init__(self, reason: DropReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Frame:
    """One image with all that is known of it.

    Attributes:
        rgb: (H, W, 3) uint8. camera: of it.
        segments: what can be asked about. bad: what can't.
    """

    rgb: np.ndarray
    camera: CameraModel
    segments: list[Segment]
    bad: list[BadSegment]


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


def read_frame(
    image: Any,
    camera_info: Any,
    segmentation: Any,
    read_segments: ReadSegments,
    topics: Mapping[str, str],
    rectified: bool = False,
) -> Frame:
    """Decode an image (raw or compressed), its camera_info and its segmentation.

    Args:
        topics: names of ``image`` and ``camera_info``, for the messages.
        rectified: the image is rectified, see `CameraModel.from_camera_info`.

    Raises:
        FrameRefused: one of them can't be used.
    """
    try:
        to_rgb = image_to_rgb if hasattr(image, "encoding") else compressed_to_rgb
        rgb = to_rgb(image, topics["image"])
    except ImageError as error:
        raise FrameRefused(DropReason.BAD_IMAGE, str(error)) from error
    try:
        camera = camera_from_message(camera_info, topics["camera_info"], rectified)
    except CameraError as error:
        # CameraInfo's own definition: a camera that was never calibrated sends zeros.
        calibrated = any(camera_info.k)
        reason = DropReason.BAD_CAMERA_INFO if calibrated else DropReason.UNCALIBRATED
        raise FrameRefused(reason, str(error)) from error
    if (camera.height, camera.width) != rgb.shape[:2]:
        size, other = f"{rgb.shape[1]}x{rgb.shape[0]}", f"{camera.width}x{camera.height}"
        raise FrameRefused(
            DropReason.BAD_CAMERA_INFO,
            f"camera_info on {topics['camera_info']} is of an image of {other} pixels, but the image has "
            f"{size}: use the camera_info that belongs to {topics['image']}",
        )
    try:
        segments, bad = read_segments(segmentation, *rgb.shape[:2])
    except SegmentError as error:
        raise FrameRefused(DropReason.MASK_SIZE, str(error)) from error
    return Frame(rgb, camera, segments, bad)
