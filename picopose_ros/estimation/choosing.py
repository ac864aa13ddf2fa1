"""The pose that is published for a segment: the best of its hypotheses, with confidence and covariance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from picopose_ros.estimation.confidence import Calibration
from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.results import Hypothesis, ObjectPose
from picopose_ros.estimation.settings import EstimatorSettings
from picopose_ros.estimation.solving import SolvedHypothesis, place_template
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.covariance import move_covariance, ray_covariance
from picopose_ros.geometry.pnp import PoseSolution, pose_covariance

# A pose from offsets needs this many inliers and this quality; else the affine's pose is the better guess.
MIN_INLIERS = 12
_MIN_QUALITY = 0.02

# Standard deviations of an affine's pose: it knows the view only as well as the nearest template does.
_AFFINE_SIGMA_CROP_PX = 10.0
_AFFINE_SIGMA_SCALE = 0.1
_AFFINE_SIGMA_RAD = np.radians(20.0)
_AFFINE_CONFIDENCE = 0.1


def best_solved(solved: Sequence[SolvedHypothesis], settings: EstimatorSettings) -> int | None:
    """Index of the best pose from offsets; None where none of them can be trusted."""
    reference = settings.decode == "reference"
    found = [i for i, one in enumerate(solved) if one.solution is not None]
    if not found:
        return None

    def value(index: int) -> float:
        return solved[index].solution.inlier_ratio if reference else solved[index].quality

    best = max(found, key=value)  # the first of equals: retrieval order, as in the released network
    enough = len(solved[best].solution.inliers) >= MIN_INLIERS and value(best) >= _MIN_QUALITY
    return best if reference or enough else None


def choose_pose(
    query: Query,
    solved: Sequence[SolvedHypothesis],
    camera: CameraModel,
    settings: EstimatorSettings,
    calibration: Calibration,
) -> ObjectPose | None:
    """The best hypothesis' pose: from offsets, else from an affine, else none.

    Args:
        query: the segment.
        solved: its hypotheses, best match first.
        camera: of the image.
        settings: of the estimator.
        calibration: from the quality of a pose from offsets to its confidence.
    """
    index = best_solved(solved, settings)
    if index is not None:
        best = solved[index]
        solution = best.solution
        covariance = solution.covariance
        if covariance is None:
            inliers = best.pairs.select(solution.inliers)
            covariance = pose_covariance(solution.T_cam_obj, inliers.uv, inliers.xyz, camera.K)
        if covariance is not None:
            # Flow errors are smooth over the grid: many pairs are few independent measurements.
            covariance = covariance * settings.correlated_pairs
            confidence = float(calibration.apply(best.quality))
            return _object_pose(query, best.hypothesis, solution.T_cam_obj, confidence, covariance, solution)
    return _pose_from_affine(query, [one.hypothesis for one in solved], camera)


def _pose_from_affine(
    query: Query, hypotheses: Sequence[Hypothesis], camera: CameraModel
) -> ObjectPose | None:
    """The pose that stage 2 alone implies, of the best matching template that gives one."""
    for hypothesis in hypotheses:
        T_cam_ctr = place_template(query, hypothesis.template, hypothesis.affine, camera)
        if T_cam_ctr is None:
            continue
        centre = T_cam_ctr[:3, 3]
        across = _AFFINE_SIGMA_CROP_PX / float(query.M_crop_img[0, 0]) * centre[2] / camera.K[0, 0]
        covariance = ray_covariance(centre, across, _AFFINE_SIGMA_SCALE, _AFFINE_SIGMA_RAD)
        confidence = _AFFINE_CONFIDENCE * float(np.clip(hypothesis.match_score, 0, 1))
        T_cam_obj = T_cam_ctr @ query.bank.T_ctr_obj
        # The affine places the centre; where the mesh's origin is depends on the rotation too.
        covariance = move_covariance(covariance, T_cam_obj[:3, 3] - centre)
        return _object_pose(query, hypothesis, T_cam_obj, confidence, covariance, None)
    return None


def _object_pose(
    query: Query,
    hypothesis: Hypothesis,
    T_cam_obj: np.ndarray,
    confidence: float,
    covariance: np.ndarray,
    solution: PoseSolution | None,
) -> ObjectPose:
    return ObjectPose(
        class_id=query.bank.class_id,
        T_cam_obj=T_cam_obj,
        confidence=float(np.clip(confidence, 0.0, 1.0)),
        covariance=covariance,
        source="affine" if solution is None else "offsets",
        segment=query.index,
        segment_score=float(query.segment.score),
        template=hypothesis.template,
        inliers=0 if solution is None else len(solution.inliers),
        inlier_ratio=0.0 if solution is None else float(solution.inlier_ratio),
        match_score=float(hypothesis.match_score),
        bbox_centre=np.asarray(query.bank.centre, np.float64),
        bbox_size=np.asarray(query.bank.extents, np.float64),
    )
