"""Errors of a pose against the true one. Transforms are (4, 4) object -> camera, metres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree


def transform_points(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (n, 3) moved by ``T`` (4, 4)."""
    return points @ T[:3, :3].T + T[:3, 3]


def rotation_error_deg(
    estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray | None = None
) -> float:
    """Angle between two poses in degrees; the smallest one over symmetries (S, 4, 4)."""
    candidates = truth[None] if symmetries is None else truth @ symmetries
    traces = np.einsum("ij,sij->s", estimate[:3, :3], candidates[:, :3, :3])
    return float(np.rad2deg(np.arccos(np.clip((traces.max() - 1) / 2, -1, 1))))


def translation_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Distance between the two object origins in metres."""
    return float(np.linalg.norm(estimate[:3, 3] - truth[:3, 3]))


def add(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray) -> float:
    """ADD (Hinterstoisser 2012): mean distance of the object's points (n, 3) to their true place, metres."""
    gaps = transform_points(estimate, points) - transform_points(truth, points)
    return float(np.linalg.norm(gaps, axis=1).mean())


def add_s(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray) -> float:
    """ADD-S: mean distance of the truly placed points to the nearest estimated one, metres."""
    return float(cKDTree(transform_points(estimate, points)).query(transform_points(truth, points))[0].mean())


def add_or_add_s(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray, symmetric: bool) -> float:
    """ADD(-S): ADD-S for objects flagged symmetric, ADD for the others, metres."""
    return (add_s if symmetric else add)(points, estimate, truth)


def mssd(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray) -> float:
    """Largest symmetry-aware surface distance (BOP 2019), metres; ``symmetries`` (S, 4, 4) with identity."""
    moved = transform_points(estimate, points)
    return min(
        float(np.linalg.norm(moved - transform_points(truth @ s, points), axis=1).max()) for s in symmetries
    )


def mspd(
    points: np.ndarray, estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray, K: np.ndarray
) -> float:
    """Maximum symmetry-aware projection distance (BOP 2019) in pixels of a camera ``K`` (3, 3).

    Infinite where a point of the estimate lies behind the camera.
    """

    def project(T: np.ndarray) -> np.ndarray:
        seen = transform_points(T, points) @ K.T
        return seen[:, :2] / seen[:, 2:]

    if transform_points(estimate, points)[:, 2].min() <= 0:
        return float("inf")
    seen = project(estimate)
    return min(float(np.linalg.norm(seen - project(truth @ s), axis=1).max()) for s in symmetries)


def match_by_position(estimates: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[int | None]:
    """For every true pose of a class the index of the estimate nearest to it, each used once, or None.

    The assignment has the smallest sum of distances between origins, so it is the fairest one that looks
    only at positions. Estimates in excess stay unmatched.
    """
    if not len(estimates) or not len(truths):
        return [None] * len(truths)
    distance = np.linalg.norm(
        np.array([T[:3, 3] for T in truths])[:, None] - np.array([T[:3, 3] for T in estimates])[None], axis=-1
    )
    matched: list[int | None] = [None] * len(truths)
    for truth, estimate in zip(*linear_sum_assignment(distance), strict=True):
        matched[truth] = int(estimate)
    return matched


@dataclass(frozen=True)
class PoseErrors:
    """How far a pose is off."""

    rotation_deg: float
    translation: float  # metres
    add: float  # ADD or, for symmetric objects, ADD-S, metres
    diameter: float  # of the object, metres

    @property
    def correct(self) -> bool:
        """ADD(-S) below a tenth of the diameter."""
        return self.add < 0.1 * self.diameter


def pose_errors(
    points: np.ndarray,
    diameter: float,
    estimate: np.ndarray,
    truth: np.ndarray,
    symmetries: np.ndarray | None = None,
) -> PoseErrors:
    """All errors of one pose.

    Args:
        points: (n, 3) of the object's surface, its own frame, metres.
        diameter: of the object, metres.
        estimate, truth: T_cam_obj (4, 4).
        symmetries: (S, 4, 4) motions that leave the object as it is, identity included; more than one flag it
            symmetric, which means ADD-S instead of ADD.
    """
    symmetric = symmetries is not None and len(symmetries) > 1
    return PoseErrors(
        rotation_error_deg(estimate, truth, symmetries),
        translation_error(estimate, truth),
        add_or_add_s(points, estimate, truth, symmetric),
        diameter,
    )
