"""Errors of poses, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from picopose_ros.estimation.confidence import Calibration, fit_calibration
from picopose_ros.evaluation.metrics import (
    MISSING,
    MSPD_THRESHOLDS,
    RECALL_THRESHOLDS,
    BopErrors,
    VsdScorer,
    add,
    add_or_add_s,
    add_s,
    area_under_roc,
    average_recall,
    bop_errors,
    bop_recalls,
    bop_symmetries,
    evaluation_points,
    match_by_position,
    mspd,
    mssd,
    pose_errors,
    ray_lengths,
    reliability,
    rotation_error_deg,
    translation_error,
    visible_surface,
    vsd_of_distances,
)
from picopose_ros.geometry.poses import make_transform
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, Symmetries, load_object
from picopose_ros.templates.renderer import MeshRenderer

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


def test_a_pose_behind_the_camera_is_projected_as_by_the_toolkit() -> None:
    # Through the camera's centre: the square upside down. MSSD tells the two apart.
    assert mspd(SQUARE, pose(z=-5), pose(), QUARTERS, K) == pytest.approx(0)
    assert mspd(SQUARE, pose(z=-5), pose(), QUARTERS[:1], K) == pytest.approx(200 * np.sqrt(2))
    assert mssd(SQUARE, pose(z=-5), pose(), QUARTERS) == pytest.approx(10)
    # In the camera's plane there is no projection.
    assert mspd(SQUARE, pose(z=0), pose(), QUARTERS, K) == float("inf")


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


# -- BOP 2019 -------------------------------------------------------------


def test_vsd_counts_by_hand() -> None:
    """Six pixels in a row, 1 m away; the object is 1 m across, so distances are shares of it."""
    measured = np.array([[1.0, 1.0, 1.0, 0.90, 0.0, 1.0]])
    truth = np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    # Seen in truth: all but pixel 3, which lies 10 cm behind something; pixel 4 was not measured.
    estimate = np.array([[0.93, 1.0, 1.28, 1.0, 0.0, 1.0]])
    # Pixel 0 is 7 cm off, pixel 2 28 cm: behind what was measured, but visible in truth, so it counts;
    # 3 is hidden in both, 4 only in truth, 5 only in the estimate: union 5 (0, 1, 2, 4, 5), both 3.
    errors = vsd_of_distances(estimate, truth, measured, 1.0)
    assert len(errors) == 10
    expected = [(2 + wrong) / 5 for wrong in (2, 1, 1, 1, 1, 0, 0, 0, 0, 0)]
    np.testing.assert_allclose(errors, expected)
    # Half the diameter, half the share.
    np.testing.assert_allclose(vsd_of_distances(estimate, truth, measured, 0.5)[:3], [0.8, 0.8, 0.6])


def test_vsd_tolerates_what_lies_a_little_behind_the_measurement() -> None:
    truth = np.full((1, 2), 1.0)
    for gap, share in ((0.014, 0.0), (0.016, 1.0)):
        seen = visible_surface(truth, truth - gap)
        assert seen.all() == (share == 0.0)
    assert not visible_surface(np.zeros((1, 2)), np.zeros((1, 2))).any()
    # Nothing of either pose is visible: the worst error, not a division by zero.
    np.testing.assert_array_equal(vsd_of_distances(truth, truth, truth - 0.5, 1.0), np.ones(10))


def test_distances_are_longer_than_depths_off_the_axis() -> None:
    rays = ray_lengths(481, 641, K)
    assert rays[240, 320] == 1.0
    assert rays[240, 570] == pytest.approx(np.sqrt(1 + 0.5**2))
    assert rays[0, 320] == pytest.approx(np.sqrt(1 + 0.48**2))


@pytest.fixture(scope="module")
def plate(tmp_path_factory: pytest.TempPathFactory) -> ObjectMesh:
    """A thin square plate of 20 cm."""
    path = tmp_path_factory.mktemp("mesh") / "plate.ply"
    trimesh.creation.box((0.2, 0.2, 0.002)).export(path)
    return load_object(ObjectSpec("plate", path))


def test_vsd_of_rendered_poses(plate: ObjectMesh) -> None:
    """A plate that faces the camera, moved along the axis and across it."""
    truth = pose(z=1.0)
    with MeshRenderer() as renderer:
        depth = renderer.render(plate, truth, K, 640, 480).depth
        scorer = VsdScorer(renderer, plate, truth, depth, K)
        np.testing.assert_array_equal(scorer.error(truth), np.zeros(10))
        # 283 mm across: 50 mm nearer are 0.177 of it, wrong for the tolerances .05, .10 and .15. The nearer
        # plate is 105 pixels wide instead of 101, and what it shows beyond is wrong for all of them.
        errors = scorer.error(pose(z=0.95))
        np.testing.assert_allclose(errors[3:], 1 - 101**2 / 105**2)
        np.testing.assert_array_equal(errors[:3], 1.0)
        # Half a plate aside: a third of the union is common.
        np.testing.assert_allclose(scorer.error(pose(x=0.1, z=1.0)), 2 / 3, atol=0.02)
        assert (scorer.error(pose(z=-1.0)) == 1).all()
        # An occluder over the left half hides the same of both.
        hidden = depth.copy()
        hidden[:, :320] = np.where(depth[:, :320] > 0, 0.5, 0)
        half = VsdScorer(renderer, plate, truth, hidden, K)
        np.testing.assert_array_equal(half.error(truth), np.zeros(10))
        np.testing.assert_allclose(half.error(pose(x=0.1, z=1.0)), 0.5 / 1.0, atol=0.02)


def test_continuous_symmetries_are_steps_of_a_hundredth_of_the_diameter() -> None:
    axis = (np.array([0.0, 0, 1]), np.array([0.1, 0, 0]))
    flip = make_transform(np.diag([1.0, -1, -1]), np.zeros(3))
    assert bop_symmetries(Symmetries()).shape == (1, 4, 4)
    assert bop_symmetries(Symmetries(discrete=(flip,))).shape == (2, 4, 4)
    turns = bop_symmetries(Symmetries(continuous=(axis,)))
    assert len(turns) == 315  # ceil(pi / 0.01)
    np.testing.assert_array_equal(turns[0], np.eye(4))
    np.testing.assert_allclose(turns @ [0.1, 0, 7, 1], np.tile([0.1, 0, 7, 1], (315, 1)), atol=1e-12)
    step = rotation_error_deg(turns[1], turns[0])
    assert step == pytest.approx(360 / 315) and rotation_error_deg(turns[-1], turns[0]) == pytest.approx(step)
    both = bop_symmetries(Symmetries(discrete=(flip,), continuous=(axis,)))
    assert len(both) == 630
    np.testing.assert_allclose(both[315:], turns @ flip, atol=1e-12)


def test_average_recalls_of_bop() -> None:
    # MSSD of 0.12 diameters: below .15 ... .50, 8 of 10 thresholds. A threshold itself is not below.
    assert average_recall([0.12], RECALL_THRESHOLDS) == pytest.approx(0.8)
    assert average_recall([0.5], RECALL_THRESHOLDS) == 0
    assert average_recall([5.0, 4.9], MSPD_THRESHOLDS) == pytest.approx((0.9 + 1.0) / 2)
    ramp = np.linspace(0.9, 0.0, 10)  # VSD by tolerance
    below = [(ramp < th).mean() for th in RECALL_THRESHOLDS]
    errors = [BopErrors(ramp, 0.12, 12.0), MISSING]
    recalls = bop_recalls(errors)
    assert recalls["vsd"] == pytest.approx(np.mean(below) / 2)
    assert recalls["mssd"] == pytest.approx(0.4) and recalls["mspd"] == pytest.approx(0.4)
    assert recalls["ar"] == pytest.approx((recalls["vsd"] + 0.8) / 3)


def test_mspd_is_stated_for_an_image_of_640_pixels(plate: ObjectMesh) -> None:
    truth, moved = pose(z=1.0), pose(x=0.01, z=1.0)
    wide = K * [[2], [2], [1]]
    with MeshRenderer() as renderer:
        scorer = VsdScorer(renderer, plate, truth, np.zeros((960, 1280)), wide)
        errors = bop_errors(plate.vertices, plate.diameter, moved, truth, np.eye(4)[None], wide, 1280, scorer)
    assert errors.mspd == pytest.approx(5, rel=0.01)  # 10 px of 1280
    assert errors.mssd == pytest.approx(0.01 / plate.diameter)
    # 10 of 200 mm aside: 1/20 of either plate is beyond the other.
    np.testing.assert_allclose(errors.vsd, 2 / 21, atol=0.02)


def test_evaluation_points_hold_the_farthest_ones(plate: ObjectMesh) -> None:
    points = evaluation_points(plate, 200)
    again = evaluation_points(plate, 200)
    np.testing.assert_array_equal(points.surface, again.surface)
    assert len(points.surface) == 200 and len(points.extreme) == 8 + 50
    tilted = make_transform(np.array([[1.0, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]), np.array([0, 0, 1.0]))
    symmetries = np.eye(4)[None]
    assert mssd(points.extreme, tilted, pose(z=1.0), symmetries) == pytest.approx(
        mssd(plate.vertices, tilted, pose(z=1.0), symmetries)
    )
    # The mean over corners would be half again the mean over the surface.
    assert add(points.surface, tilted, pose(z=1.0)) < 0.7 * add(plate.vertices, tilted, pose(z=1.0))


# -- scores ---------------------------------------------------------------


def test_area_under_roc_counts_pairs() -> None:
    assert area_under_roc([0.9, 0.4], [0.1, 0.5]) == pytest.approx(3 / 4)
    assert area_under_roc([0.5], [0.5]) == pytest.approx(0.5)
    assert np.isnan(area_under_roc([], [0.5]))


def test_reliability_by_hand() -> None:
    found = reliability(np.array([0.05, 0.95, 0.9, 1.0]), np.array([0, 1, 1, 0]))
    assert found.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert found.correct[9] == pytest.approx(2 / 3) and found.confidence[9] == pytest.approx(0.95)
    assert np.isnan(found.correct[4])
    assert found.error == pytest.approx((0.05 * 1 + (0.95 - 2 / 3) * 3) / 4)


def test_the_calibration_is_found_and_keeps_the_order() -> None:
    """Poses that are right as often as a mapping of their confidence says."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.05, 0.95, 4000)
    correct = rng.uniform(size=4000) < Calibration(2.0, 1.0).apply(confidence)
    found = fit_calibration(confidence, correct)
    assert found.slope == pytest.approx(2.0, abs=0.2) and found.offset == pytest.approx(1.0, abs=0.2)
    mapped = found.apply(confidence)
    assert reliability(mapped, correct).error < 0.03 < reliability(confidence, correct).error
    assert (np.diff(mapped[np.argsort(confidence)]) >= 0).all()
    assert 0 < found.apply(0.0) < 0.001 and 0.999 < found.apply(1.0) < 1
    # All right, all the same: no infinite mapping.
    few = fit_calibration(np.full(5, 0.5), np.ones(5, bool))
    assert 0.5 < few.apply(0.5) < 1 and 0.2 < few.slope < 5
    twice = found.then(few)
    assert twice.apply(0.3) == pytest.approx(few.apply(found.apply(0.3)))
    np.testing.assert_array_equal(Calibration().apply(confidence), confidence)
