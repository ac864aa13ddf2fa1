"""Covariances of poses, (6, 6) in ROS's order: x, y, z (m), then a rotation about fixed axes (rad).

The error that they describe is that of ``T_cam_obj``: the origin of the object is off by the first three, in
the camera's axes, and the true rotation is ``exp(w) R`` with w the last three, about the camera's axes.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.geometry.poses import rotation_vector


def pose_error(T_est: np.ndarray, T_true: np.ndarray) -> np.ndarray:
    """(..., 6) by how much poses (..., 4, 4) miss the true ones, in the order and axes of a covariance."""
    T_est, T_true = np.asarray(T_est, np.float64), np.asarray(T_true, np.float64)
    turn = T_true[..., :3, :3] @ np.swapaxes(T_est[..., :3, :3], -1, -2)
    if turn.ndim == 2:
        return np.concatenate([T_true[:3, 3] - T_est[:3, 3], rotation_vector(turn)])
    spin = Rotation.from_matrix(turn.reshape(-1, 3, 3)).as_rotvec().reshape(*turn.shape[:-2], 3)
    return np.concatenate([T_true[..., :3, 3] - T_est[..., :3, 3], spin], -1)


def move_covariance(covariance: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """Covariance (6, 6) of the same pose for another point as its origin.

    Args:
        covariance: (6, 6) of the pose of the old origin.
        arm: (3,) new origin minus old one, in the axes of the covariance.
    """
    x, y, z = np.asarray(arm, np.float64)
    move = np.eye(6)
    move[:3, 3:] = [[0, z, -y], [-z, 0, x], [y, -x, 0]]  # w x arm
    return move @ covariance @ move.T


def rotate_covariance(covariance: np.ndarray, R_new_old: np.ndarray) -> np.ndarray:
    """Covariance (6, 6) in another frame's axes; its position does not matter."""
    turn = np.zeros((6, 6))
    turn[:3, :3] = turn[3:, 3:] = R_new_old
    return turn @ covariance @ turn.T


def ray_covariance(point: np.ndarray, across: float, along: float, rotation: float) -> np.ndarray:
    """Covariance (6, 6) of a pose whose origin is accurate in the image and inaccurate in depth.

    Args:
        point: (3,) the origin in the camera's frame, m.
        across: standard deviation across the ray to it, m. along: along the ray, as a share of the distance.
        rotation: standard deviation about every axis, rad.
    """
    point = np.asarray(point, np.float64)
    depth = np.outer(point, point)
    covariance = np.diag([0.0, 0.0, 0.0] + 3 * [rotation**2])
    covariance[:3, :3] = across**2 * (np.eye(3) - depth / (point @ point)) + along**2 * depth
    return covariance
