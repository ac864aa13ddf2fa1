"""Square 224-pixel crops of segments and templates, and their geometry.

Queries and templates go through the same functions, so that the network compares equal inputs.
The conventions (even side, shifting instead of padding, bilinear resize without antialiasing, BGR with CLIP
constants) are the released network's.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from picopose_ros.errors import SegmentError

CROP_SIZE = 224
"""Side of a crop in pixels: what the network sees."""

GRID = 64
"""Cells per side of the finest correspondence grid; one cell is 3.5 crop pixels."""

CELL = CROP_SIZE / GRID
"""Side of one cell of the finest grid in crop pixels."""

# The released network feeds BGR pixels through CLIP's constants in index order (the R constants meet the B
# channel).
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
_STD = np.array([0.26862954, 0.26130258, 0.27577711])

BACKGROUND = ((0.0 - _MEAN) / _STD).astype(np.float32)
"""(3,) what a black pixel normalises to, in the network's channel order: the background of templates."""


@dataclass(frozen=True)
class CropBox:
    """A square region of an image, in whole full-image pixels.

    Attributes:
        left: first column.
        top: first row.
        side: number of columns and rows (even).
    """

    left: int
    top: int
    side: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices: ``image[box.slices]`` is the region."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)

    def affine(self) -> np.ndarray:
        """M_crop_img (3, 3) float32: full-image pixel -> crop pixel, as the released network has it.

        It forgets that resizing keeps the corners of pixels, not their centres, where they were: what the
        crop shows is off by up to half a pixel. See :meth:`content`.
        """
        # The product is rounded in float32 on purpose: that is the released network's matrix to the last bit.
        scale = np.float32(CROP_SIZE / self.side)
        return np.array(
            [[scale, 0, -scale * self.left], [0, scale, -scale * self.top], [0, 0, 1]], np.float32
        )

    def content(self) -> np.ndarray:
        """M_crop_img (3, 3) float64: full-image pixel -> the crop pixel that shows it."""
        scale = CROP_SIZE / self.side
        shift = (scale - 1.0) / 2.0
        return np.array(
            [[scale, 0, shift - scale * self.left], [0, scale, shift - scale * self.top], [0, 0, 1]]
        )


