"""Labels of a pair of a query and a template that follow from their poses."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.model.config import CELL


def pose_affine(
    T_cam_ctr_q: np.ndarray,
    K_q: np.ndarray,
    M_crop_img_q: np.ndarray,
    T_cam_ctr_t: np.ndarray,
    K_t: np.ndarray,
    M_crop_img_t: np.ndarray,
) -> tuple[np.ndarray, float, float]:
    """Stage 2's label of the paper: the affine that the relative pose of query and template implies.

    Args:
        T_cam_ctr_q, T_cam_ctr_t: (4, 4) poses of the same object frame, metres. K_q, K_t: (3, 3) cameras.
        M_crop_img_q, M_crop_img_t: (3, 3) full image -> crop px, uniform scale. Suffix q: query, t: template.
    Returns:
        tau (2,) in units of 14 crop px; scale; angle in radians: the first of the extrinsic z-x-y angles of
        the relative rotation.
    """
    centres = []
    for T, K, M in ((T_cam_ctr_q, K_q, M_crop_img_q), (T_cam_ctr_t, K_t, M_crop_img_t)):
        centres.append((np.asarray(M, np.float64) @ K @ (T[:3, 3] / T[2, 3]))[:2])
    zoom = (M_crop_img_q[0, 0] * K_q[0, 0]) / (M_crop_img_t[0, 0] * K_t[0, 0])
    turn = np.asarray(T_cam_ctr_q, np.float64)[:3, :3] @ np.asarray(T_cam_ctr_t, np.float64)[:3, :3].T
    angle = Rotation.from_matrix(turn).as_euler("zxy")[0]
    return (centres[0] - centres[1]) / CELL, float(T_cam_ctr_t[2, 3] / T_cam_ctr_q[2, 3] * zoom), float(angle)
