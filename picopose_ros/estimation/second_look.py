"""An option: stage 3 once more for the best pose, from the template whose view is nearest to that pose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from picopose_ros.estimation.choosing import MIN_INLIERS, best_solved
from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.results import Choice
from picopose_ros.estimation.settings import EstimatorSettings
from picopose_ros.estimation.solving import SolvedHypothesis
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import fit_similarity
from picopose_ros.geometry.crops import CROP_SIZE


def second_looks(
    queries: Sequence[Query],
    solved: Sequence[Sequence[SolvedHypothesis]],
    camera: CameraModel,
    settings: EstimatorSettings,
    trace: bool,
) -> tuple[list[Choice], list[np.ndarray], list[tuple[int, int]]]:
    """What stage 3 is run for once more.

    Args:
        queries: the segments.
        solved: per query its hypotheses.
        camera: of the image.
        settings: of the estimator.
        trace: also for what would be best among the first k hypotheses.

    Returns:
        The choices, their affines (3, 3), and of each the query and the hypothesis that it starts from.
    """
    chosen: list[Choice] = []
    affines: list[np.ndarray] = []
    origins: list[tuple[int, int]] = []
    for row, (query, own) in enumerate(zip(queries, solved)):
        counts = range(1, len(own) + 1) if trace else (len(own),)
        for index in sorted({best_solved(own[:k], settings) for k in counts} - {None}):
            one = own[index]
            nearest = _nearest_template(query, one.solution.T_cam_obj, camera)
            if nearest is not None:
                chosen.append(Choice(row, nearest[0], one.hypothesis.match_score))
                affines.append(nearest[1])
                origins.append((row, index))
    return chosen, affines, origins


def with_second_look(
    solved: Sequence[SolvedHypothesis], again: Mapping[int, SolvedHypothesis], settings: EstimatorSettings
) -> list[SolvedHypothesis]:
    """The hypotheses, and the second look at the best of them if there was one.

    Args:
        again: second looks by the hypothesis that they started from.
    """
    best = best_solved(solved, settings) if again else None
    return [*solved, again[best]] if best in again else list(solved)


def _nearest_template(
    query: Query, T_cam_obj: np.ndarray, camera: CameraModel
) -> tuple[int, np.ndarray] | None:
    """The template whose view is nearest to a pose's, and the affine (3, 3) from its crop to the query's.

    None where the pose puts the object behind the camera.
    """
    bank = query.bank
    T_cam_ctr = T_cam_obj @ np.linalg.inv(bank.T_ctr_obj)
    rotations, shifts = bank.T_cam_ctr[:, :3, :3], bank.T_cam_ctr[:, :3, 3]
    cameras = -np.einsum("nji,nj->ni", rotations, shifts)  # camera centres in the object's frame
    wanted = -T_cam_ctr[:3, :3].T @ T_cam_ctr[:3, 3]
    cosines = cameras @ wanted / np.linalg.norm(cameras, axis=1)
    template = int(cosines.argmax())
    points = bank.points_consistent[template]
    inside = points[..., 2] > 0
    T = T_cam_ctr @ np.linalg.inv(bank.T_cam_ctr[template].astype(np.float64))
    moved = points[inside].astype(np.float64) @ T[:3, :3].T + T[:3, 3]
    if len(moved) < MIN_INLIERS or moved[:, 2].min() <= 0:
        return None
    target = camera.project(moved) @ query.M_crop_img[:2, :2].T + query.M_crop_img[:2, 2]
    row, column = np.nonzero(inside)
    cell = CROP_SIZE / points.shape[0]
    source = np.floor((np.stack([column, row], 1) + 0.5) * cell)
    return template, fit_similarity(source, target)
