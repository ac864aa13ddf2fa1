"""From the network's output for one template to a pose: decode the offsets, PnP, and its quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.results import Hypothesis
from picopose_ros.estimation.settings import EstimatorSettings
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import Correspondences, decode_correspondences
from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.geometry.pnp import PoseSolution, solve_pose
from picopose_ros.geometry.poses import pose_from_affine

# The released network's PnP, which the decode mode "reference" reproduces.
_RELEASED_THRESHOLD_PX = 2.0
_RELEASED_ITERATIONS = 150

_PATCHES = 16


@dataclass(frozen=True)
class SolvedHypothesis:
    """A hypothesis after decode and PnP.

    Attributes:
        hypothesis: the network's output.
        pairs: its correspondences, undistorted.
        solution: PnP's pose; None where it found none.
        quality: of the solution, 0..1, see `hypothesis_quality`.
    """

    hypothesis: Hypothesis
    pairs: Correspondences
    solution: PoseSolution | None
    quality: float


def solve_hypothesis(
    query: Query, hypothesis: Hypothesis, camera: CameraModel, settings: EstimatorSettings
) -> SolvedHypothesis:
    """Decode a hypothesis and solve PnP."""
    if hypothesis.pruned:
        none = Correspondences(np.empty((0, 2)), np.empty((0, 3)), np.empty(0))
        return SolvedHypothesis(hypothesis, none, None, 0.0)
    seen = _decode(query, hypothesis, settings)
    pairs = Correspondences(camera.undistort_points(seen.uv), seen.xyz, seen.certainty)
    solution = _solve(pairs, camera, query.M_crop_img, settings)
    quality = 0.0
    if solution is not None:
        quality = hypothesis_quality(
            seen.uv[solution.inliers], solution.inlier_ratio, query.M_crop_img, query.mask
        )
    return SolvedHypothesis(hypothesis, pairs, solution, quality)


def _decode(query: Query, hypothesis: Hypothesis, settings: EstimatorSettings) -> Correspondences:
    """Pairs of full-image pixels (distorted) and points in the mesh's own frame."""
    bank, template, mode = query.bank, hypothesis.template, settings.decode
    points = bank.points_nearest if mode == "reference" else bank.points_consistent
    T_cam_obj = bank.T_cam_ctr[template] @ bank.T_ctr_obj
    return decode_correspondences(
        hypothesis.flow,
        hypothesis.certainty,
        query.M_crop_img,
        points[template],
        T_cam_obj,
        mode,
        query.mask,
    )


def _solve(
    pairs: Correspondences, camera: CameraModel, M_crop_img: np.ndarray, settings: EstimatorSettings
) -> PoseSolution | None:
    if settings.decode == "reference":
        return solve_pose(pairs, camera.K, _RELEASED_THRESHOLD_PX, _RELEASED_ITERATIONS, refine=False)
    threshold = settings.ransac_threshold_px / float(M_crop_img[0, 0])
    return solve_pose(pairs, camera.K, threshold, settings.ransac_iterations)


def hypothesis_quality(
    uv: np.ndarray, inlier_ratio: float, M_crop_img: np.ndarray, mask: np.ndarray
) -> float:
    """How well a pose explains a segment, 0..1: share of its patches with inliers, times the inlier ratio.

    A ratio alone is perfect for five pairs that agree by chance, and a count alone grows with wrong pairs;
    the share of the visible object that the inliers cover does neither, whatever the scale between template
    and crop.

    Args:
        uv: (k, 2) inliers, full-image px.
        inlier_ratio: k over the number of pairs.
        M_crop_img: (3, 3) full image -> crop.
        mask: (224, 224) the segment in the crop.
    """
    patch = CROP_SIZE // _PATCHES
    visible = mask.reshape(_PATCHES, patch, _PATCHES, patch).mean((1, 3)) >= 0.5
    if not visible.any():  # a thin segment: every patch it touches
        visible = mask.reshape(_PATCHES, patch, _PATCHES, patch).any((1, 3))
    x, y = ((uv @ M_crop_img[:2, :2].T + M_crop_img[:2, 2]) // patch).astype(int).clip(0, _PATCHES - 1).T
    reached = np.zeros_like(visible)
    reached[y, x] = True
    return float((reached & visible).sum() / visible.sum() * inlier_ratio)


def place_template(
    query: Query, template: int, affine: np.ndarray, camera: CameraModel
) -> np.ndarray | None:
    """The pose T_cam_ctr (4, 4) of a template that an affine (3, 3) turns and places in the query's crop.

    None where the affine implies no pose in front of the camera.
    """
    bank = query.bank
    try:
        T_cam_ctr = pose_from_affine(
            affine,
            query.M_crop_img,
            bank.M_crop_img[template],
            camera.K,
            bank.K,
            bank.T_cam_ctr[template],
        )
    except ValueError:
        return None
    if camera.distorted:
        uv = camera.K @ T_cam_ctr[:3, 3]
        straight = camera.undistort_points(uv[None, :2] / uv[2])[0]
        if not np.isfinite(straight).all():
            return None
        T_cam_ctr[:3, 3] = np.linalg.solve(camera.K, [*straight, 1.0]) * T_cam_ctr[2, 3]
    return T_cam_ctr if T_cam_ctr[2, 3] > 0 else None
