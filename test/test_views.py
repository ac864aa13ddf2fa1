"""Several views of a still object: their pose is better than one view's, and what moved is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from picopose_ros.estimation.results import ObjectPose
from picopose_ros.estimation.views import Views
from picopose_ros.geometry.least_squares import Reprojections, Term, moved, solve
from picopose_ros.geometry.poses import invert_transform, make_transform

K = np.array([[600.0, 0, 320.0], [0, 600.0, 240.0], [0, 0, 1]])
POINTS = np.random.default_rng(0).uniform(-0.05, 0.05, (120, 3))
T_FIXED_OBJ = make_transform(Rotation.from_rotvec([0.3, -0.4, 0.2]).as_matrix(), [0.4, 0.1, 0.2])


def _camera(degrees: float) -> np.ndarray:
    """T_fixed_cam of a camera that looks at the object from 0.8 m, so far round about it."""
    turn = Rotation.from_rotvec([0, np.radians(degrees), 0]).as_matrix()
    return make_transform(turn, T_FIXED_OBJ[:3, 3]) @ make_transform(np.eye(3), [0, 0, -0.8])


def _view(
    T_fixed_cam: np.ndarray, rng: np.random.Generator, T_fixed_obj: np.ndarray = T_FIXED_OBJ
) -> ObjectPose:
    """A pose from pairs whose size is off by 2 %, as a flow's is, and by noise."""
    T = invert_transform(T_fixed_cam) @ T_fixed_obj
    camera = POINTS @ T[:3, :3].T + T[:3, 3]
    uv = camera[:, :2] / camera[:, 2:] * 600 + [320, 240]
    middle = uv.mean(0)
    uv = middle + (uv - middle) * (1 + 0.02 * rng.normal()) + rng.normal(scale=0.3, size=2)
    uv = uv + rng.normal(scale=0.7, size=uv.shape)
    terms: Mapping[str, Term] = {"pairs": Reprojections(uv, POINTS, K, 0.7, together=20.0, scale_sigma=0.02)}
    found = solve(T, terms)
    assert found is not None
    return ObjectPose(
        "brick", found.T_cam_obj, 0.9, found.covariance, "offsets", 0, 1.0, 0, 99, 0.9, 0.8,
        np.zeros(3), np.full(3, 0.1), 2, terms,
    )  # fmt: skip


def _depth_error(pose: ObjectPose, T_fixed_cam: np.ndarray) -> float:
    return abs(pose.T_cam_obj[2, 3] / (invert_transform(T_fixed_cam) @ T_FIXED_OBJ)[2, 3] - 1)


def test_five_views_halve_the_error_of_the_depth_and_more() -> None:
    alone, fused, sigma = [], [], []
    for seed in range(12):
        rng, views = np.random.default_rng(seed), Views(5)
        for degrees in (-30, -15, 0, 15, 30):
            T = _camera(degrees)
            # TF is off by a millimetre, too.
            said = T @ make_transform(np.eye(3), rng.normal(scale=0.001, size=3))
            pose = _view(T, rng)
            (last,) = views.fuse([pose], said).poses
        alone.append(_depth_error(pose, T))
        fused.append(_depth_error(last, T))
        sigma.append(np.sqrt(last.covariance[2, 2] / pose.covariance[2, 2]))
    assert np.median(fused) < 0.4 * np.median(alone)
    assert max(sigma) < 1.0


def test_a_view_from_the_same_place_takes_the_place_of_the_one_before() -> None:
    rng, views = np.random.default_rng(0), Views(5)
    for _ in range(8):
        pose = _view(_camera(0), rng)
        (last,) = views.fuse([pose], _camera(0)).poses
    assert len(views._objects) == 1 and len(views._objects[0].views) == 1
    for degrees in range(10, 100, 10):
        views.fuse([_view(_camera(degrees), rng)], _camera(degrees))
    assert len(views._objects[0].views) == 5


@pytest.mark.parametrize("what", ["object", "transform"])
def test_an_object_that_moved_and_a_wrong_transform_are_said_and_begin_anew(what: str) -> None:
    rng, views = np.random.default_rng(1), Views(5)
    for degrees in (-20, 0, 20):
        views.fuse([_view(_camera(degrees), rng)], _camera(degrees))
    T_fixed_obj, T = T_FIXED_OBJ, _camera(35)
    said = T
    if what == "object":
        T_fixed_obj = make_transform(T_FIXED_OBJ[:3, :3], T_FIXED_OBJ[:3, 3] + [0, 0.03, 0])
    else:
        said = T @ make_transform(np.eye(3), [0.0, 0.02, 0.0])
    pose = _view(T, rng, T_fixed_obj)
    result = views.fuse([pose], said)
    assert [position for position, _ in result.remarks] == [0]
    assert "3 of 3 views" in result.remarks[0][1] and "it moved, or TF" in result.remarks[0][1]
    np.testing.assert_allclose(result.poses[0].T_cam_obj, pose.T_cam_obj)
    # From here on it is where it is now.
    again = views.fuse([_view(_camera(50), rng, T_fixed_obj)], _camera(50))
    assert (again.remarks == []) == (what == "object")


def test_two_objects_of_a_class_are_not_mixed_and_unrefined_poses_stay() -> None:
    rng, views = np.random.default_rng(2), Views(4)
    other = make_transform(T_FIXED_OBJ[:3, :3], T_FIXED_OBJ[:3, 3] + [0.25, 0, 0])
    for degrees in (-15, 0, 15):
        T = _camera(degrees)
        both: list[Any] = [_view(T, rng, other), _view(T, rng)]
        if degrees == 0:
            both.reverse()
        result = views.fuse(both, T)
        assert result.remarks == []
    assert [len(one.views) for one in views._objects] == [3, 3]
    bare = ObjectPose(
        "brick", moved(both[0].T_cam_obj, np.zeros(6)), 0.9, np.eye(6), "offsets", 0, 1.0, 0, 9, 0.9, 0.8,
        np.zeros(3), np.full(3, 0.1),
    )  # fmt: skip
    assert views.fuse([bare], _camera(0)).poses[0] is bare
    views.clear()
    assert views.fuse([both[0]], T).poses[0] is both[0]
