"""Queries: the segments of an image with their crops, ready for the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from picopose_ros.errors import CameraError, ImageError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import (
    CropBox,
    crop_box_from_mask,
    crop_box_of_extent,
    crop_segment,
    extent_of,
    sides_at_border,
)
from picopose_ros.segmentation import Segment
from picopose_ros.segmentation.boxes import cut_out
from picopose_ros.templates.bank import TemplateBank

_BEYOND = (1.3, 1.6)
"""By what the crops of a segment at the image's border are larger, on that side, than what is seen of it. How
much lies outside is not known; stage 1 chooses (`best_crops`). Of 96 objects that were cut by 20 to 65 %,
48 poses were right to .1 d without these crops, 70 with them, 72 with a fourth one of 2."""


@dataclass(frozen=True)
class Query:
    """A segment with its crop and the bank of its class.

    Attributes:
        index: of the segment in the input.
        segment: the segment.
        bank: of its class.
        box: of the crop.
        M_crop_img: (3, 3) full image px -> crop px.
        crop: (3, 224, 224) float32, the network's input.
        mask: (224, 224) uint8, the segment in the crop.
    """

    index: int
    segment: Segment
    bank: TemplateBank
    box: CropBox
    M_crop_img: np.ndarray
    crop: np.ndarray
    mask: np.ndarray


def check_image(rgb: np.ndarray, camera: CameraModel) -> None:
    """Check that an image can be used with a camera.

    Raises:
        ImageError: the image isn't (H, W, 3) uint8.
        CameraError: the camera can't be used or is of another image size.
    """
    if not isinstance(rgb, np.ndarray) or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        shape = getattr(rgb, "shape", type(rgb).__name__)
        raise ImageError(f"the image has shape {shape}, give it as RGB (height, width, 3)")
    if rgb.dtype != np.uint8:
        raise ImageError(f"the image is of type {rgb.dtype}, give it as uint8 in 0..255")
    camera.validate()
    height, width = rgb.shape[:2]
    if (camera.width, camera.height) != (width, height):
        raise CameraError(
            f"the camera is calibrated for {camera.width}x{camera.height}, the image is {width}x{height}; "
            "scale the intrinsics or send the image they belong to"
        )


def make_queries(
    rgb: np.ndarray,
    segments: Sequence[Segment],
    banks: Mapping[str, TemplateBank],
    aliases: Mapping[str, str],
    blacken_background: bool,
    min_mask_pixels: int,
    beyond: bool = False,
) -> tuple[list[Query], list[tuple[int, str]]]:
    """Crop the segments that can have a pose.

    Args:
        rgb: (H, W, 3) uint8.
        segments: of this image. Of a box the mask is what in it looks unlike its surroundings (`cut_out`).
        banks: by class id.
        aliases: further class ids of segments -> class id of a bank.
        blacken_background: set the pixels of a crop outside the segment to black.
        min_mask_pixels: segments with fewer visible pixels are skipped.
        beyond: a segment at the image's border gives further queries, whose crops reach out of the image.

    Returns:
        The queries in the order of the segments, and of every other segment its index and why it is
            skipped.
    """
    queries: list[Query] = []
    skipped: list[tuple[int, str]] = []
    height, width = rgb.shape[:2]
    for index, segment in enumerate(segments):
        if segment.is_box and segment.mask.shape == (height, width):
            segment = replace(segment, mask=cut_out(rgb, segment.mask))
        bank = banks.get(aliases.get(segment.class_id, segment.class_id))
        pixels = int(segment.mask.sum())
        if bank is None:
            known = ", ".join(sorted(banks))
            reason = f"no object is called '{segment.class_id}'; onboarded are {known}"
        elif segment.mask.shape != (height, width):
            size = f"{segment.mask.shape[1]}x{segment.mask.shape[0]}"
            reason = f"its mask is {size}, the image {width}x{height}; both must be of one size"
        elif pixels == 0:
            reason = "its mask is empty"
        elif pixels < min_mask_pixels:
            reason = f"its mask has {pixels} pixels, at least {min_mask_pixels} are needed"
        else:
            boxes = [crop_box_from_mask(segment.mask), *(boxes_beyond(segment.mask) if beyond else ())]
            for box in boxes:
                crop, mask = crop_segment(rgb, segment.mask, box, blacken_background)
                queries.append(Query(index, segment, bank, box, box.affine(), crop, mask))
            continue
        skipped.append((index, reason))
    return queries, skipped


def boxes_beyond(mask: np.ndarray) -> list[CropBox]:
    """Boxes around a segment (H, W) that reach out of the image where it does; none if it lies inside."""
    extent, (out_low, out_high) = extent_of(mask), sides_at_border(mask)
    if extent is None or not (out_low.any() or out_high.any()):
        return []
    low, high = extent
    side = (high - low).max()
    return [
        crop_box_of_extent(low - (factor - 1) * side * out_low, high + (factor - 1) * side * out_high)
        for factor in _BEYOND
    ]
