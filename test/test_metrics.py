"""Errors of poses, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from picopose_ros.evaluation.metrics import (
    add,
    add_or_add_s,
    add_s,
    match_by_position,
    mspd,
    mssd,
    pose_errors,
    rotation_error_deg,
    translation_error,
)
from picopose_ros.geometry.poses import make_transform

SQUARE = np.array([[1.0, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]])
K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])


def turn(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])


def pose(degrees: float = 0, x: float = 0, y: float = 0, z: float = 5) -> np.ndarray:
    return make_transform(turn(degrees), np.array([x, y, z], float))


QUARTERS = np.stack([make_transform(turn(a), np.zeros(3)) for a in (0, 90, 180, 270)])


def test_a_shift_moves_every_point_alike() -> None:
    assert add(SQUARE, pose(x=0.3, y=0.4), pose()) == pytest.approx(0.5)
    assert translation_error(pose(x=0.3, y=0.4), pose()) == pytest.approx(0.5)
    assert mssd(SQUARE, pose(x=0.3, y=0.4), pose(), QUARTERS[:1]) == pytest.approx(0.5)
    # 500 px/m at 5 m: 0.5 m are 50 px
    assert mspd(SQUARE, pose(x=0.3, y=0.4), pose(), QUARTERS[:1], K) == pytest.approx(50)


def test_a_quarter_turn_of_a_square_is_an_error_only_without_its_symmetry() -> None:
    assert add(SQUARE, pose(90), pose()) == pytest.approx(2.0)
    assert add_s(SQUARE, pose(90), pose()) == pytest.approx(0.0, abs=1e-12)
    assert add_or_add_s(SQUARE, pose(90), pose(), symmetric=False) == pytest.approx(2.0)
    assert add_or_add_s(SQUARE, pose(90), pose(), symmetric=True) == pytest.approx(0.0, abs=1e-12)
    assert mssd(SQUARE, pose(90), pose(), QUARTERS) == pytest.approx(0.0, abs=1e-12)
    assert mspd(SQUARE, pose(90), pose(), QUARTERS, K) == pytest.approx(0.0, abs=1e-9)
    assert rotation_error_deg(pose(90), pose()) == pytest.approx(90)
    assert rotation_error_deg(pose(100), pose(), QUARTERS) == pytest.approx(10)


def test_symmetries_act_in_the_objects_frame() -> None:
    tilted = make_transform(np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), np.array([0.1, 0.2, 3.0]))
    turned = tilted @ QUARTERS[1]
    assert rotation_error_deg(turned, tilted, QUARTERS) == pytest.approx(0, abs=1e-5)
    assert mssd(SQUARE, turned, tilted, QUARTERS) == pytest.approx(0, abs=1e-12)


def test_a_pose_behind_the_camera_projects_nowhere() -> None:
    assert mspd(SQUARE, pose(z=-5), pose(), QUARTERS, K) == float("inf")


def test_correct_means_below_a_tenth_of_the_diameter() -> None:
    diameter = 2 * np.sqrt(2)
    assert pose_errors(SQUARE, diameter, pose(x=0.28), pose()).correct
    assert not pose_errors(SQUARE, diameter, pose(x=0.29), pose()).correct
    flagged = pose_errors(SQUARE, diameter, pose(90), pose(), QUARTERS)
    assert flagged.correct and flagged.rotation_deg == pytest.approx(0, abs=1e-5)
    assert not pose_errors(SQUARE, diameter, pose(90), pose(), QUARTERS[:1]).correct


def test_instances_are_matched_one_to_one_by_position() -> None:
    truths = [pose(x=0), pose(x=1)]
    assert match_by_position([pose(x=0.9), pose(x=0.1)], truths) == [1, 0]
    assert match_by_position([pose(x=0.9)], truths) == [None, 0]
    assert match_by_position([pose(x=9), pose(x=0.2), pose(x=1.1)], truths) == [1, 2]
    assert match_by_position([], truths) == [None, None]
