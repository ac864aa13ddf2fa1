"""Masks of what detectors give instead of masks: boxes, upright or turned, and polygons."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from picopose_ros.errors import SegmentError

MOST_STRETCH = 1.05
"""How much the aspect ratio of a mask may differ from the image's; more means that it was cut or padded."""

_AROUND = 0.25  # how far around a box its surroundings are looked at, in its sides
_CUT_SIDE = 128  # longer side (px) of the picture that is cut
_CUT_ROUNDS = 4
_CUT_LEAST = 20  # pixels of box and of surroundings that GrabCut needs
_LEAST_FILLED = 0.15  # of the box; less is a mistake

_SHIFT = 4  # fractional bits of OpenCV's polygon corners


def box_mask(
    centre: tuple[float, float], size: tuple[float, float], theta: float, height: int, width: int
) -> np.ndarray:
    """The pixels of an image that a box covers; none of them where it lies outside.

    A box is given as detectors do: the top left corner of the image is (0, 0), the middle of its first pixel
    (0.5, 0.5). A box that is too small to hold the middle of a pixel covers the pixel that its centre is in.

    Args:
        centre: (x, y) of the box, pixels.
        size: its sides along its own x and y axes, pixels.
        theta: radians that its axes are turned, from x to y.
        height, width: of the image.

    Returns:
        (height, width) bool.

    Raises:
        SegmentError: a number isn't finite, or a side isn't positive.
    """
    if not np.isfinite([*centre, *size, theta]).all():
        raise SegmentError(f"its box (centre {centre}, size {size}, theta {theta}) is not finite")
    if not min(size) > 0:
        raise SegmentError(f"its box is {size[0]:g}x{size[1]:g} pixels: it has no area")
    (x, y), (w, h) = centre, size
    cos, sin = np.cos(theta), np.sin(theta)
    # Only the part of the image around it is looked at.
    reach_x, reach_y = (abs(w * cos) + abs(h * sin)) / 2, (abs(w * sin) + abs(h * cos)) / 2
    left, right = (int(np.clip(v, 0, width)) for v in (np.floor(x - reach_x), np.ceil(x + reach_x)))
    top, bottom = (int(np.clip(v, 0, height)) for v in (np.floor(y - reach_y), np.ceil(y + reach_y)))
    dx = np.arange(left, right) + 0.5 - x
    dy = (np.arange(top, bottom) + 0.5 - y)[:, None]
    mask = np.zeros((height, width), bool)
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    mask[top:bottom, left:right] = (along >= -w / 2) & (along < w / 2) & (across >= -h / 2) & (across < h / 2)
    if not mask.any() and 0 <= x < width and 0 <= y < height:
        mask[int(y), int(x)] = True
    return mask


def cut_out(rgb: np.ndarray, box: np.ndarray) -> np.ndarray:
    """What in a box looks unlike its surroundings: GrabCut (Rother et al. 2004), at a low resolution.

    What lies around the box is background for certain, what lies in it may be either. A box over the whole
    image has no surroundings, and a result that fills little of the box is none: the box is returned.

    Args:
        rgb: (H, W, 3) uint8. box: (H, W) bool.

    Returns:
        (H, W) bool, inside the box.
    """
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    if rows.size == 0:
        return box
    height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
    top, left = max(int(rows[0] - _AROUND * height) - 4, 0), max(int(columns[0] - _AROUND * width) - 4, 0)
    window = (
        slice(top, int(rows[-1] + _AROUND * height) + 5),
        slice(left, int(columns[-1] + _AROUND * width) + 5),
    )
    inside = box[window].astype(np.uint8)
    scale = min(_CUT_SIDE / max(inside.shape), 1.0)
    size = max(round(inside.shape[1] * scale), 2), max(round(inside.shape[0] * scale), 2)
    picture = cv2.resize(np.ascontiguousarray(rgb[window]), size, interpolation=cv2.INTER_AREA)
    maybe = cv2.resize(inside, size, interpolation=cv2.INTER_NEAREST)
    if min(np.count_nonzero(maybe), np.count_nonzero(maybe == 0)) < _CUT_LEAST:
        return box
    labels = np.where(maybe > 0, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    cv2.setRNGSeed(0)  # the same box gives the same mask
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(picture, labels, None, *models, _CUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    mask = np.zeros_like(box)
    mask[window] = (cv2.resize(found, inside.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0) & box[window]
    return mask if np.count_nonzero(mask) >= _LEAST_FILLED * np.count_nonzero(box) else box


def polygon_mask(
    corners: Sequence[tuple[float, float]] | np.ndarray, size: tuple[int, int], height: int, width: int
) -> np.ndarray:
    """The pixels of an image inside a polygon that is given at another resolution.

    Args:
        corners: (n, 2) x, y in pixels of the polygon's own resolution, from the image's top left corner.
        size: height and width of that resolution.
        height, width: of the image.

    Returns:
        (height, width) bool.

    Raises:
        SegmentError: fewer than three corners, a corner that isn't finite, or a resolution that is none of
            the image's own, scaled.
    """
    points = np.asarray(corners, np.float64).reshape(-1, 2)
    if len(points) < 3:
        raise SegmentError(f"its polygon has {len(points)} points: a mask needs three at least")
    if not np.isfinite(points).all():
        raise SegmentError("its polygon has a point that is not finite")
    rows, columns = size
    if rows <= 0 or columns <= 0:
        raise SegmentError(f"its mask is of {columns}x{rows} pixels: say the polygon's resolution")
    stretch = (width / columns) / (height / rows)
    if not 1 / MOST_STRETCH <= stretch <= MOST_STRETCH:
        raise SegmentError(
            f"its mask is of {columns}x{rows} pixels, which is no scaled image of {width}x{height}: was it "
            "padded or cut?"
        )
    # OpenCV's pixel centres are integers; far outside the image its numbers would overflow.
    scaled = points * [width / columns, height / rows] - 0.5
    scaled = np.clip(scaled, -2 * max(height, width), 3 * max(height, width))
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.rint(scaled * 2**_SHIFT).astype(np.int32)], 1, cv2.LINE_8, _SHIFT)
    return mask > 0
