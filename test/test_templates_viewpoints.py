"""Viewpoints: the geometry of the released network's predefined poses."""

from __future__ import annotations

import numpy as np
import pytest
from parity import load_parity

from picopose_ros.errors import ConfigError
from picopose_ros.templates.viewpoints import icosphere, spread_viewpoints, viewpoint_rotations


@pytest.mark.parametrize("count", [42, 162, 642])
def test_rotations_look_at_the_origin_from_all_around(count: int) -> None:
    rotations = viewpoint_rotations(count)
    assert rotations.shape == (count, 3, 3)
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotations), 1.0)

    cameras = -rotations.transpose(0, 2, 1) @ (0.0, 0.0, 1.0)  # camera centres for t = (0, 0, 1)
    assert np.allclose(np.linalg.norm(cameras, axis=1), 1.0)
    assert len(np.unique(cameras.round(6), axis=0)) == count
    assert np.abs(cameras.mean(axis=0)).max() < 1e-9
    assert (np.diff(cameras[:, 2]) > -1e-6).all(), "the lowest camera comes first"


def test_162_views_are_about_16_degrees_apart() -> None:
    cameras = -viewpoint_rotations(162)[:, 2]
    cosines = cameras @ cameras.T - 2.0 * np.eye(162)
    nearest = np.rad2deg(np.arccos(cosines.max(axis=1)))
    assert nearest.min() == pytest.approx(15.86, abs=0.01)
    assert nearest.max() == pytest.approx(16.41, abs=0.01)


def test_up_is_up_in_the_picture_except_at_the_poles() -> None:
    rotations = viewpoint_rotations(162)
    up = rotations @ (0.0, 0.0, 1.0)  # the object's z axis in the camera: x is horizontal, y points down
    assert np.abs(up[1:-1, 0]).max() < 1e-12
    assert up[1:-1, 1].max() < 0.0
    assert np.allclose(rotations[0], np.diag([-1, -1, 1]), atol=1e-12), "from straight below"
    assert np.allclose(rotations[-1], np.diag([1, -1, -1]), atol=1e-12), "from straight above"


def test_coarser_views_are_among_the_finer_ones() -> None:
    coarse, fine = icosphere(1), icosphere(3)
    assert np.linalg.norm(coarse[:, None] - fine[None], axis=2).min(axis=1).max() < 1e-12


def test_the_released_networks_poses_are_ours() -> None:
    theirs = load_parity().tensor("raw/template_pose_mm")[:, :3, :3]
    ours = viewpoint_rotations(162)
    distances = np.abs(theirs[:, None] - ours[None]).max(axis=(2, 3))
    assert distances.min(axis=1).max() < 2e-5
    assert len(set(distances.argmin(axis=1))) == len(theirs)


@pytest.mark.parametrize("count", [0, 1, 161, 2562])
def test_other_numbers_of_views_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="42, 162, 642"):
        viewpoint_rotations(count)


def _apart_and_covering(count: int, of: int = 162) -> tuple[float, float]:
    """Degrees between the two nearest of the chosen views; from a view to the nearest of them, at most."""
    cameras = -viewpoint_rotations(of)[:, 2]
    chosen = cameras[spread_viewpoints(count, of)]
    apart = (chosen @ chosen.T - 2 * np.eye(count)).max()
    covering = (cameras @ chosen.T).max(axis=1).min()
    return tuple(np.rad2deg(np.arccos(np.clip([apart, covering], -1, 1))))


def test_fewer_views_are_spread_evenly() -> None:
    assert _apart_and_covering(2) == pytest.approx((180, 90))
    assert _apart_and_covering(6)[0] == pytest.approx(90)  # an octahedron
    apart, covering = _apart_and_covering(42)
    assert apart == pytest.approx(31.72, abs=0.01) and covering < 18.1
    # The first 42 leave half of the sphere out.
    cameras = -viewpoint_rotations(162)[:, 2]
    assert np.rad2deg(np.arccos((cameras @ cameras[:42].T).max(axis=1).min())) > 90
    for count in (1, 5, 7, 20):
        ids = spread_viewpoints(count)
        assert len(set(ids.tolist())) == count and (np.diff(ids) > 0).all()
    assert _apart_and_covering(7)[0] > 65  # at best 77.9 anywhere on the sphere


def test_42_views_of_a_finer_bank_are_the_coarser_bank() -> None:
    for fine in (162, 642):
        chosen = viewpoint_rotations(fine)[spread_viewpoints(42, fine)]
        np.testing.assert_allclose(chosen, viewpoint_rotations(42), atol=1e-12)


@pytest.mark.parametrize("count", [0, 163])
def test_more_views_than_there_are_cannot_be_chosen(count: int) -> None:
    with pytest.raises(ConfigError, match="take 1 to 162"):
        spread_viewpoints(count)
