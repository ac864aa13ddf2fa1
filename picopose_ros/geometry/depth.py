"""What a depth image says of an object's pose: its points against the surface that a rendering shows."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from picopose_ros.geometry.least_squares import Surface

_NOISE_M, _NOISE_PER_M2 = 0.001, 0.002
"""Standard deviation of a stereo camera's depth: the first, and the second times the squared distance, m."""
_BIAS = 0.002
"""Standard deviation of an error that all depths share (calibration, registration), as a share of them."""
_TOGETHER = 10.0
"""Depths that count as one: a stereo camera's errors are alike over several pixels."""
_GATE = 0.03
"""Depths further from the surface than this share of the distance, or a fifth of the object, are not its."""
_STEEPEST = 0.3
"""Least cosine between the surface's normal and the ray to it: seen more from the side, depth is vague."""
_FLYING = 0.02
"""Where neighbouring depths differ by more than this share of them, they are of no surface: flying pixels."""
_LEAST_POINTS = 30
_LEAST_AGREEING = 0.25
"""Share of the depths on the object that are near its surface, below which the depth image isn't believed."""


@dataclass(frozen=True)
class Patches:
    """Places on the surface that a view shows.

    Attributes:
        xyz: (n, 3) object frame, m. normals: (n, 3) unit vectors, object frame, towards the camera.
    """

    xyz: np.ndarray
    normals: np.ndarray


def surface_patches(points: np.ndarray, T_view_obj: np.ndarray) -> Patches:
    """The surface of a view from its grid of points (g, g, 3), m, view's camera frame, 0 off the object."""
    here = points[1:-1, 1:-1].astype(np.float64)
    right, left = points[1:-1, 2:].astype(np.float64), points[1:-1, :-2].astype(np.float64)
    below, above = points[2:, 1:-1].astype(np.float64), points[:-2, 1:-1].astype(np.float64)
    normal = np.cross(below - above, right - left)
    length = np.linalg.norm(normal, axis=2)
    known = (length > 0) & (here[..., 2] > 0)
    for side in (right, left, below, above):
        known &= side[..., 2] > 0
    # Where the surface jumps, the neighbours are not on one plane.
    bend = np.abs(right + left - 2 * here)[..., 2] + np.abs(below + above - 2 * here)[..., 2]
    known &= bend < 0.5 * (np.linalg.norm(right - left, axis=2) + np.linalg.norm(below - above, axis=2))
    normal = normal[known] / length[known][:, None]
    point = here[known]
    ray = point / np.linalg.norm(point, axis=1, keepdims=True)
    facing = (normal * ray).sum(1)
    normal = np.where(facing[:, None] > 0, -normal, normal)
    good = np.abs(facing) > _STEEPEST
    R, t = T_view_obj[:3, :3], T_view_obj[:3, 3]
    return Patches((point[good] - t) @ R, normal[good] @ R)


def reliable_depth(depth: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """(H, W) float32 m: a depth image without what no surface is measured by, 0 there.

    Args:
        depth: (H, W) m; 0, NaN or infinity where the sensor saw nothing.
        mask: (H, W) bool, the object's visible pixels; None: unknown.
    """
    depth = np.nan_to_num(np.asarray(depth, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    kernel = np.ones((3, 3), np.uint8)
    flying = cv2.dilate(depth, kernel) - cv2.erode(depth, kernel) > _FLYING * depth
    good = (depth > 0) & ~flying
    if mask is not None:
        good &= cv2.erode(mask.astype(np.uint8), kernel) > 0
    return np.where(good, depth, np.float32(0))


def depth_term(
    depth: np.ndarray, patches: Patches, T_cam_obj: np.ndarray, K: np.ndarray, cutoff: float
) -> Surface | str | None:
    """The depths near an object's surface at a pose.

    Args:
        depth: (H, W) of `reliable_depth`. patches: of the surface. T_cam_obj: (4, 4). K: (3, 3).
        cutoff: of the term's kernel.

    Returns:
        The term; None where there is hardly any depth on the object; or why the depth isn't believed.
    """
    R, t = T_cam_obj[:3, :3], T_cam_obj[:3, 3]
    point = patches.xyz @ R.T + t
    z = point[:, 2]
    height, width = depth.shape
    with np.errstate(all="ignore"):
        uv = np.rint(point[:, :2] / point[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2])
        inside = (z > 0) & (uv >= 0).all(1) & (uv < [width, height]).all(1)
    u, v = np.where(inside[:, None], uv, 0).astype(int).T
    seen = np.where(inside, depth[v, u], 0.0).astype(np.float64)
    measured = seen > 0
    if measured.sum() < _LEAST_POINTS:
        return None
    size = float(np.linalg.norm(np.ptp(patches.xyz, axis=0)))
    near = measured & (np.abs(seen - z) < max(_GATE * np.median(z), size / 5))
    if near.sum() < max(_LEAST_AGREEING * measured.sum(), _LEAST_POINTS):
        ratio = float(np.median(seen[measured] / z[measured]))
        return (
            f"the depth image is not used: it shows something {ratio:.3g} times as far as the object; it "
            "must be registered to the colour image, and in millimetres (16UC1) or metres (32FC1)"
        )
    u, v, seen = u[near], v[near], seen[near]
    where = np.stack([(u - K[0, 2]) / K[0, 0] * seen, (v - K[1, 2]) / K[1, 1] * seen, seen], 1)
    return Surface(
        measured=where,
        xyz=patches.xyz[near],
        normals=patches.normals[near],
        sigma=_NOISE_M + _NOISE_PER_M2 * seen**2,
        together=_TOGETHER,
        cutoff=cutoff,
        depth_sigma=_BIAS * float(np.median(seen)),
    )
