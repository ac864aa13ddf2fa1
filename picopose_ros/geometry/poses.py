"""Rigid transforms, and the pose that a 2D affine alone implies."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation


def make_transform(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) and translation (3,) -> transform (4, 4) float64."""
    T = np.eye(4)
    T[:3, :3] = R
    T[:3, 3] = np.asarray(t, np.float64).reshape(3)
    return T


def invert_transform(T: np.ndarray) -> np.ndarray:
    """Inverse of a rigid transform (4, 4)."""
    R = np.asarray(T, np.float64)[:3, :3].T
    return make_transform(R, -R @ np.asarray(T, np.float64)[:3, 3])


def rotation_angle_deg(Ra: np.ndarray, Rb: np.ndarray) -> float:
    """Angle of the rotation between two rotation matrices, degrees."""
    # The chord keeps precision for small angles, where the arc cosine of the trace has none.
    chord = np.linalg.norm(np.asarray(Ra, np.float64) - np.asarray(Rb, np.float64)) / np.sqrt(8.0)
    return float(np.degrees(2.0 * np.arcsin(min(chord, 1.0))))


def rotation_vector(R: np.ndarray) -> np.ndarray:
    """(3,) of one rotation (3, 3), in a tenth of the time that SciPy takes: it is asked for often."""
    twice = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    sine, cosine = 0.5 * math.sqrt(twice @ twice), 0.5 * (R[0, 0] + R[1, 1] + R[2, 2] - 1.0)
    if cosine < -0.9:  # near half a turn the axis isn't in the antisymmetric part
        return Rotation.from_matrix(R).as_rotvec()
    return twice * (0.5 * math.atan2(sine, cosine) / sine if sine > 1e-9 else 0.5)


def pose_from_affine(
    M: np.ndarray,
    M_crop_img_q: np.ndarray,
    M_crop_img_t: np.ndarray,
    K_q: np.ndarray,
    K_t: np.ndarray,
    T_cam_tpl: np.ndarray,
) -> np.ndarray:
    """Pose that the stage-2 affine implies: the template's pose turned in the image plane and moved.

    Exact in translation for the true affine; the rotation is off by the template's out-of-plane offset.

    Args:
        M: (3, 3) template crop px -> query crop px; rotation, uniform scale, translation.
        M_crop_img_q: (3, 3) full image -> query crop px, uniform scale.
        M_crop_img_t: (3, 3) the same of the template.
        K_q, K_t: (3, 3) intrinsics of the query's and the template's camera.
        T_cam_tpl: (4, 4) template pose; its translation is the point whose image the affine was regressed
            about.

    Returns:
        T_cam_obj (4, 4) float64 of the same object frame.

    Raises:
        ValueError: the affine has no scale, so that no depth follows from it.
    """
    M, M_q, M_t = (np.asarray(a, np.float64) for a in (M, M_crop_img_q, M_crop_img_t))
    K_q, K_t, T = (np.asarray(a, np.float64) for a in (K_q, K_t, T_cam_tpl))
    scale = np.hypot(M[0, 0], M[1, 0])
    A = np.linalg.inv(M_q) @ M @ M_t
    zoom = np.hypot(A[0, 0], A[1, 0])
    if not (np.isfinite(A).all() and scale > 1e-6):
        raise ValueError(f"the affine {M.tolist()} has no usable scale")
    turn = np.eye(3)
    # A negative scale output shows as a half turn here, as in the released network.
    turn[:2, :2] = M[:2, :2] / scale
    z = T[2, 3] / zoom * (K_q[0, 0] / K_t[0, 0])
    centre = K_t @ (T[:3, 3] / T[2, 3])
    ray = np.linalg.solve(K_q, A @ centre)
    return make_transform(turn @ T[:3, :3], z * ray / ray[2])
