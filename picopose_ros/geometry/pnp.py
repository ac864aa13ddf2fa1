"""Pose and covariance from 2D-3D pairs with outliers (PnP with RANSAC)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from picopose_ros.geometry.correspondences import Correspondences
from picopose_ros.geometry.least_squares import projected
from picopose_ros.geometry.poses import make_transform

_MIN_PAIRS = 4
_DRAWN_FROM = 600
_REFINE_ROUNDS = 5
_LM_STEPS = 20
_SETTLED = 1e-7
"""A step that lessens the sum of squares by no more than this share ends the least squares."""


@dataclass(frozen=True)
class PoseSolution:
    """A pose that pairs agree on.

    Attributes:
        T_cam_obj: (4, 4) object -> camera, metres.
        inliers: (k,) indices of the pairs within the threshold.
        inlier_ratio: k / number of pairs.
        covariance: (6, 6) of x, y, z (m) and the rotation about the camera's fixed x, y, z axes (rad), which
            is ROS's order; None without refinement.
    """

    T_cam_obj: np.ndarray
    inliers: np.ndarray
    inlier_ratio: float
    covariance: np.ndarray | None


def solve_pose(
    corr: Correspondences,
    K: np.ndarray,
    threshold: float = 2.0,
    iterations: int = 1000,
    refine: bool = True,
) -> PoseSolution | None:
    """PnP with RANSAC.

    Args:
        corr: pairs; image points of an undistorted camera. Rows with NaN are ignored.
        K: (3, 3) intrinsics.
        threshold: largest reprojection error of an inlier, px.
        iterations: most RANSAC draws.
        refine: False gives exactly the released network's call (EPnP on draws of five, no refinement of its
            own; there with 150 draws and 2 px). True draws three, which finds a pose among far more outliers
            in the same time, then polishes by least squares on the inliers and picks the inliers anew until
            they stay the same.

    Returns:
        The solution, or None where there is none: fewer than four pairs, no agreement, object behind the
            camera.
    """
    finite = np.flatnonzero(np.isfinite(corr.uv).all(1) & np.isfinite(corr.xyz).all(1))
    if len(finite) < _MIN_PAIRS:
        return None
    uv = np.ascontiguousarray(corr.uv[finite])
    xyz = np.ascontiguousarray(corr.xyz[finite])
    K = np.asarray(K, np.float64)
    draw = _draw_three if refine else _draw_five
    try:
        start = draw(uv, xyz, K, threshold, iterations)
    except cv2.error:  # degenerate draws end in an assertion inside OpenCV
        return None
    if start is None:
        return None
    pose, chosen = start
    covariance = None
    if refine:
        refined = _refine(pose, chosen, uv.astype(np.float64), xyz.astype(np.float64), K, threshold)
        if refined is None:
            return None
        pose, chosen, covariance = refined
    if not np.isfinite(pose).all():
        return None
    return PoseSolution(pose, finite[chosen], len(chosen) / len(finite), covariance)


def _draw_five(
    uv: np.ndarray, xyz: np.ndarray, K: np.ndarray, threshold: float, iterations: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The released network's RANSAC: (pose, inlier indices) or None; arguments as of :func:`solve_pose`.

    Raises:
        cv2.error: OpenCV met a degenerate draw.
    """
    found, rvec, tvec, inliers = cv2.solvePnPRansac(
        xyz, uv, K, None, iterationsCount=iterations, reprojectionError=threshold, flags=cv2.SOLVEPNP_EPNP
    )
    if not found or inliers is None or len(inliers) == 0:
        return None
    return make_transform(cv2.Rodrigues(rvec)[0], tvec), inliers.ravel()


