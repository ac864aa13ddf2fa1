"""How far an object has moved in the image since the last one: found by its look, before anything is refined.

A step of refinement bridges a share of the object's size; a hand that moves fast goes further between two
images. The object's pixels of the last image are looked for around the predicted place by normalised
cross-correlation, on small images.
"""

from __future__ import annotations

import cv2
import numpy as np

from picopose_ros.geometry.crops import extent_of

_SIDE = 40
"""Pixels of the longer side of the small images of the object."""

_BELIEVED = ((0.6, 0.05), (0.4, 0.25))
"""Correlations that are believed: the least, and how much better than at the predicted place it must be."""

_LEAST_CONTRAST = 8
"""Grey levels between the darkest and the brightest pixel, below which there is nothing to correlate."""

_LEAST_PX = 64
"""Pixels of the object in the small image, the same."""


def find_shift(
    before: np.ndarray, after: np.ndarray, mask: np.ndarray, ahead: np.ndarray, reach: float = 1.0
) -> np.ndarray | None:
    """Where what a mask shows in one image has gone in the next one.

    Args:
        before, after: (H, W, 3) uint8. mask: (H, W) bool in the first.
        ahead: (2,) px by which it is predicted to move.
        reach: how far from there it is looked for, in longer sides of the mask.

    Returns:
        (2,) px by which it moved further than that; None where that is not clear, or it didn't.
    """
    extent = extent_of(mask)
    if extent is None:
        return None
    (left, top), (right, bottom) = extent
    longest = max(bottom - top, right - left)
    scale = min(_SIDE / longest, 1.0)
    small = _small(before, left, top, right - left, bottom - top, scale)
    inside = cv2.resize(
        mask[top:bottom, left:right].astype(np.float32), small.shape[::-1], interpolation=cv2.INTER_AREA
    )
    inside = (inside > 0.9).astype(np.float32)
    if inside.sum() < _LEAST_PX:
        return None
    margin = int(np.ceil(reach * longest * scale))
    x, y = np.round(np.array([left, top]) + ahead) - margin / scale
    width, height = np.array(small.shape[::-1]) + 2 * margin
    around = _small(after, x, y, width / scale, height / scale, scale)
    if np.ptp(small[inside > 0]) < _LEAST_CONTRAST:
        return None
    score = cv2.matchTemplate(around, small, cv2.TM_CCOEFF_NORMED, mask=inside)
    score[~np.isfinite(score) | (np.abs(score) > 1.001)] = -1.0
    row, column = np.unravel_index(score.argmax(), score.shape)
    centre = np.array(score.shape) // 2
    near = score[centre[0] - 1 : centre[0] + 2, centre[1] - 1 : centre[1] + 2].max()
    if not any(score[row, column] >= max(least, near + better) for least, better in _BELIEVED):
        return None
    return np.array([column - centre[1], row - centre[0]]) / scale


def _small(rgb: np.ndarray, x: float, y: float, width: float, height: float, scale: float) -> np.ndarray:
    """A part of an image in grey, smaller; what is outside the image continues its border."""
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    M = np.array([[1 / scale, 0, x + 0.5 / scale - 0.5], [0, 1 / scale, y + 0.5 / scale - 0.5]])
    blurred = rgb if scale > 0.5 else cv2.blur(rgb, (max(round(0.7 / scale), 1),) * 2)
    warped = cv2.warpAffine(
        blurred, M, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    return cv2.cvtColor(warped, cv2.COLOR_RGB2GRAY).astype(np.float32)
