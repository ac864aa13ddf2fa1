"""Why something was not answered: a closed list."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DropReason(str, Enum):
    """One value per thing that can keep a segmentation, or one of its segments, from becoming a pose.

    The values are the keys of the counters in ``/diagnostics``, the words in brackets in the log, and what
    ``picopose bag`` counts.
    """

    NO_STAMP = "no_stamp"
    NO_IMAGE = "no_image"
    IMAGE_LEFT_BUFFER = "image_left_buffer"
    NO_CAMERA_INFO = "no_camera_info"
    INCOMPLETE_SEGMENTATION = "incomplete_segmentation"
    CLEARED = "cleared"
    BUSY = "busy"
    BAD_IMAGE = "bad_image"
    UNCALIBRATED = "uncalibrated"
    BAD_CAMERA_INFO = "bad_camera_info"
    BAD_DEPTH = "bad_depth"
    BAD_SEGMENT = "bad_segment"
    MASK_SIZE = "mask_size"
    EMPTY_MASK = "empty_mask"
    BAD_PROPOSALS = "bad_proposals"
    SMALL_MASK = "small_mask"
    UNKNOWN_CLASS = "unknown_class"
    NO_POSE = "no_pose"
    LOW_SCORE = "low_score"
    UNREFINED = "unrefined"
    VIEWS_FORGOTTEN = "views_forgotten"
    BAD_FRAME_ID = "bad_frame_id"
    NO_TRANSFORM = "no_transform"
    NO_OVERLAY = "no_overlay"
    NOT_SENT = "not_sent"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True)
class Problem:
    """Something that was not answered: the reason, and a message that says what, where and what to do."""

    reason: DropReason
    message: str


@dataclass(frozen=True)
class BadSegment(Problem):
    """A segment of a message that can't be used, by its number in the message."""

    index: int = 0


def no_stamp(what: str, topic: str) -> Problem:
    """An image or a segmentation whose stamp is not set.

    Args:
        what: "image" or "segmentation". topic: where it came from.
    """
    return Problem(
        DropReason.NO_STAMP,
        f"{what} on {topic} has no stamp (header.stamp is 0), so nothing tells which image belongs to which "
        "segmentation: the camera driver must stamp its images, and the segmenter copy their header.stamp",
    )
