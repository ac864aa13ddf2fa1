"""An image with its camera_info and its segmentation, read; what can't be used is refused with a reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from picopose_ros.errors import CameraError, ImageError, SegmentError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages.images import BitDepth, compressed_to_rgb, image_to_rgb
from picopose_ros.messages.reasons import BadSegment, DropReason
from picopose_ros.messages.segmentations import ReadSegments
from picopose_ros.segmentation import Segment

_log = logging.getLogger(__name__)


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


def camera_from_message(message: Any, topic: str, rectified: bool = False) -> CameraModel:
    """A ``sensor_msgs/CameraInfo`` as camera model; see `CameraModel.from_camera_info`.

    Args:
        message: the CameraInfo.
        topic: where it came from, for the message.
        rectified: its images are rectified.

    Raises:
        CameraError: K is zero, NaN or otherwise no intrinsics, or the distortion model is unknown.
    """
    try:
        return CameraModel.from_camera_info(message, rectified)
    except CameraError as error:
        raise CameraError(f"camera_info on {topic} can't be used: {error}") from error


@dataclass
class FrameReader:
    """Reads the frames of one camera.

    Attributes:
        topics: names of ``image`` and ``camera_info``, for the messages.
        read_segments: reads the segmentation.
        rectified: the images are rectified, see `CameraModel.from_camera_info`.
        depth: of the camera's pixels, as seen so far.
    """

    topics: Mapping[str, str]
    read_segments: ReadSegments
    rectified: bool = False
    depth: BitDepth = field(default_factory=BitDepth)

    def read(self, image: Any, camera_info: Any, segmentation: Any) -> Frame:
        """Decode an image (raw or compressed), its camera_info and its segmentation.

        Raises:
            FrameRefused: one of them can't be used.
        """
        rgb = self._pixels(image)
        try:
            camera = camera_from_message(camera_info, self.topics["camera_info"], self.rectified)
        except CameraError as error:
            # CameraInfo's own definition: a camera that was never calibrated sends zeros.
            calibrated = np.any(camera_info.k)
            reason = DropReason.BAD_CAMERA_INFO if calibrated else DropReason.UNCALIBRATED
            raise FrameRefused(reason, str(error)) from error
        if (camera.height, camera.width) != rgb.shape[:2]:
            size, other = f"{rgb.shape[1]}x{rgb.shape[0]}", f"{camera.width}x{camera.height}"
            raise FrameRefused(
                DropReason.BAD_CAMERA_INFO,
                f"camera_info on {self.topics['camera_info']} is of an image of {other} pixels, but the "
                f"image has {size}: use the camera_info that belongs to {self.topics['image']}",
            )
        try:
            segments, bad = self.read_segments(segmentation, *rgb.shape[:2])
        except SegmentError as error:
            raise FrameRefused(DropReason.MASK_SIZE, str(error)) from error
        return Frame(rgb, camera, segments, bad)

    def _pixels(self, image: Any) -> np.ndarray:
        topic, before = self.topics["image"], self.depth.bits
        to_rgb = image_to_rgb if hasattr(image, "encoding") else compressed_to_rgb
        try:
            rgb = to_rgb(image, topic, self.depth)
        except ImageError as error:
            raise FrameRefused(DropReason.BAD_IMAGE, str(error)) from error
        if before != self.depth.bits < 16:
            _log.info(
                "images on %s have 16 bits per value, but use only %d of them: scaled by that",
                topic,
                self.depth.bits,
            )
        return rgb
