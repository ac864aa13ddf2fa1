"""Covariances say how far poses are off: where the truth is known, for any origin, in any frame."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from picopose_ros.evaluation.consistency import consistency
from picopose_ros.geometry.correspondences import Correspondences
from picopose_ros.geometry.covariance import (
    move_covariance,
    pose_error,
    ray_covariance,
    rotate_covariance,
)
from picopose_ros.geometry.pnp import pose_covariance, solve_pose
from picopose_ros.geometry.poses import invert_transform, make_transform
from picopose_ros.templates.meshes import Symmetries

K = np.array([[600.0, 0, 320], [0, 610, 240], [0, 0, 1]])


def random_covariances(rng: np.random.Generator, count: int) -> np.ndarray:
    """Millimetres and hundredths of a radian, with correlations."""
    factors = (
        rng.normal(0, 12**-0.5, (count, 6, 12)) * np.array([1e-3, 1e-3, 4e-3, 0.01, 0.02, 0.03])[:, None]
    )
    return factors @ factors.transpose(0, 2, 1)


def random_poses(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.stack(
        [
            make_transform(R, t)
            for R, t in zip(
                Rotation.random(count, random_state=rng).as_matrix(),
                rng.normal(0, 0.2, (count, 3)) + [0, 0, 1],
                strict=True,
            )
        ]
    )


def moved(poses: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """True poses whose estimates were off by ``errors``: written out here once more, by hand."""
    result = poses.copy()
    result[:, :3, 3] += errors[:, :3]
    result[:, :3, :3] = Rotation.from_rotvec(errors[:, 3:]).as_matrix() @ poses[:, :3, :3]
    return result


def draws(rng: np.random.Generator, covariances: np.ndarray) -> np.ndarray:
    return np.stack([rng.multivariate_normal(np.zeros(6), one) for one in covariances])


# How consistency is measured.


@pytest.fixture(scope="module")
def honest() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates, covariances and true poses, as the covariances say."""
    rng = np.random.default_rng(1)
    covariances = random_covariances(rng, 4000)
    estimates = random_poses(rng, 4000)
    return estimates, covariances, moved(estimates, draws(rng, covariances))


def test_errors_are_those_that_were_made() -> None:
    rng = np.random.default_rng(2)
    poses, errors = random_poses(rng, 50), rng.normal(0, 0.1, (50, 6))
    np.testing.assert_allclose(pose_error(poses, moved(poses, errors)), errors, atol=1e-12)
    np.testing.assert_allclose(pose_error(poses[0], moved(poses, errors)[0]), errors[0], atol=1e-12)


