"""Queries: the segments of an image with their crops, ready for the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from picopose_ros.errors import CameraError, ImageError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import crop_box_from_mask, crop_mask, crop_rgb, mask_background
from picopose_ros.segmentation import Segment
from picopose_ros.segmentation.boxes import cut_out
from picopose_ros.templates.bank import TemplateBank


@dataclass(frozen=True)
class Query:
    """A segment with its crop and the bank of its class.

    Attributes:
        index: of the segment in the input.
        segment: the segment.
        bank: of its class.
        M_crop_img: (3, 3) full image px -> crop px.
        crop: (3, 224, 224) float32, the network's input.
        mask: (224, 224) uint8, the segment in the crop.
    """

    index: int
    segment: Segment
    bank: TemplateBank
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
) -> tuple[list[Query], list[tuple[int, str]]]:
    """Crop the segments that can have a pose.

    Args:
        rgb: (H, W, 3) uint8.
        segments: of this image. Of a box the mask is what in it looks unlike its surroundings (`cut_out`).
        banks: by class id.
        aliases: further class ids of segments -> class id of a bank.
        blacken_background: set the pixels of a crop outside the segment to black.
        min_mask_pixels: segments with fewer visible pixels are skipped.

    Returns:
        The queries, and of every other segment its index and the reason why it is skipped.
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
            box = crop_box_from_mask(segment.mask)
            crop, mask = crop_rgb(rgb, box), crop_mask(segment.mask, box)
            if blacken_background:
                crop = mask_background(crop, mask)
            queries.append(Query(index, segment, bank, box.affine(), crop, mask))
            continue
        skipped.append((index, reason))
    return queries, skipped