def _square(left: float, top: float, right: float, bottom: float, height: int, width: int) -> CropBox:
    extent = min(max(bottom - top, right - left), min(height, width))
    half = max(int(extent // 2), 1)  # a single pixel still needs a region that can be resized
    y0, x0 = int((top + bottom) // 2) - half, int((left + right) // 2) - half
    # Shifted inside, never padded: the half is at most min(height, width) / 2, so it always fits.
    y0 = min(max(y0, 0), height - 2 * half)
    x0 = min(max(x0, 0), width - 2 * half)
    return CropBox(x0, y0, 2 * half)


def extent_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """First column and row of a mask (H, W), and those behind its last, (2,) each; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0]]), np.array([columns[-1], rows[-1]]) + 1


def crop_box_from_mask(mask: np.ndarray) -> CropBox:
    """Square box around the non-zero pixels of ``mask`` (H, W), shifted inside the image where needed.

    Raises:
        SegmentError: the mask has no non-zero pixel, or the image is smaller than 2x2.
    """
    height, width = mask.shape
    extent = extent_of(mask)
    if extent is None:
        raise SegmentError(f"the mask ({width}x{height}) is empty: there is nothing to crop")
    if min(height, width) < 2:
        raise SegmentError(f"the image is {width}x{height}: too small to crop")
    (left, top), (right, bottom) = (corner.tolist() for corner in extent)
    return _square(left, top, right, bottom, height, width)


def crop_box_from_bbox(x: float, y: float, w: float, h: float, height: int, width: int) -> CropBox:
    """Square box around a detection box ``(x, y, w, h)`` in pixels of an image of ``height`` x ``width``.

    Raises:
        SegmentError: the box has no area, or the image is smaller than 2x2.
    """
    if not (w > 0 and h > 0):
        raise SegmentError(f"the box ({x}, {y}, {w}, {h}) has no area: there is nothing to crop")
    if min(height, width) < 2:
        raise SegmentError(f"the image is {width}x{height}: too small to crop")
    return _square(x, y, x + w, y + h, height, width)


def crop_box_of_extent(low: np.ndarray, high: np.ndarray) -> CropBox:
    """Square box around what lies between two pixels (2,); it may reach out of the image."""
    half = max(int(np.ceil((high - low).max() / 2)), 1)
    left, top = np.floor((low + high) / 2).astype(int) - half
    return CropBox(int(left), int(top), 2 * half)


def sides_at_border(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a segment (H, W) ends at the image's border: (2,) bool left and top, (2,) right and bottom.

    A pixel from it counts as well: segmenters leave one free.
    """
    extent = extent_of(mask)
    if extent is None:
        return np.zeros(2, bool), np.zeros(2, bool)
    low, high = extent
    return low <= 1, high >= np.array(mask.shape[::-1]) - 1


def _inside(image: np.ndarray, box: CropBox) -> bool:
    height, width = image.shape[:2]
    return min(box.left, box.top) >= 0 and box.left + box.side <= width and box.top + box.side <= height


def _reaching_out(image: np.ndarray, box: CropBox, flags: int) -> np.ndarray:
    """The crop of an image (H, W, ...) uint8 in a box that reaches out of it; 0 there."""
    return cv2.warpAffine(image, box.content()[:2], (CROP_SIZE, CROP_SIZE), flags=flags)


def normalise_crop(rgb01: np.ndarray) -> np.ndarray:
    """RGB (S, S, 3) in [0, 1] -> the network's input (3, S, S) float32: BGR, CLIP-normalised."""
    bgr = np.empty((3, *rgb01.shape[:2]), np.float32)
    for channel, (mean, std) in enumerate(zip(_MEAN, _STD)):  # a plane at a time is twice as fast
        bgr[channel] = (rgb01[..., 2 - channel] - mean) / std
    return bgr


def crop_rgb(rgb: np.ndarray, box: CropBox) -> np.ndarray:
    """Crop RGB uint8 (H, W, 3) to the network's input (3, 224, 224) float32; black outside the image.

    Bilinear without antialiasing, on values already divided by 255, as the released network does.
    """
    if not _inside(rgb, box):
        return normalise_crop(_reaching_out(rgb, box, cv2.INTER_LINEAR) / 255.0)
    region = rgb[box.slices].astype(np.float64) / 255.0
    return normalise_crop(cv2.resize(region, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR))


def crop_mask(mask: np.ndarray, box: CropBox) -> np.ndarray:
    """Crop a mask (H, W) to (224, 224) uint8 in {0, 1}, nearest neighbour."""
    if not _inside(mask, box):
        return _reaching_out((mask != 0).astype(np.uint8), box, cv2.INTER_NEAREST)
    region = (mask[box.slices] != 0).astype(np.uint8)
    return cv2.resize(region, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_NEAREST)


def mask_background(crop: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``crop`` (3, 224, 224) with what lies outside ``mask`` (224, 224) black, as templates have it."""
    return np.where(mask[None] != 0, crop, BACKGROUND[:, None, None])


def crop_segment(
    rgb: np.ndarray, mask: np.ndarray, box: CropBox, blacken: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees of a segment: its input (3, 224, 224) and the mask (224, 224) in the crop.

    Args:
        rgb: (H, W, 3) uint8. mask: (H, W). box: of the crop.
        blacken: make what lies outside the mask black.
    """
    crop, inside = crop_rgb(rgb, box), crop_mask(mask, box)
    return (mask_background(crop, inside) if blacken else crop), inside


def _unproject(depth: np.ndarray, u: np.ndarray, v: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Depth (...) in metres at pixels u, v (...) -> camera-frame points (..., 3); (0, 0, 0) without depth."""
    depth = depth.astype(np.float64)
    x = (u - K[0, 2]) * depth / K[0, 0]
    y = (v - K[1, 2]) * depth / K[1, 1]
    return np.stack([x, y, depth], -1).astype(np.float32)


def crop_points_nearest(depth: np.ndarray, K: np.ndarray, box: CropBox) -> np.ndarray:
    """3D points of the 64x64 cells as the released network takes them (decode mode ``reference``).

    The cell (row j, column i) takes the pixel at its top-left corner, not its centre.

    Args:
        depth: (H, W) metres, 0 = background.
        K: (3, 3) intrinsics of the full image.
        box: the crop.

    Returns:
        (64, 64, 3) float32, camera frame, metres; (0, 0, 0) where there is no depth.
    """
    rows, cols = np.mgrid[box.top : box.top + box.side, box.left : box.left + box.side]
    points = _unproject(depth[box.slices], cols, rows, K)
    return cv2.resize(points, (GRID, GRID), interpolation=cv2.INTER_NEAREST)


def crop_points_consistent(depth: np.ndarray, K: np.ndarray, box: CropBox) -> np.ndarray:
    """3D points of the 64x64 cells as the training labels define them (decode mode ``subpixel``).

    The cell (row j, column i) stands for the crop pixel floor((i + .5) * 3.5), floor((j + .5) * 3.5); its
    depth is read at the pixel that holds that position and unprojected at the exact position.

    Args, returns: as :func:`crop_points_nearest`.
    """
    crop_px = np.floor((np.arange(GRID) + 0.5) * CELL)
    scale = CROP_SIZE / box.side
    u, v = np.meshgrid(crop_px / scale + box.left, crop_px / scale + box.top)
    return _unproject(depth[np.floor(v).astype(int), np.floor(u).astype(int)], u, v, K)
