"""A segment: one instance mask with a class and a score; label images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from picopose_ros.errors import SegmentError
from picopose_ros.geometry.crops import extent_of


@dataclass(frozen=True)
class Segment:
    """One instance in an image.

    Attributes:
        class_id: name of the object's class: what the bank of that object is called, or an alias of it.
        score: the segmenter's confidence, 0..1.
        mask: (H, W) bool, True on the visible pixels of the instance; the size of the image it was made from.
        is_box: the mask is a detector's box: it holds the instance, and what is around and before it too.
        tracked_id: what a tracking detector calls the instance from image to image; "" where none does.
    """

    class_id: str
    score: float
    mask: np.ndarray
    is_box: bool = False
    tracked_id: str = ""

    def __post_init__(self) -> None:
        mask = np.asarray(self.mask)
        if mask.ndim != 2:
            raise SegmentError(
                f"segment {self.class_id!r}: the mask has shape {mask.shape}, give it as (height, width)"
            )
        if not np.isfinite(self.score):
            raise SegmentError(f"segment {self.class_id!r}: the score is {self.score}, give a number in 0..1")
        object.__setattr__(self, "mask", mask if mask.dtype == bool else mask != 0)


def mask_roi(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Tight box ``(x, y, w, h)`` in pixels around the set pixels of ``mask`` (H, W); None if it is empty."""
    extent = extent_of(mask)
    if extent is None:
        return None
    low, high = extent
    return (*low.tolist(), *(high - low).tolist())


def segments_from_label_image(labels: np.ndarray, classes: Mapping[int, tuple[str, float]]) -> list[Segment]:
    """A label image and what its values mean -> segments, in the order of ``classes``.

    Args:
        labels: (H, W) integers; 0 is background.
        classes: label value -> (class id, score). A value that the image doesn't hold gives an empty mask, so
            that nothing is lost silently.

    Raises:
        SegmentError: the image isn't 2-D or not of integers, or a class is given for the background.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise SegmentError(
            f"a label image must be (height, width) of integers, got {labels.shape} {labels.dtype}"
        )
    if 0 in classes:
        raise SegmentError(
            f"label 0 is the background, but {classes[0][0]!r} claims it: number instances from 1"
        )
    return [Segment(name, float(score), labels == value) for value, (name, score) in classes.items()]