def test_honest_covariances_are_found_honest(honest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    found = consistency(*honest)
    assert (found.count, found.gross) == (4000, 0)
    for share in (found.pose, found.position, found.rotation):
        assert share.inside == pytest.approx(0.95, abs=0.012)
        assert share.factor == pytest.approx(1.0, abs=0.06)
        assert share.factor_at_half == pytest.approx(1.0, abs=0.06)
    np.testing.assert_allclose(found.spread, 1.0, atol=0.06)
    np.testing.assert_allclose(found.bias, 0.0, atol=0.06)
    assert "of the errors inside the 95 % ellipsoid" in found.lines()[1]
    written = json.loads(json.dumps(found.as_dict()))
    assert written["pose"]["inside"] == found.pose.inside
    assert written["spread"]["rotation z"] == found.spread[5]


def test_the_factor_mends_what_is_too_small(honest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    estimates, covariances, truth = honest
    found = consistency(estimates, covariances / 9, truth)
    assert found.pose.inside < 0.2
    assert found.pose.factor == pytest.approx(9.0, rel=0.06)
    np.testing.assert_allclose(found.spread, 3.0, rtol=0.06)
    mended = consistency(estimates, covariances / 9 * found.pose.factor, truth)
    assert mended.pose.inside == pytest.approx(0.95, abs=0.001)


def test_position_and_rotation_are_told_apart(honest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    estimates, covariances, truth = honest
    small = covariances.copy()
    small[:, :3] /= 2
    small[:, :, :3] /= 2
    found = consistency(estimates, small, truth)
    assert found.position.factor == pytest.approx(4.0, rel=0.06)
    assert found.rotation.factor == pytest.approx(1.0, abs=0.06)


def test_a_systematic_error_and_outliers_show(honest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    estimates, covariances, truth = honest
    farther = truth.copy()
    farther[:, 2, 3] += 2 * np.sqrt(covariances[:, 2, 2])
    found = consistency(estimates, covariances, farther)
    assert found.bias[2] == pytest.approx(2.0, abs=0.1)
    np.testing.assert_allclose(found.bias[[0, 1, 3, 4, 5]], 0.0, atol=0.1)
    rng = np.random.default_rng(3)
    wild = moved(estimates, draws(rng, covariances) * np.where(rng.random((4000, 1)) < 0.1, 5, 1))
    found = consistency(estimates, covariances, wild)
    assert found.pose.factor > 3 * found.pose.factor_at_half


def test_upside_down_is_counted_apart(honest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    estimates, covariances, truth = (part[:100] for part in honest)
    truth = truth.copy()
    truth[:7, :3, :3] = truth[:7, :3, :3] @ np.diag([1.0, -1, -1])
    found = consistency(estimates, covariances, truth)
    assert (found.count, found.gross) == (93, 7)
    flip = Symmetries(discrete=(make_transform(np.diag([1.0, -1, -1]), np.zeros(3)),))
    assert consistency(estimates, covariances, truth, [flip] * 100).gross == 0
    with pytest.raises(ValueError, match="none is within"):
        consistency(estimates[:7], covariances[:7], truth[:7])


def test_what_cannot_be_compared_is_refused(honest: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    estimates, covariances, truth = (part[:10] for part in honest)
    with pytest.raises(ValueError, match=r"\(9, 4, 4\)"):
        consistency(estimates, covariances, truth[:9])
    with pytest.raises(ValueError, match="positive definite"):
        consistency(estimates, covariances - 1.0, truth)
    with pytest.raises(ValueError, match="none is within"):
        consistency(estimates[:0], covariances[:0], truth[:0])


# Covariances for other origins and frames.


def test_another_origin_and_another_frame_stay_honest() -> None:
    """The same errors seen at a point 30 cm off, and from a robot's base."""
    rng = np.random.default_rng(4)
    covariances = 1e-2 * random_covariances(rng, 2000)  # small, for an arm is linear only for small rotations
    estimates = random_poses(rng, 2000)
    truth = moved(estimates, draws(rng, covariances))
    shift = make_transform(np.eye(3), [0.1, -0.2, 0.2])
    T_base_cam = random_poses(rng, 1)[0]
    there = T_base_cam @ estimates @ shift
    arms = there[:, :3, 3] - (T_base_cam @ estimates)[:, :3, 3]
    seen = [
        move_covariance(rotate_covariance(one, T_base_cam[:3, :3]), arm)
        for one, arm in zip(covariances, arms, strict=True)
    ]
    found = consistency(there, np.stack(seen), T_base_cam @ truth @ shift)
    assert found.pose.inside == pytest.approx(0.95, abs=0.016)
    assert found.pose.factor == pytest.approx(1.0, abs=0.08)
    back = move_covariance(seen[0], -arms[0])
    np.testing.assert_allclose(rotate_covariance(back, T_base_cam[:3, :3].T), covariances[0], atol=1e-12)


def test_a_point_on_a_ray_is_uncertain_along_it() -> None:
    """2 mm across, 10 % of the distance along, 0.1 rad about every axis: far off the camera's axis too."""
    rng = np.random.default_rng(6)
    estimate = random_poses(rng, 1)[0]
    point = estimate[:3, 3] = np.array([0.4, -0.3, 0.8])
    ray = point / np.linalg.norm(point)
    across = rng.normal(0, 0.002, (3000, 3))
    errors = rng.normal(0, 0.1, (3000, 6))
    errors[:, :3] = across - (across @ ray)[:, None] * ray + rng.normal(0, 0.1, (3000, 1)) * point
    covariance = ray_covariance(point, 0.002, 0.1, 0.1)
    poses = np.repeat(estimate[None], 3000, 0)
    found = consistency(poses, np.repeat(covariance[None], 3000, 0), moved(poses, errors))
    assert found.pose.inside == pytest.approx(0.95, abs=0.015)
    assert found.pose.factor == pytest.approx(1.0, abs=0.07)


# PnP's covariance.


@pytest.mark.parametrize("origin", [(0.0, 0.0, 0.0), (0.3, -0.5, 1.0)])
def test_pnp_is_honest_about_independent_errors(origin: tuple[float, ...]) -> None:
    """Also where the mesh's origin is far from the mesh, whose axes are turned any way."""
    rng = np.random.default_rng(5)
    estimates, covariances, truths = [], [], []
    for T in random_poses(rng, 300):
        xyz = rng.uniform(-0.06, 0.06, (60, 3))
        T = T @ make_transform(np.eye(3), -np.array(origin))
        camera = (xyz + origin) @ T[:3, :3].T + T[:3, 3]
        uv = camera @ K.T
        uv = uv[:, :2] / uv[:, 2:] + rng.normal(0, 0.5, (60, 2))
        solution = solve_pose(Correspondences(uv, xyz + origin, np.ones(60)), K, threshold=5.0)
        estimates.append(solution.T_cam_obj)
        covariances.append(solution.covariance)
        truths.append(T)
    found = consistency(np.stack(estimates), np.stack(covariances), np.stack(truths))
    assert found.gross == 0
    for share in (found.pose, found.position, found.rotation):
        assert share.inside == pytest.approx(0.95, abs=0.04)
        assert share.factor_at_half == pytest.approx(1.0, abs=0.2)
    np.testing.assert_allclose(found.spread, 1.0, atol=0.2)
    # One pose, two origins: one covariance follows from the other.
    middle = estimates[0] @ make_transform(np.eye(3), origin)
    here = pose_covariance(estimates[0], uv, xyz + origin, K)
    there = pose_covariance(middle, uv, xyz, K)
    arm = middle[:3, 3] - estimates[0][:3, 3]
    scale = np.sqrt(np.diag(there))
    np.testing.assert_allclose(
        move_covariance(here, arm) / np.outer(scale, scale), there / np.outer(scale, scale), atol=1e-6
    )
    assert invert_transform(middle) @ middle == pytest.approx(np.eye(4))
