"""The contour of a rendered object, and where the object ends in a mask or in an image along its normals."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

_BLUR_PX = 1.0
"""Of a mask, before its edge is read: evens the steps of its pixels out."""


@dataclass(frozen=True)
class Contour:
    """Points of an occluding contour.

    Attributes:
        uv: (n, 2) px of the view it was found in, between the pixels inside and outside.
        normal: (n, 2) unit vectors out of the object.
        xyz: (n, 3) camera frame of that view, m: the surface beside the edge, moved onto the edge.
    """

    uv: np.ndarray
    normal: np.ndarray
    xyz: np.ndarray

    def __len__(self) -> int:
        return len(self.uv)


def find_contour(depth: np.ndarray, K: np.ndarray, count: int) -> Contour:
    """The outline and the holes of a rendered object, evenly thinned out to about ``count`` points.

    Args:
        depth: (H, W) m, 0 off the object. K: (3, 3).
    """
    mask = (depth > 0).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return Contour(np.empty((0, 2)), np.empty((0, 2)), np.empty((0, 3)))
    # A hole's outline runs through the pixels of the object around it, as the outer one does.
    pixels = np.concatenate([one[:, 0] for one in outlines])
    step = max(len(pixels) / count, 1.0)
    pixels = pixels[(np.arange(int(len(pixels) / step)) * step).astype(int)]
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), _BLUR_PX)
    x, y = pixels.T
    height, width = depth.shape
    inside = (x > 0) & (y > 0) & (x < width - 1) & (y < height - 1)
    x, y = x[inside], y[inside]
    gradient = np.stack([soft[y, x + 1] - soft[y, x - 1], soft[y + 1, x] - soft[y - 1, x]], 1) / 2
    slope = np.linalg.norm(gradient, axis=1)
    good = slope > 0.05
    x, y, gradient, slope = x[good], y[good], gradient[good], slope[good]
    normal = -gradient / slope[:, None]
    out = np.clip((soft[y, x] - 0.5) / slope, 0.0, 1.5)
    uv = np.stack([x, y], 1) + out[:, None] * normal
    z = depth[y, x].astype(np.float64)
    xyz = np.stack([(uv[:, 0] - K[0, 2]) / K[0, 0] * z, (uv[:, 1] - K[1, 2]) / K[1, 1] * z, z], 1)
    return Contour(uv, normal.astype(np.float64), xyz)


def signed_distance(mask: np.ndarray, margin: int = 10**6) -> np.ndarray:
    """(H, W) float32 px from the edge of a mask (H, W), negative inside it.

    Args:
        margin: further out than so many px from the mask's bounding box it is only known to be outside.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    whole = np.full(mask.shape, np.float32(margin))
    if not len(rows):
        return whole
    part = tuple(slice(max(i[0] - margin, 0), i[-1] + margin + 1) for i in (rows, columns))
    inside = (mask[part] != 0).astype(np.uint8)
    # Nothing is known beyond the image: its border is no edge.
    outward = cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    inward = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    whole[part] = np.where(inside > 0, 0.5 - inward, outward - 0.5)
    return whole


def sample_lines(image: np.ndarray, origin: np.ndarray, normal: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values (n, s) or (n, s, channels) of an image at ``at`` (s,) px along lines; its border repeated."""
    x = (origin[:, :1] + normal[:, :1] * at).astype(np.float32)
    y = (origin[:, 1:] + normal[:, 1:] * at).astype(np.float32)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def mask_edges(
    distance: np.ndarray, origin: np.ndarray, normal: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where lines leave a mask.

    Args:
        distance: (H, W) `signed_distance` of the mask. origin, normal: (n, 2) lines.
        reach: px to either side of their origins.
    Returns:
        (n,) px along the lines of the crossing nearest to the origin, NaN where there is none; and (n,) the
        cosine between line and the mask's own normal there.
    """
    at = np.arange(-np.ceil(reach), np.ceil(reach) + 1)
    values = sample_lines(distance, origin, normal, at)
    crosses = (values[:, :-1] <= 0) & (values[:, 1:] > 0)
    fraction = -values[:, :-1] / np.where(crosses, values[:, 1:] - values[:, :-1], 1.0)
    place = np.where(crosses, at[:-1] + fraction, np.inf)
    nearest = np.abs(place).argmin(1)
    offset = place[np.arange(len(place)), nearest]
    offset[~np.isfinite(offset) | (np.abs(offset) > reach)] = np.nan
    foot = np.nan_to_num(origin + normal * np.nan_to_num(offset)[:, None])[:, None]
    across = [
        sample_lines(distance, foot[:, 0] + np.array(d), normal, np.zeros(1))[:, 0]
        for d in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    own = np.stack([across[0] - across[1], across[2] - across[3]], 1)
    cosine = (own * normal).sum(1) / np.maximum(np.linalg.norm(own, axis=1), 1e-6)
    return offset, cosine


def contour_lines(
    contour: Contour, T_view_obj: np.ndarray, T_cam_obj: np.ndarray, K_view: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A view's contour as lines in an image: their origins (n, 2) px and outward unit normals (n, 2).

    Args:
        contour: ``uv``, ``normal`` in the view, ``xyz`` in the object's frame.
        T_view_obj, T_cam_obj: (4, 4) poses in the view and in the image.
        K_view, K: (3, 3) intrinsics of the two.
    """
    point = contour.xyz @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]
    z = point[:, 2:]
    uv = point[:, :2] / z * [K[0, 0], K[1, 1]] + K[:2, 2]
    aside = np.concatenate([contour.normal / [K_view[0, 0], K_view[1, 1]], np.zeros((len(uv), 1))], 1)
    aside = aside @ (T_cam_obj[:3, :3] @ T_view_obj[:3, :3].T).T
    along = (aside[:, :2] * z - point[:, :2] * aside[:, 2:]) * [K[0, 0], K[1, 1]]
    with np.errstate(all="ignore"):
        return uv, along / np.linalg.norm(along, axis=1, keepdims=True)