def _draw_three(
    uv: np.ndarray, xyz: np.ndarray, K: np.ndarray, threshold: float, iterations: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """OpenCV's USAC with minimal draws from some of the pairs: (pose, indices of all inliers) or None.

    Raises:
        cv2.error: OpenCV met a degenerate draw.
    """
    params = cv2.UsacParams()
    params.confidence = 0.999
    params.isParallel = False
    params.loMethod = cv2.LOCAL_OPTIM_NULL  # least squares on the inliers follows anyway
    params.maxIterations = iterations
    params.neighborsSearch = cv2.NEIGH_GRID
    params.randomGeneratorState = 0
    params.sampler = cv2.SAMPLING_UNIFORM
    params.score = cv2.SCORE_METHOD_MSAC
    params.threshold = threshold
    some = slice(None)
    if len(uv) > _DRAWN_FROM:
        some = np.sort(np.random.default_rng(0).permutation(len(uv))[:_DRAWN_FROM])
    drawn_xyz, drawn_uv = (np.ascontiguousarray(a[some], np.float64) for a in (xyz, uv))
    found, _, rvec, tvec, _ = cv2.solvePnPRansac(drawn_xyz, drawn_uv, K.copy(), None, params=params)
    if not found or rvec is None or not np.isfinite(rvec).all() or not np.isfinite(tvec).all():
        return None
    pose = make_transform(cv2.Rodrigues(rvec)[0], tvec)
    return pose, _inliers(pose, uv, xyz, K, threshold)


def _residuals(
    pose: np.ndarray, uv: np.ndarray, xyz: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reprojection errors (n, 2) in px and camera-frame points (n, 3)."""
    camera = xyz @ pose[:3, :3].T + pose[:3, 3]
    with np.errstate(all="ignore"):
        projected = camera[:, :2] / camera[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]
    return projected - uv, camera


def _inliers(
    pose: np.ndarray, uv: np.ndarray, xyz: np.ndarray, K: np.ndarray, threshold: float
) -> np.ndarray:
    error, camera = _residuals(pose, uv, xyz, K)
    with np.errstate(all="ignore"):
        return np.flatnonzero((camera[:, 2] > 0) & ((error**2).sum(1) <= threshold**2))


def _levenberg_marquardt(pose: np.ndarray, uv: np.ndarray, xyz: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Least-squares pose of pairs without outliers, from a start in front of the camera."""
    damping = 1e-4
    seen, J = projected(xyz @ pose[:3, :3].T, pose[:3, 3], K)
    error = (seen - uv).ravel()
    cost = error @ error
    for _ in range(_LM_STEPS):
        flat = J.reshape(-1, 6)
        H, g = flat.T @ flat, flat.T @ error
        try:
            step = np.linalg.solve(H + damping * np.diag(np.diag(H)), -g)
        except np.linalg.LinAlgError:
            return pose
        trial = make_transform(cv2.Rodrigues(step[3:])[0] @ pose[:3, :3], pose[:3, 3] + step[:3])
        seen, trial_J = projected(xyz @ trial[:3, :3].T, trial[:3, 3], K)
        trial_error = (seen - uv).ravel()
        trial_cost = trial_error @ trial_error
        if trial_cost <= cost:  # never of a point behind the camera: that is not a number
            converged = cost - trial_cost <= _SETTLED * cost
            pose, J, error, cost = trial, trial_J, trial_error, trial_cost
            damping /= 10
            if converged:
                break
        else:
            damping *= 10
            if damping > 1e8:
                break
    return pose


def _refine(
    pose: np.ndarray, chosen: np.ndarray, uv: np.ndarray, xyz: np.ndarray, K: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Alternate least squares and inlier choice; (pose, inliers, covariance) or None."""
    for _ in range(_REFINE_ROUNDS):
        if len(chosen) < _MIN_PAIRS:
            return None
        pose = _levenberg_marquardt(pose, uv[chosen], xyz[chosen], K)
        again = _inliers(pose, uv, xyz, K, threshold)
        if np.array_equal(again, chosen):
            break
        chosen = again
    if len(chosen) < _MIN_PAIRS:
        return None
    return pose, chosen, pose_covariance(pose, uv[chosen], xyz[chosen], K)


def pose_covariance(pose: np.ndarray, uv: np.ndarray, xyz: np.ndarray, K: np.ndarray) -> np.ndarray | None:
    """Covariance of a least-squares pose from its normal equations, scaled by the residuals' variance.

    It takes the pairs' errors as independent.

    Args:
        pose: (4, 4) T_cam_obj at the minimum. uv: (n, 2) px. xyz: (n, 3) object frame, m. K: (3, 3).

    Returns:
        (6, 6): x, y, z in m, then the rotation about the camera's fixed axes through the object's origin in
        rad; None where the pairs don't fix the pose.
    """
    if 2 * len(uv) <= 6:
        return None
    seen, J = projected(xyz @ pose[:3, :3].T, pose[:3, 3], K)
    error, J = seen - uv, J.reshape(-1, 6)
    H = J.T @ J
    scale = np.sqrt(np.diag(H))
    if not (scale > 0).all():
        return None
    H = H / np.outer(scale, scale)  # metres and radians differ by orders of magnitude
    if np.linalg.cond(H) > 1e13:
        return None
    covariance = np.linalg.inv(H) / np.outer(scale, scale) * (error**2).sum() / (2 * len(uv) - 6)
    return (covariance + covariance.T) / 2
